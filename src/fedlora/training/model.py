"""A base network with adapted parts: the one mutable thing, entered by five doors.

The base is loaded once a process and shared by all clients. A client's model is the base plus a ``Tree``, and
``load`` is total: it sets every leaf of every part, so nothing of one client can be left for the next.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import Adapter, Dense
from fedlora.linalg.factors import compact, total
from fedlora.methods._base import Method
from fedlora.rounds import Rules
from fedlora.seeds import derive_seed
from fedlora.training.targets import adapted, trained_in_full
from fedlora.types import Factors, Layer, Tree

Precision = Literal["float32", "bf16-autocast", "bf16"]


class Adapted(nn.Module):
    """``x ↦ base(x) + x ΔWᵀ`` for one frozen ``Linear`` or ``Conv1D``."""

    def __init__(self, base: nn.Module, adapter: Adapter):
        super().__init__()
        self.base, self.adapter = base, adapter
        self.leaves = nn.ParameterDict()
        self.overlay: Factors | None = None  # base updates that the base weight itself cannot take

    @property
    def weight(self) -> Tensor:
        """The base's own: T5 looks at its layers' precision."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + self.adapter.forward(x, dict(self.leaves.items()))
        return y if self.overlay is None else y + (x @ self.overlay.V.mT) @ self.overlay.U.mT


@dataclass(frozen=True)
class Part:
    """One part of the model, and where its leaves live."""

    module: nn.Module
    adapter: Adapter

    @property
    def leaves(self) -> Mapping[str, nn.Parameter]:
        return (
            self.module.leaves
            if isinstance(self.module, Adapted)
            else dict(self.module.named_parameters(recurse=False))
        )


class Model:
    """Attach once; then ``load``, ``read``, ``fold``, ``unfold`` and ``gradient`` are the only ways in and out."""

    def __init__(
        self,
        network: nn.Module,
        parts: Mapping[str, Part],
        precision: Precision,
        device: torch.device,
        overlay: bool | None = None,
    ):
        self.network, self.parts, self.precision, self.device = network, parts, precision, device
        # Rounded to bfloat16, a weight would lose most of an update that is small beside it, and autocast rounds too.
        self.overlay = precision != "float32" if overlay is None else overlay
        self._pretrained: dict[str, Tensor] = {}  # base weights that folds have changed, as they were
        self._initial = {p: _copies(part.leaves) for p, part in parts.items() if isinstance(part.adapter, Dense)}
        self._started: dict[str, Factors] = {}  # updates that adapters begin with
        self.started: Tree = {}  # all that ``start`` was given
        self.base_version = 0  # how often the base has changed
        self._frozen: dict[tuple[str, str], Tensor] = {}  # leaves that no training moves, as last loaded

    @classmethod
    def attach(
        cls,
        network: nn.Module,
        adapter: Adapter,
        targets: Sequence[str] | str | None = None,
        head: Sequence[str] | None = None,
        precision: Precision = "float32",
        device: str | torch.device = "cpu",
        overlay: bool | None = None,
    ) -> "Model":
        """Freezes ``network``, wraps the target weights and frees the head.

        ``precision="bf16"`` keeps the frozen weights in bfloat16; leaves are float32 in every precision. ``overlay``
        keeps base updates beside the base weights instead of in them, for a base that is quantised or shared with
        others; None: where the weights are multiplied in bfloat16. Raises ``ValueError`` where a pattern matches
        nothing, or a weight is named as both.
        """
        whole = trained_in_full(network, head)
        chosen = adapted(network, targets, whole)
        both = sorted(set(chosen) & set(whole))
        if both:
            raise ValueError(f"{both[0]!r} is named in model.targets and in model.head; name it in one of them.")
        packed = getattr(network, "is_quantized", False)  # its weights are packed, and on the device that reads them
        fixed = (
            next((path for path, x in whole.items() if not next(x.parameters(recurse=False)).is_floating_point()), None)
            if packed
            else None
        )
        if fixed is not None:
            raise ValueError(f"model.head names {fixed!r}, which is quantised and cannot be trained; leave it out.")
        network.requires_grad_(False)
        if precision == "bf16":
            _halved(network) if packed else network.to(torch.bfloat16)
        for module in whole.values():
            module.float()
        parts = {path: Part(_wrap(network, path, module, adapter), adapter) for path, module in chosen.items()}
        parts |= {path: Part(module, Dense(_names(module))) for path, module in whole.items()}
        if not packed:
            network.to(device)
        return cls(network, parts, precision, torch.device(device), overlay)

    def rules(self, method: Method, heads: Callable[[Dense], Method]) -> Rules:
        """The run's method for adapted weights; ``heads(dense)`` makes the rule of a part trained in full."""
        made: dict[Dense, Method] = {}
        return {
            path: made.setdefault(part.adapter, heads(part.adapter)) if isinstance(part.adapter, Dense) else method
            for path, part in self.parts.items()
        }

    def initial(self, seed: int) -> Tree:
        """What every party holds before the first round: made from the seed, so it never crosses the wire."""
        tree: dict[str, Layer] = {}
        # What weights have in common (VeRA's pair) stays one tensor on a GPU, too; held while their ids are keys.
        moved: dict[int, tuple[Tensor, Tensor]] = {}
        for path, part in self.parts.items():
            if isinstance(part.module, Adapted):
                m, n = shape(part.module.base)
                leaves = part.adapter.init(m, n, derive_seed(seed, "adapter", path))
                if path in self._started:
                    leaves = part.adapter.around(self._started[path], leaves)
                for x in leaves.values():
                    if id(x) not in moved:
                        moved[id(x)] = x, x.to(self.device)
                tree[path] = {leaf: moved[id(x)][1] for leaf, x in leaves.items()}
            else:
                tree[path] = self._initial[path]
        return tree

    def start(self, updates: Mapping[str, Factors], whole: Mapping[str, Layer]) -> None:
        """Lets ``initial`` begin at known updates of weights and at known leaves of parts trained in full.

        ``ValueError`` where a part is unknown here or has another size.
        """
        sizes = {p: shape(part.module.base) for p, part in self.parts.items() if isinstance(part.module, Adapted)}
        for path, f in updates.items():
            found = (f.U.shape[-2], f.V.shape[-1])
            if sizes.get(path) != found:
                here = f"it is {' x '.join(map(str, sizes[path]))} here" if path in sizes else "it is not adapted here"
                raise ValueError(
                    f"model.start adapts {path!r}, {found[0]} x {found[1]}, but {here}; name another start."
                )
        for path, layer in whole.items():
            own = self._initial.get(path, {})
            if {leaf: x.shape for leaf, x in layer.items()} != {leaf: x.shape for leaf, x in own.items()}:
                raise ValueError(f"model.start holds {path!r}, which has another size or is not trained here; drop it.")
        self._started = dict(updates)
        self.started = {**{path: f._asdict() for path, f in updates.items()}, **whole}
        self._initial |= {path: _copies(layer) for path, layer in whole.items()}

    @torch.no_grad()
    def load(self, tree: Tree) -> None:
        """Sets every leaf of every part. ``ValueError`` where a part or leaf is missing or unknown."""
        if tree.keys() != self.parts.keys():
            raise ValueError(f"cannot load: parts {sorted(tree.keys() ^ self.parts.keys())} are missing or unknown.")
        for path, layer in tree.items():
            part = self.parts[path]
            leaves = part.leaves
            if len(leaves) and layer.keys() != leaves.keys():
                raise ValueError(f"cannot load {path!r}: leaves {sorted(layer.keys() ^ leaves.keys())} do not fit.")
            for leaf, value in layer.items():
                self._set(part, path, leaf, value)

    def _set(self, part: Part, path: str, leaf: str, value: Tensor) -> None:
        moves = leaf in part.adapter.trainable
        if not moves and self._frozen.get((path, leaf)) is value:
            return  # the same object as last time, and nothing here writes to it
        old = part.leaves.get(leaf) if isinstance(part.module, Adapted) else part.leaves[leaf]
        if old is not None and old.shape == value.shape and moves:
            old.copy_(value)
        elif isinstance(part.module, Adapted):  # first load, or a client of another rank
            fresh = value.to(self.device, torch.float32)
            if moves:  # rows in order, whatever the order of the value's: a product's last bits depend on it
                fresh = fresh.clone(memory_format=torch.contiguous_format)
            part.module.leaves[leaf] = nn.Parameter(fresh, requires_grad=False)
            if not moves:
                self._frozen[path, leaf] = value
        else:
            raise ValueError(
                f"cannot load {path!r}: leaf {leaf!r} has shape {tuple(value.shape)}, not {tuple(old.shape)}."
            )

    def read(self) -> Tree:
        """Copies of all leaves, float32."""
        return {path: _copies(part.leaves) for path, part in self.parts.items()}

    @torch.no_grad()
    def fold(self, base_updates: Mapping[str, Sequence[Factors]]) -> None:
        """Adds updates to base weights, or to their overlays; orientation was settled at attachment."""
        self.base_version += 1
        for path, factors in base_updates.items():
            module = self.parts[path].module
            if not isinstance(module, Adapted):
                raise ValueError(f"cannot fold into {path!r}: it is trained in full and has no base weight.")
            update = total([Factors(f.U.to(self.device), f.V.to(self.device)) for f in factors])
            weight = module.base.weight
            if self.overlay or not weight.is_floating_point():
                module.overlay = compact(total([module.overlay, update]) if module.overlay else update)
                continue
            self._pretrained.setdefault(path, weight.detach().clone())
            delta = update.dense().to(weight.dtype)
            weight += delta.mT if isinstance(module.base, Conv1D) else delta

    @torch.no_grad()
    def unfold(self) -> None:
        """The pretrained base again, bit for bit."""
        self.base_version += 1
        for path, part in self.parts.items():
            if isinstance(part.module, Adapted):
                part.module.overlay = None
                if path in self._pretrained:
                    part.module.base.weight.copy_(self._pretrained.pop(path))

    def gradient(self, loss: Callable[[nn.Module], Tensor]) -> Tree:
        """The loss' gradient at the loaded leaves, zero where a leaf has no influence."""
        parameters = self.select({path: part.adapter.trainable for path, part in self.parts.items()})
        with self.running():
            value = loss(self.network)
        grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        tree: dict[str, dict[str, Tensor]] = {path: {} for path in self.parts}
        for ((path, leaf), parameter), grad in zip(parameters.items(), grads, strict=True):
            tree[path][leaf] = torch.zeros_like(parameter) if grad is None else grad
        return tree

    def select(self, trained: Mapping[str, frozenset[str]]) -> dict[tuple[str, str], nn.Parameter]:
        """Lets exactly these leaves require gradients, and returns them in a fixed order."""
        chosen = {}
        for path, part in self.parts.items():
            for leaf, parameter in sorted(part.leaves.items()):
                parameter.requires_grad_(leaf in trained[path])
                if leaf in trained[path]:
                    chosen[path, leaf] = parameter
        return chosen

    def layers(self) -> Tree:
        """The live leaves, for a penalty's gradient; nobody else may hold them."""
        return {path: dict(part.leaves) for path, part in self.parts.items()}

    @contextmanager
    def running(self) -> Iterator[None]:
        """The precision that forward passes run in."""
        mixed = self.precision != "float32"
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext():
            yield


def shape(base: nn.Module) -> tuple[int, int]:
    """``(m, n)``, outputs and inputs, of a ``Linear`` (weight m n, or packed) or ``Conv1D`` (weight n m)."""
    if isinstance(base, Conv1D):
        n, m = base.weight.shape
        return m, n
    return base.out_features, base.in_features


def _halved(network: nn.Module) -> None:
    """What is not quantised, in bfloat16; a quantised network refuses to be cast as a whole."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def _wrap(network: nn.Module, path: str, module: nn.Module, adapter: Adapter) -> Adapted:
    parent, _, name = path.rpartition(".")
    wrapped = Adapted(module, adapter)
    setattr(network.get_submodule(parent), name, wrapped)
    return wrapped


def _names(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in module.named_parameters(recurse=False))


def _copies(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {leaf: x.detach().float().clone() for leaf, x in leaves.items()}
