"""Each row's own gradient at the low-rank leaves, in one pass: every row gets a copy of the leaves to itself.

Low-rank algebra here takes leading dimensions, so a leaf ``(r n)`` that is expanded to ``(b r n)`` turns ``x Aᵀ`` into
one batched product, and its gradient is a gradient a row. Nothing is copied: the leaves are views until the gradient
is made, which is what it costs, ``b`` times the leaves.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.adapters import Adapter
from fedlora.training.model import Adapted, Model
from fedlora.types import Layer

Leaves = dict[tuple[str, str], Tensor]  # (part, leaf) -> (b, *shape)


def gradients(
    model: Model, losses: Callable[[nn.Module], Tensor], rows: int, trained: Mapping[tuple[str, str], Tensor]
) -> tuple[Tensor, Leaves]:
    """Each row's loss (b,) and its gradients at the trained leaves, (b, \\*shape), zero where a leaf has no influence.

    ``losses`` gives the network's (b,) losses of ``rows`` rows, row by row: none may depend on another row.
    """
    with expanded(model, rows, trained) as leaves, model.running():
        found = losses(model.network)
        grads = torch.autograd.grad(found.sum(), list(leaves.values()), allow_unused=True)
    each = {
        key: torch.zeros_like(x) if grad is None else grad for (key, x), grad in zip(leaves.items(), grads, strict=True)
    }
    return found.detach(), each


@contextmanager
def expanded(model: Model, rows: int, trained: Mapping[tuple[str, str], Tensor]) -> Iterator[Leaves]:
    """While it lasts, the network computes row ``i`` with slice ``i`` of the leaves that this yields."""
    wanted: Leaves = {}
    with ExitStack() as stack:
        for path, part in model.parts.items():
            own = {
                leaf: x.detach().expand(rows, *x.shape).requires_grad_((path, leaf) in trained)
                if leaf in part.adapter.trainable
                else x.detach()
                for leaf, x in part.leaves.items()
            }
            wanted |= {(path, leaf): x for leaf, x in own.items() if (path, leaf) in trained}
            if any((path, leaf) in trained for leaf in own):
                stack.enter_context(_swapped(path, part.module, own, rows))
        yield {key: wanted[key] for key in trained}


@contextmanager
def _swapped(path: str, module: nn.Module, leaves: Layer, rows: int) -> Iterator[None]:
    if isinstance(module, Adapted):
        before, module.adapter = module.adapter, _Each(path, module.adapter, leaves, rows)  # type: ignore[assignment]
        try:
            yield
        finally:
            module.adapter = before
        return
    form = FORMS.get(type(module))
    if form is None:
        raise ValueError(
            f"{path!r} is a {type(module).__name__}, of which a single row's gradient is not known here; with "
            "privacy.level = 'example' leave it out of model.head."
        )
    hook = module.register_forward_hook(lambda m, inputs, output: form(path, m, inputs[0], leaves, rows))
    try:
        yield
    finally:
        hook.remove()


class _Each:
    """An adapter that computes row ``i`` with slice ``i`` of its leaves."""

    def __init__(self, path: str, adapter: Adapter, leaves: Layer, rows: int):
        self.path, self.adapter, self.leaves, self.rows = path, adapter, leaves, rows

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        flat = _by_row(self.path, x, self.rows)
        return Adapter.forward(self.adapter, flat, self.leaves).reshape(*x.shape[:-1], -1)


def _by_row(path: str, x: Tensor, rows: int) -> Tensor:
    """``x (b … n)`` as ``(b t n)``. ``ValueError`` where its first dimension is not the rows."""
    if x.shape[0] != rows:
        raise ValueError(
            f"{path!r} gets {x.shape[0]} stretches of {rows} rows, so a row's own gradient cannot be told there; with "
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


FORMS = {nn.Linear: _linear, nn.LayerNorm: _layer_norm}
MIXING = (nn.modules.batchnorm._BatchNorm,)  # layers in which rows of a batch act on each other


def check(network: nn.Module) -> None:
    """``ValueError`` where rows of a batch act on each other: then no row has a gradient of its own."""
    for path, module in network.named_modules():
        if isinstance(module, MIXING):
            raise ValueError(
                f"{path!r} is a {type(module).__name__}, through which the rows of a batch act on each other, so that "
                "no clipped gradient bounds one row's part; privacy.level = 'example' needs a model without."
            )
