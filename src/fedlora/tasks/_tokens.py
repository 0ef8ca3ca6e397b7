"""Loss and outputs of tasks that predict tokens."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from fedlora.tasks._base import Batch, TableTask
from fedlora.tasks.networks.next_token_loss import Inputs, loss_of, select_learnt


class TokenTask(TableTask):
    """A task whose labels are tokens, most of them without a loss."""

    @abstractmethod
    def inputs(self, network: nn.Module, batch: Batch) -> Inputs:
        """Return the network's arguments for a batch, without the labels."""

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor:
        """Return the token that each position predicts (b t), -100 at a position without a loss."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the batch's learnt tokens."""
        learnt = select_learnt(self.targets(batch))  # first, because a plan stops here
        return loss_of(network).mean(network, self.inputs(network, batch), *learnt)

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return each row's mean cross-entropy over its learnt tokens (b,)."""
        nll, tokens, _ = self.sums(network, batch).unbind(1)
        return nll / tokens.clamp_min(1)

    def sums(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return each row's negative log-likelihood, number of learnt tokens, and number of correct predictions."""
        targets = self.targets(batch)
        positions, tokens = select_learnt(targets)
        nll, hits = loss_of(network).each(network, self.inputs(network, batch), positions, tokens)
        row = positions // targets.shape[1]
        zeros = torch.zeros(len(targets), dtype=torch.float64, device=row.device)
        values = (nll.to(row.device), torch.ones_like(row), hits.to(row.device))
        return torch.stack([zeros.index_add(0, row, x.double()) for x in values], 1)
