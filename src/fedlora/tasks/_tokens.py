"""Loss and outputs of tasks that predict tokens."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from fedlora.tasks._base import Batch, Examples, TableTask
from fedlora.tasks.data.tokens import IGNORED
from fedlora.tasks.networks.next_token_loss import Inputs, loss_of, select_learnt

LEARNT = "learnt_positions"  # of a training batch: the positions of its learnt tokens, found while it is on the CPU


class TokenTask(TableTask):
    """A task whose labels are tokens, most of them without a loss."""

    @property
    def token_task(self) -> "TokenTask":
        return self

    @abstractmethod
    def inputs(self, network: nn.Module, batch: Batch) -> Inputs:
        """Return the network's arguments for a batch, without the labels."""

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor:
        """Return the token that each position predicts (b t), -100 at a position without a loss."""

    def collate_for_training(self, examples: Examples, rows: Tensor, draws: torch.Generator) -> Batch:
        batch = super().collate_for_training(examples, rows, draws)
        return {**batch, LEARNT: select_learnt(self.targets(batch))[0]}

    def loss_terms(self, batch: Batch) -> int:
        """Return the number of learnt tokens."""
        return int((self.targets(batch) != IGNORED).sum())

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the batch's learnt tokens."""
        learnt = self._select_learnt(batch)  # first, because a plan stops here
        return loss_of(network).mean(network, self._inputs(network, batch), *learnt)

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return each row's mean cross-entropy over its learnt tokens (b,)."""
        nll, tokens, _ = self.sums(network, batch).unbind(1)
        return nll / tokens.clamp_min(1)

    def sums(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return each row's negative log-likelihood, number of learnt tokens, and number of correct predictions."""
        positions, tokens = self._select_learnt(batch)
        nll, hits = loss_of(network).each(network, self._inputs(network, batch), positions, tokens)
        rows, width = self.targets(batch).shape
        row = positions // width
        zeros = torch.zeros(rows, dtype=torch.float64, device=row.device)
        values = (nll.to(row.device), torch.ones_like(row), hits.to(row.device))
        return torch.stack([zeros.index_add(0, row, x.double()) for x in values], 1)

    def _inputs(self, network: nn.Module, batch: Batch) -> Inputs:
        return self.inputs(network, {name: x for name, x in batch.items() if name != LEARNT})

    def _select_learnt(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return ``select_learnt`` of a batch, without a search on the device if its positions are known."""
        targets = self.targets(batch)
        if LEARNT not in batch:
            return select_learnt(targets)
        return batch[LEARNT], targets.flatten()[batch[LEARNT]]
