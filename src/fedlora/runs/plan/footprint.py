"""What training and evaluation take, batch by batch: run on fake tensors, counted operation by operation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedlora.runs.plan.memory import Live
from fedlora.tasks._base import Batch, Task
from fedlora.training.local import Training
from fedlora.training.model import Model

CPU_ATTENTION = {  # torch counts these on a GPU only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **_: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *rest, **_: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Cost:
    """Of one batch: floating point operations of its products, and bytes."""

    flops: int
    saved: int  # activations that wait for the backward pass
    peak: int  # at most at a time, beside the weights and leaves: gradients and moments included
    gradients: int = 0
    moments: int = 0


@dataclass
class Bench:
    """A model of fake tensors with its leaves, on which batches of any shape can be tried."""

    model: Model
    task: Task
    training: Training
    fake: FakeTensorMode
    tree: Mapping[str, Mapping[str, Tensor]] = field(repr=False)  # one layer a part: shapes only
    stood_in: bool = False  # whether a loss depended on values, and was taken over every position instead

    def __post_init__(self) -> None:
        made: dict[int, Tensor] = {}
        with self.fake:
            for layer in self.tree.values():
                for x in layer.values():  # what weights have in common stays one tensor
                    made[id(x)] = made.get(id(x), torch.empty(x.shape, device=self.model.device))
        self.model.load({path: {leaf: made[id(x)] for leaf, x in layer.items()} for path, layer in self.tree.items()})

    def known(self) -> list[Tensor]:
        """All weights, buffers and leaves."""
        network: nn.Module = self.model.network
        return [*network.parameters(), *network.buffers()]

    def train(self, shapes: Mapping[str, Tensor], trained: Mapping[str, frozenset[str]]) -> Cost:
        """One optimiser step on one batch, with the moments of steps before it."""
        parameters = list(self.model.select(trained).values())
        if not parameters:
            return Cost(0, 0, 0)
        optimizer = self.training.build(parameters)
        self.model.network.train()
        with self.fake, Live(self.known()) as live:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes the moments
            optimizer.zero_grad(set_to_none=True)
            live.peak = live.now
            return self._step(shapes, parameters, optimizer, live)

    def _step(self, shapes, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, live: Live) -> Cost:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            before = live.now
            loss = self._forward(shapes)
            saved = live.now - before
            loss.backward()
        del loss
        gradients = sum(_size(p.grad) for p in parameters if p.grad is not None)
        if self.training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        states = (x for state in optimizer.state.values() for x in state.values())
        moments = sum(_size(x) for x in states if isinstance(x, Tensor))
        return Cost(counter.get_total_flops(), saved, live.peak, gradients, moments)

    def score(self, shapes: Mapping[str, Tensor]) -> Cost:
        """A forward pass for evaluation."""
        self.model.network.eval()
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with self.fake, torch.no_grad(), Live(self.known()) as live, counter:
            batch = self._batch(shapes)
            with self.model.running():
                self._tried(lambda: self.task.outputs(self.model.network, batch), batch)
        return Cost(counter.get_total_flops(), 0, live.peak)

    def _forward(self, shapes: Mapping[str, Tensor]) -> Tensor:
        batch = self._batch(shapes)
        with self.model.running():
            return self._tried(lambda: self.task.loss(self.model.network, batch), batch)

    def _batch(self, shapes: Mapping[str, Tensor]) -> Batch:
        return {name: torch.zeros(x.shape, dtype=x.dtype, device=self.model.device) for name, x in shapes.items()}

    def _tried(self, compute: Callable[[], Tensor], batch: Batch) -> Tensor:
        """The task's own computation, or the loss at every position where its shapes depend on values."""
        try:
            return compute()
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.stood_in = True
            output: Any = self.model.network(**{name: x for name, x in batch.items() if name != "labels"})
            flat = output.logits.flatten(0, -2).float()
            return functional.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.int64, device=flat.device))


def interpolated(points: Mapping[int, float]) -> Callable[[int], float]:
    """The polynomial through ``{width: figure}``: a transformer's cost a row is one of second degree in its width."""

    def at(width: int) -> float:
        total = 0.0
        for own, figure in points.items():
            for other in points:
                figure *= (width - other) / (own - other) if other != own else 1.0
            total += figure
        return total

    return at


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def weight_bytes(model: Model) -> int:
    """Bytes of the frozen network: storages once, without the leaves."""
    leaves = {id(x) for part in model.parts.values() for x in part.leaves.values()}
    network = model.network
    own = {id(x): _size(x) for x in (*network.parameters(), *network.buffers()) if id(x) not in leaves}
    return sum(own.values())
