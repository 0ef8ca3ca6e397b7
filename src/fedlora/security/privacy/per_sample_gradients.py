"""Per-sample gradients of the low-rank leaves in one pass, with a copy of the leaves for each row.

Adapters take leading dimensions: with a leaf ``(r n)`` expanded to ``(b r n)``, ``x Aᵀ`` is one batched product, and
the leaf's gradient holds one gradient a row. The expanded leaves are views, so the only cost in memory is the gradient,
``b`` times the leaves.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.adapters import Adapter
from fedlora.training.model import Model
from fedlora.training.parts import AdaptedLinear
from fedlora.types import Layer

Leaves = dict[tuple[str, str], Tensor]  # (part, leaf) -> (b, *shape)


def compute_gradients(
    model: Model, losses: Callable[[nn.Module], Tensor], rows: int, trained: Mapping[tuple[str, str], Tensor]
) -> tuple[Tensor, Leaves]:
    """Return each row's loss (b,) and its gradients at the trained leaves, (b, \\*shape), 0 for an unused leaf.

    ``losses`` computes the network's (b,) losses of ``rows`` rows; none may depend on another row.
    """
    expanded: Leaves = {}  # the network uses slice ``i`` of them for row ``i``
    with ExitStack() as stack:
        for path, part in model.parts.items():
            leaves = {leaf: x.detach() for leaf, x in part.leaves.items()}
            for leaf in leaves.keys() & part.adapter.trainable:
                leaves[leaf] = leaves[leaf].expand(rows, *leaves[leaf].shape).requires_grad_((path, leaf) in trained)
            expanded |= {(path, leaf): x for leaf, x in leaves.items()}
            if any((path, leaf) in trained for leaf in leaves):
                stack.callback(_swap(path, part.module, leaves, rows))
        with model.running():
            values = losses(model.network)
            inputs = [expanded[key] for key in trained]
            grads = torch.autograd.grad(values.sum(), inputs, allow_unused=True, materialize_grads=True)
    return values.detach(), dict(zip(trained, grads, strict=True))


def _swap(path: str, module: nn.Module, leaves: Layer, rows: int) -> Callable[[], None]:
    """Make a module use slice ``i`` of its leaves for row ``i``; returns the function that undoes it."""
    if isinstance(module, AdaptedLinear):
        before, module.adapter = module.adapter, _PerSample(path, module.adapter, leaves, rows)  # type: ignore[assignment]
        return partial(setattr, module, "adapter", before)
    forward = FORWARDS.get(type(module))
    if forward is None:
        raise ValueError(
            f"{path!r} is a {type(module).__name__}, which has no per-sample gradient here; with "
            "privacy.level = 'example' leave it out of model.head."
        )
    return module.register_forward_hook(lambda m, inputs, output: forward(path, m, inputs[0], leaves, rows)).remove


class _PerSample:
    """An adapter that computes row ``i`` with slice ``i`` of its leaves."""

    def __init__(self, path: str, adapter: Adapter, leaves: Layer, rows: int):
        self.path, self.adapter, self.leaves, self.rows = path, adapter, leaves, rows

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        flat = _by_row(self.path, x, self.rows)
        return Adapter.forward(self.adapter, flat, self.leaves).reshape(*x.shape[:-1], -1)


def _by_row(path: str, x: Tensor, rows: int) -> Tensor:
    """Reshape ``x (b … n)`` to ``(b t n)``. ``ValueError`` if its first dimension is not the rows."""
    if x.shape[0] != rows:
        raise ValueError(
            f"{path!r} gets {x.shape[0]} inputs of {rows} rows, so they have no per-sample gradients; with "
            "privacy.level = 'example' adapt other modules (model.targets), or take another model."
        )
    return x.reshape(rows, -1, x.shape[-1])


def _linear(path: str, module: nn.Module, x: Tensor, leaves: Layer, rows: int) -> Tensor:
    y = _by_row(path, x, rows) @ leaves["weight"].mT
    if "bias" in leaves:
        y = y + leaves["bias"][:, None]
    return y.reshape(*x.shape[:-1], -1)


def _layer_norm(path: str, module: nn.Module, x: Tensor, leaves: Layer, rows: int) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    y = functional.layer_norm(_by_row(path, x, rows), module.normalized_shape, eps=module.eps)
    y = y * leaves["weight"][:, None]
    return (y + leaves["bias"][:, None] if "bias" in leaves else y).reshape(x.shape)


FORWARDS = {nn.Linear: _linear, nn.LayerNorm: _layer_norm}


@torch.no_grad()
def check_losses(model: Model, batch_losses: Callable[[nn.Module, Tensor], Tensor], rows: Tensor) -> None:
    """Raise ``ValueError`` if a row's loss is another one in a batch with other rows.

    ``batch_losses(network, rows)`` computes the losses of some rows. For losses that are not this library's own.
    """
    model.network.eval()
    with model.running():
        together = batch_losses(model.network, rows)
        alone = torch.cat([batch_losses(model.network, row) for row in rows.split(1)])
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-5):
        raise ValueError(
            "losses returns other values for rows in a batch than for each row alone, so no clipped gradient bounds "
            "one row's part; with privacy.level = 'example' a row's loss depends on this row only."
        )


def check_row_independence(network: nn.Module) -> None:
    """``ValueError`` if the rows of a batch depend on each other: then there are no per-sample gradients."""
    for path, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{path!r} is a {type(module).__name__}, through which the rows of a batch affect each other, so that "
                "no clipped gradient bounds one row's part; privacy.level = 'example' needs a model without it."
            )
