"""Example-level privacy: a client's local steps as DP-SGD on its adapter.

Abadi et al. Deep Learning with Differential Privacy. CCS 2016. https://arxiv.org/abs/1607.00133
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from fedlora.rounds import Rules
from fedlora.security.privacy import per_sample_gradients
from fedlora.security.privacy.client_level import MARGIN
from fedlora.security.privacy.noise import Stream
from fedlora.training.local import LocalTrainer, Training
from fedlora.types import Tree


def sampling_rate(training: Training, rows: int) -> float:
    """Return the probability that a row is in the batch of a step."""
    return min(1.0, training.batch_size * training.accumulation_steps / rows)


@dataclass
class PrivateTrainer(LocalTrainer):
    """One turn of DP-SGD: ``g = (Σ_i clip(g_i) + N(0, (noise · clip)²)) / (rate · rows)``, then the usual optimiser.

    A step's rows are a Poisson sample of the client's, ``training.batch_size`` times ``accumulation_steps`` on average;
    at most ``batch_size``, of at most ``max_tokens`` tokens, are computed at once. Later operations (moments, weight
    decay, ``max_grad_norm``, a method's penalty) use no row.
    """

    clip: float = field(default=1.0, kw_only=True)
    noise: float = field(kw_only=True)
    stream: Stream = field(kw_only=True)

    def gradient(self, start: Tree) -> Tree:
        raise ValueError("a method that uses a gradient on the client's rows has no example-level guarantee.")

    def _mean_loss(self, losses: Tensor) -> float:
        """Return the mean of the finite losses of rows, 0 without one: one row must not stop the turn."""
        finite = losses[losses.isfinite()]
        return float(finite.mean()) if len(finite) else 0.0

    def _gradients(self, parameters: Mapping[tuple[str, str], Tensor], rules: Rules) -> Iterator[list[Tensor]]:
        per_sample_gradients.check_row_independence(self.model.network)
        draws = torch.Generator().manual_seed(self.stream.seed ^ self.turn.round)
        rows = len(self.shard.train)
        q = sampling_rate(self.training, rows)
        for step in count():
            sample = self.shard.train[self.stream.sample(rows, q, "rows", self.turn.round, step)]
            sums = {key: torch.zeros_like(x, dtype=torch.float64) for key, x in parameters.items()}
            losses = []
            chunks = sample.split(self.training.batch_size) if len(sample) else ()
            for part in (part for chunk in chunks for part in self.split(chunk)):
                batch = self.batch(part, draws)
                part_losses, grads = per_sample_gradients.compute_gradients(
                    self.model, lambda network, batch=batch: self.task.losses(network, batch), len(part), parameters
                )
                by = clip_factors(grads, self.clip)
                for key, grad in grads.items():
                    # A row that is not finite has the factor 0, and 0 times infinity is NaN.
                    finite = torch.nan_to_num(grad, 0.0, 0.0, 0.0)
                    sums[key] += torch.einsum("b,b...->...", by, finite.double())
                losses.append(part_losses)
            for key, parameter in parameters.items():
                noise = self.stream.normal(parameter.shape, "step", self.turn.round, step, *key).to(parameter.device)
                parameter.grad = ((sums[key] + self.noise * self.clip * noise) / (q * rows)).to(parameter.dtype)
            penalty = self._penalty(rules)
            if isinstance(penalty, Tensor) and penalty.requires_grad:
                penalty.backward()
            yield losses


def clip_factors(grads: Mapping[object, Tensor], clip: float) -> Tensor:
    """Return the factor (b,) that clips each row's gradients to norm ``clip`` over all leaves; 0 if not finite."""
    squares = sum(grad.double().flatten(1).square().sum(1) for grad in grads.values())
    assert isinstance(squares, Tensor), "something is trained"
    norms = squares.sqrt()
    by = (clip * MARGIN / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    return torch.where(norms.isfinite(), by, 0.0)
