"""A base network with adapted parts, the only mutable object.

The base is loaded once a process and shared by all clients. A client's model is the base plus a ``Tree``. ``load`` sets
every leaf of every part, so nothing of one client is left for the next.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedlora.adapters import Adapter, Dense
from fedlora.linalg.factors import compact, total
from fedlora.methods._base import Method, pick
from fedlora.rounds import Rules
from fedlora.schema import ConfigError
from fedlora.seeds import derive_seed
from fedlora.training.parts import (
    AdaptedLinear,
    AdaptedPart,
    Part,
    WholePart,
    gather_value,
    own_parameters,
    read_value,
    write_value,
)
from fedlora.training.precision import HALF, cast_parameters
from fedlora.training.ranks import synchronize
from fedlora.training.sharding import add_value, is_sharded, reshard
from fedlora.training.targets import find_full_modules, find_targets
from fedlora.training.train_mode import disable_fast_paths
from fedlora.types import Factors, Layer, Tree

Precision = Literal["float32", "bf16-autocast", "bf16"]


class Model:
    """Attach once; then use ``load``, ``read``, ``fold``, ``unfold`` and ``gradient`` only."""

    # Of a model whose network is on other machines only: digests of its base, and its adapter.
    remote_base: Mapping[str, Any] | None = None
    remote_adapter: Adapter | None = None

    def __init__(
        self, network: nn.Module, parts: Mapping[str, Part], precision: Precision, device: torch.device,
        overlay: bool | None = None,
    ):  # fmt: skip
        self.network, self.parts, self.precision, self.device = network, parts, precision, device
        # In bfloat16, also under autocast, rounding would remove most of an update that is small beside the weight.
        self.overlay = precision != "float32" if overlay is None else overlay
        self._initial: dict[str, Layer] = {path: _copy(part) for path, part in parts.items() if not part.from_seed}
        self._started: dict[str, Factors] = {}  # the updates of a warm start
        self.start_tree: Tree = {}  # all arguments of ``start_from``
        self.base_version = 0  # the number of changes of the base
        self._frozen: dict[tuple[str, str], Tensor] = {}  # leaves that are never trained, as last loaded

    @classmethod
    def attach(
        cls, network: nn.Module, adapter: Adapter, targets: Sequence[str] | str | None = None,
        head: Sequence[str] | None = None, precision: Precision = "float32", device: str | torch.device = "cpu",
        overlay: bool | None = None,
    ) -> "Model":  # fmt: skip
        """Freeze ``network``, wrap the target weights and make the head trainable.

        ``precision="bf16"`` keeps the frozen weights in bfloat16; leaves are float32 in every precision. ``overlay``
        keeps base updates beside the base weights, for a base that is quantized or shared; None: only if the weights
        are in half precision or multiplied in it. Raises ``ValueError`` if a pattern matches nothing, or if a weight is
        both target and head.
        """
        whole = find_full_modules(network, head)
        chosen = find_targets(network, targets, whole)
        both = sorted(set(chosen) & set(whole))
        if both:
            raise ConfigError(f"{both[0]!r} is named in model.targets and in model.head; name it in one of them.")
        quantized = getattr(network, "is_quantized", False)
        for path, module in whole.items() if quantized else ():
            if not next(module.parameters(recurse=False)).is_floating_point():
                raise ValueError(f"model.head names {path!r}, which is quantised and cannot be trained; leave it out.")
        disable_fast_paths(network)
        network.requires_grad_(False)
        if overlay is None and any(x.dtype in HALF for x in network.parameters()):
            overlay = True
        if precision == "bf16":
            cast_parameters(network, torch.bfloat16)
        for module in whole.values():
            module.float()
        parts: dict[str, Part] = {p: AdaptedPart(AdaptedLinear(x, adapter), adapter) for p, x in chosen.items()}
        for path, part in parts.items():
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, part.module)
        parts |= {path: WholePart(module, Dense(frozenset(own_parameters(module)))) for path, module in whole.items()}
        if not quantized:  # quantized weights are on their device
            network.to(device)
        return cls(network, parts, precision, torch.device(device), overlay)

    def rules(self, method: Method, heads: Callable[[Dense], Method]) -> Rules:
        """Return the rule of each part: ``method`` for adapted weights, ``heads(dense)`` for parts trained in full.

        A weight whose adapter has other settings than the method's, such as another rank, has a rule of its own.
        """
        rules: dict[Adapter, Method] = {method.adapter: method}
        for part in self.parts.values():
            if part.adapter not in rules:
                own = part.adapter
                rules[own] = heads(own) if isinstance(own, Dense) else replace(method, adapter=own)
        return {path: rules[part.adapter] for path, part in self.parts.items()}

    def initial(self, seed: int) -> Tree:
        """Return the tree before the first round.

        Adapters of this library are drawn from the seed; every client draws the same leaves. Parts trained in full, and
        those of a PEFT model, begin with the values that they had when the model was attached.
        """
        tree: dict[str, Layer] = {}
        # Tensors that several weights share (VeRA's pair) stay shared on a GPU. The originals are kept with their ids.
        moved: dict[int, tuple[Tensor, Tensor]] = {}
        for path, part in self.parts.items():
            if part.shape is None or not part.from_seed:
                tree[path] = self._initial[path]
                continue
            leaves: Layer = part.adapter.init(*part.shape, derive_seed(seed, "adapter", path))
            if path in self._started:
                leaves = part.adapter.around(self._started[path], leaves)
            for x in leaves.values():
                if id(x) not in moved:
                    moved[id(x)] = x, x.to(self.device)
            tree[path] = {leaf: moved[id(x)][1] for leaf, x in leaves.items()}
        return tree

    def start_from(self, updates: Mapping[str, Factors], whole: Mapping[str, Layer]) -> None:
        """Make ``initial`` return these updates of weights, and leaves of parts trained in full."""
        for path, f in updates.items():
            part, (m, n) = self.parts.get(path), (f.U.shape[-2], f.V.shape[-1])
            size = part.shape if part else None
            if size != (m, n):
                here = f"it is {size[0]} x {size[1]} here" if size else "it is not adapted here"
                raise ValueError(f"model.start adapts {path!r}, {m} x {n}, but {here}; name another start.")
        for path, layer in whole.items():
            leaves = self._initial.get(path, {})
            if {leaf: x.shape for leaf, x in layer.items()} != {leaf: x.shape for leaf, x in leaves.items()}:
                raise ValueError(f"model.start holds {path!r}, which has another size or is not trained here; drop it.")
        self._started = dict(updates)
        self.start_tree = {**{path: f._asdict() for path, f in updates.items()}, **whole}
        self._initial |= {path: {leaf: read_value(x) for leaf, x in layer.items()} for path, layer in whole.items()}

    def check_start(self) -> None:
        """Raise ``ValueError`` if the adapter cannot be drawn for a weight of the model, before anything is written."""
        for adapter, shape in {(x.adapter, x.shape) for x in self.parts.values() if x.from_seed}:
            if shape is not None:
                adapter.init(*shape, 0)

    @property
    def first_leaves(self) -> Tree:
        """The first values of all leaves that no seed determines: of a PEFT model, and of parts trained in full."""
        return dict(self._initial)

    @property
    def own_start(self) -> Tree:
        """The first values of a PEFT model's trainable leaves, which no seed determines; empty for other models."""
        is_peft = any(not part.from_seed and part.shape is not None for part in self.parts.values())
        return self.trainable_start if is_peft else {}

    @property
    def trainable_start(self) -> Tree:
        """The trainable leaves of ``first_leaves``, for ``start_at`` of another process."""
        return {path: pick(x, set(x) & self.parts[path].adapter.trainable) for path, x in self._initial.items()}

    def synchronize(self) -> None:
        """Let all processes that train together begin with the first one's values."""
        synchronize(self.trainable_start)

    def start_at(self, tree: Tree) -> None:
        """Replace ``trainable_start``, by that of another process. Raises ``ValueError`` if it is of another model."""
        mine = {(path, leaf): x.shape for path, layer in self.trainable_start.items() for leaf, x in layer.items()}
        theirs = {(path, leaf): x.shape for path, layer in tree.items() for leaf, x in layer.items()}
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                found = [x if x is None else tuple(x) for x in (mine.get(key), theirs.get(key))]
                raise ValueError(
                    f"{'.'.join(key)!r} is {found[0]} in this model and {found[1]} in the run's; make the model with "
                    "the adapter configuration that the run began with."
                )
        for path, layer in tree.items():
            self._initial[path] = {**self._initial[path], **{leaf: x.to(self.device) for leaf, x in layer.items()}}

    @torch.no_grad()
    def load(self, tree: Tree) -> None:
        """Set every leaf of every part. Raises ``ValueError`` if a part or leaf is missing or unknown."""
        reshard(self.network)
        if tree.keys() != self.parts.keys():
            raise ValueError(f"cannot load: parts {sorted(tree.keys() ^ self.parts.keys())} are missing or unknown.")
        for path, layer in sorted(tree.items()):
            part, leaves = self.parts[path], self.parts[path].leaves
            if len(leaves) and layer.keys() != leaves.keys():
                raise ValueError(f"cannot load {path!r}: leaves {sorted(layer.keys() ^ leaves.keys())} do not fit.")
            for leaf, value in sorted(layer.items()):  # in one order, because processes set sharded leaves together
                self._set(part, path, leaf, value)

    def _set(self, part: Part, path: str, leaf: str, value: Tensor) -> None:
        trainable = leaf in part.adapter.trainable
        if not trainable and self._frozen.get((path, leaf)) is value:
            return  # already loaded, and nothing writes to it
        old = part.leaves.get(leaf)
        if old is not None and old.shape == value.shape and (trainable or is_sharded(old)):
            write_value(old, value)
            if not trainable:
                self._frozen[path, leaf] = value
            return
        if old is not None and is_sharded(old):
            raise ValueError(
                f"cannot load {path!r}: {leaf!r} has shape {tuple(value.shape)}, not {tuple(old.shape)}, and a weight "
                "that is divided over processes keeps its shape; give all clients one rank, or use DDP."
            )
        try:
            part.replace(leaf, value, self.device)  # first load, or a client of another rank
        except ValueError as error:
            raise ValueError(f"cannot load {path!r}: {error}") from error
        if not trainable:
            self._frozen[path, leaf] = value

    def read(self) -> Tree:
        """Return all leaves, float32; those that training may change are copies."""
        reshard(self.network)
        return {path: _copy(part, self.device) for path, part in self.parts.items()}

    @torch.no_grad()
    def find_other_weight(self, network: nn.Module) -> str | None:
        """Return the name of a frozen weight of another network that differs from this one's, before base updates.

        None if all are equal. Weights on the same tensor are not compared value by value.
        """
        reshard(self.network)
        leaves = {id(x) for part in self.parts.values() for x in part.leaves.values()}
        originals = [(part.base, part.original) for part in self.parts.values() if part.original is not None]
        before = {id(base.weight): x.weight for base, x in originals if x.weight is not None}
        others = dict(network.named_parameters())
        for name, x in self.network.named_parameters():
            other = others.get(name)
            if id(x) in leaves or (other is not None and other.data_ptr() == x.data_ptr() and not is_sharded(x)):
                continue
            if other is None or not _is_equal(gather_value(before.get(id(x), x)), gather_value(other)):
                return name
        return None

    @torch.no_grad()
    def fold(self, base_updates: Mapping[str, Sequence[Factors]]) -> None:
        """Add updates to base weights, or to their overlays."""
        self.base_version += 1
        reshard(self.network)
        for path, factors in sorted(base_updates.items()):
            part = self.parts[path]
            if part.base is None:
                raise ValueError(f"cannot fold into {path!r}: it is trained in full and has no base weight.")
            original = part.keep_original()
            update = total([Factors(f.U.to(self.device), f.V.to(self.device)) for f in factors])
            weight = getattr(part.base, "weight", None)  # some quantised layers have none
            if self.overlay or weight is None or not weight.is_floating_point():
                part.set_overlay(compact(total([part.overlay, update]) if part.overlay else update))
                continue
            if original.weight is None:
                original.weight = weight.detach().clone()
            delta = update.dense().mT if part.is_transposed else update.dense()
            if weight.dtype in (torch.float32, torch.float64):
                add_value(weight, delta.to(weight.dtype))
            else:  # the sum is rounded once
                write_value(weight, gather_value(weight).float() + delta)

    @torch.no_grad()
    def unfold(self) -> None:
        """Restore the pretrained base, bit for bit."""
        self.base_version += 1
        reshard(self.network)
        for part in self.parts.values():
            part.restore_original()

    def reset(self, seed: int) -> None:
        """Restore the pretrained base and the first leaves, all of which require gradients."""
        self.unfold()
        self.load(self.initial(seed))
        self.select({path: part.adapter.trainable for path, part in self.parts.items()})

    def gradient(self, loss: Callable[[nn.Module], Tensor]) -> Tree:
        """Return the gradient of a loss at the loaded leaves; zero for a leaf without influence."""
        parameters = self.select({path: part.adapter.trainable for path, part in self.parts.items()})
        with self.running():
            value = loss(self.network)
        tree: dict[str, dict[str, Tensor]] = {path: {} for path in self.parts}
        for ((path, leaf), parameter), grad in zip(parameters.items(), self._gradients(value, parameters), strict=True):
            tree[path][leaf] = torch.zeros(parameter.shape, device=self.device) if grad is None else grad
        return tree

    def _gradients(self, loss: Tensor, parameters: Mapping[Any, nn.Parameter]) -> Sequence[Tensor | None]:
        if not any(map(is_sharded, parameters.values())):
            return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        # FSDP2 gives gradients to sharded parameters in hooks of backward(), as their means over the processes.
        loss.backward()
        reshard(self.network)
        grads = [None if x.grad is None else gather_value(x.grad).to(self.device) for x in parameters.values()]
        for x in parameters.values():
            x.grad = None
        return grads

    def select(self, trained: Mapping[str, frozenset[str]]) -> dict[tuple[str, str], nn.Parameter]:
        """Make exactly these leaves require gradients, and return them in a fixed order."""
        reshard(self.network)
        chosen = {}
        for path, part in self.parts.items():
            for leaf, parameter in sorted(part.leaves.items()):
                parameter.requires_grad_(leaf in trained[path])
                if leaf in trained[path]:
                    chosen[path, leaf] = parameter
        return chosen

    def layers(self) -> Tree:
        """Return the parameters themselves, for the gradient of a penalty; keep no reference to them."""
        return {path: dict(part.leaves) for path, part in self.parts.items()}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run forward passes in the model's precision."""
        mixed = self.precision != "float32"
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext():
            yield


def _is_equal(x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape and x.dtype == other.dtype and torch.equal(x, other.to(x.device))


def _copy(part: Part, device: torch.device | None = None) -> dict[str, Tensor]:
    trainable = part.adapter.trainable
    values = {leaf: read_value(x) if leaf in trainable else gather_value(x) for leaf, x in part.leaves.items()}
    return values if device is None else {leaf: x.to(device) for leaf, x in values.items()}
