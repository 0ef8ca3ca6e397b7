"""The parts of a network that have leaves: an adapted weight, a weight that PEFT adapts, a module trained in full."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import Adapter
from fedlora.training.sharding import distribute_like, is_sharded
from fedlora.types import Factors

ORIGINAL = "_fedlora_original"  # of an adapted layer: its base before the first update, while there are updates
GUARDED = "_fedlora_guarded"  # of a layer of PEFT: it has the hook that refuses a call without the adapter
OVERLAY = "_fedlora_overlay"  # of a base layer under PEFT: the base updates that are not added to its weight


@dataclass
class Original:
    """A base before its first update."""

    overlay: Factors | None  # of earlier updates: a layer of PEFT may have been merged and adapted again
    weight: Tensor | None = None  # a copy, if updates are added to the weight


class AdaptedLinear(nn.Module):
    """``x ↦ base(x) + x ΔWᵀ`` for one frozen ``Linear`` or ``Conv1D``.

    Without leaves, before the first load, it is its base.
    """

    def __init__(self, base: nn.Module, adapter: Adapter):
        super().__init__()
        self.base: Any = base
        self.adapter = adapter
        self.leaves = nn.ParameterDict()
        self.overlay: Factors | None = None  # base updates that are not added to the base weight

    @property
    def weight(self) -> Tensor:
        """The base weight; T5 reads its dtype."""
        weight: Tensor = self.base.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if len(self.leaves):
            y = y + self.adapter.forward(x, dict(self.leaves.items()))
        return y if self.overlay is None else y + (x @ self.overlay.V.mT) @ self.overlay.U.mT


@dataclass(frozen=True)
class Part(ABC):
    """One part of a network, whose leaves are in ``module``."""

    module: nn.Module
    adapter: Adapter

    from_seed = False  # whether the first leaves are drawn from the run's seed, instead of being the module's own

    @property
    @abstractmethod
    def leaves(self) -> Mapping[str, nn.Parameter]:
        """The leaves by name."""

    @property
    def base(self) -> Any:
        """The linear layer under the adapter; None for a part trained in full."""
        return None

    @property
    def shape(self) -> tuple[int, int] | None:
        """The outputs m and inputs n of the base weight; None for a part trained in full."""
        return None if self.base is None else weight_shape(self.base)

    @property
    def is_transposed(self) -> bool:
        """Whether the base weight is stored as (n, m), as in GPT-2."""
        return isinstance(self.base, Conv1D)

    def replace(self, leaf: str, value: Tensor, device: torch.device) -> None:
        """Set a leaf to its first value, or to one of another shape. Raises ``ValueError`` if the part cannot."""
        old = self.leaves[leaf]
        raise ValueError(f"{leaf!r} has shape {tuple(value.shape)}, not {tuple(old.shape)}.")

    @property
    def overlay(self) -> Factors | None:
        """The base updates that are kept beside the base weight."""
        return None

    @property
    def original(self) -> Original | None:
        """The base before its first update; None if it has no updates."""
        original: Original | None = self.module.__dict__.get(ORIGINAL)
        return original

    def keep_original(self) -> Original:
        """Return the base before its first update, which is now if it has none.

        It is kept with the adapted layer, so another ``Model`` of the same network knows it, too.
        """
        original: Original = self.module.__dict__.setdefault(ORIGINAL, Original(self.overlay))
        return original

    def restore_original(self) -> None:
        """Take all updates back, bit for bit."""
        original: Original | None = self.module.__dict__.pop(ORIGINAL, None)
        if original is None:
            return
        self.set_overlay(original.overlay)
        if original.weight is not None:
            write_value(self.base.weight, original.weight)

    def set_overlay(self, update: Factors | None) -> None:
        """Replace the base updates beside the base weight. Raises ``ValueError`` for a part trained in full."""
        raise ValueError("a part that is trained in full has no base weight.")


@dataclass(frozen=True)
class WholePart(Part):
    """A module trained in full; its parameters are the leaves."""

    @property
    def leaves(self) -> Mapping[str, nn.Parameter]:
        return own_parameters(self.module)


@dataclass(frozen=True)
class AdaptedPart(Part):
    """A weight with an adapter of this library around it."""

    module: AdaptedLinear

    from_seed = True

    @property
    def leaves(self) -> Mapping[str, nn.Parameter]:
        return cast(Mapping[str, nn.Parameter], self.module.leaves)

    @property
    def base(self) -> Any:
        return self.module.base

    def replace(self, leaf: str, value: Tensor, device: torch.device) -> None:
        fresh = value.to(device, torch.float32)
        if leaf in self.adapter.trainable:  # contiguous, because the last bits of a product depend on the memory format
            fresh = fresh.clone(memory_format=torch.contiguous_format)
        self.module.leaves[leaf] = nn.Parameter(fresh, requires_grad=False)

    @property
    def overlay(self) -> Factors | None:
        return self.module.overlay

    def set_overlay(self, update: Factors | None) -> None:
        self.module.overlay = update


@dataclass(frozen=True)
class PeftPart(Part):
    """A weight under a layer of PEFT; ``name`` is the PEFT adapter's name. The first leaves are the layer's own."""

    name: str

    @property
    def base(self) -> Any:
        return cast(Any, self.module).get_base_layer()

    @property
    def shape(self) -> tuple[int, int]:
        layer = cast(Any, self.module)
        return layer.out_features, layer.in_features

    @property
    def is_transposed(self) -> bool:
        return bool(getattr(self.module, "fan_in_fan_out", False))

    def keep_original(self) -> Original:
        if GUARDED not in self.module.__dict__:
            self.module.register_forward_pre_hook(_refuse_bare_call)
            self.module.__dict__[GUARDED] = True
        return super().keep_original()

    @property
    def overlay(self) -> Factors | None:
        return getattr(self.base, OVERLAY, None)

    def set_overlay(self, update: Factors | None) -> None:
        if update is not None and not hasattr(self.base, OVERLAY):
            self.base.register_forward_hook(_add_overlay)
        if update is not None or hasattr(self.base, OVERLAY):
            setattr(self.base, OVERLAY, update)


@dataclass(frozen=True)
class PeftLoRAPart(PeftPart):
    """A weight under PEFT's LoRA: leaves ``A (r n)`` and ``B (m r)``."""

    @property
    def leaves(self) -> Mapping[str, nn.Parameter]:
        layer = cast(Any, self.module)
        return {"A": layer.lora_A[self.name].weight, "B": layer.lora_B[self.name].weight}

    def replace(self, leaf: str, value: Tensor, device: torch.device) -> None:
        """Set a factor of another rank, with the scale of that rank."""
        layer, side = cast(Any, self.module), cast(Any, self.module.get_submodule(f"lora_{leaf}"))[self.name]
        old = side.weight
        # Contiguous, because the last bits of a product depend on the memory format.
        fresh = value.to(old.device, old.dtype).clone(memory_format=torch.contiguous_format)
        side.weight = nn.Parameter(fresh, requires_grad=old.requires_grad)
        rank = value.shape[0 if leaf == "A" else 1]
        side.in_features, side.out_features = side.weight.shape[1], side.weight.shape[0]
        layer.r[self.name], layer.scaling[self.name] = rank, cast(Any, self.adapter).scale(rank)


@dataclass(frozen=True)
class PeftVeRAPart(PeftPart):
    """A weight under PEFT's VeRA: trained ``d (r)`` and ``b (m)``; the frozen pair is cut out of PEFT's buffers."""

    frozen: Mapping[str, nn.Parameter]  # A (r n) and B (m r)

    @property
    def leaves(self) -> Mapping[str, nn.Parameter]:
        layer = cast(Any, self.module)
        return {**self.frozen, "d": layer.vera_lambda_d[self.name], "b": layer.vera_lambda_b[self.name]}

    def replace(self, leaf: str, value: Tensor, device: torch.device) -> None:
        old = self.leaves[leaf]
        if old.shape != value.shape or not torch.equal(old, value.to(old)):
            raise ValueError(
                f"{leaf!r} is not that of PEFT's layer; give all clients one rank and one projection_prng_key."
            )


def _refuse_bare_call(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise ``ValueError`` if a layer is called without its adapter, though its base is not the pretrained one."""
    if ORIGINAL in layer.__dict__ and cast(Any, layer).disable_adapters:
        raise ValueError(
            "the model was called without its adapter, as DPO does for its reference, and the method has added updates "
            "to the base, so this is not the pretrained model; take a method that leaves the base as it is, such as "
            "fedit or fedsa-lora, or give the trainer a ref_model."
        )


def _add_overlay(base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return add_update(output, inputs[0], getattr(base, OVERLAY, None))


def add_update(output: Tensor, x: Tensor, update: Factors | None) -> Tensor:
    """Return ``output + x ΔWᵀ`` for a linear layer, in the dtype of ``output``; ``output`` itself without an update."""
    if update is None:
        return output
    U, V = (factor.to(x.device) for factor in update)
    return output + ((x.to(V.dtype) @ V.mT) @ U.mT).to(output.dtype)


def weight_shape(base: Any) -> tuple[int, int]:
    """Return the outputs m and inputs n of a ``Linear``, which may be packed, or of a ``Conv1D`` (weight n m)."""
    if isinstance(base, Conv1D):
        n, m = base.weight.shape
        return m, n
    return base.out_features, base.in_features


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module itself, without those of its submodules."""
    return dict(module.named_parameters(recurse=False))


def read_value(parameter: Tensor) -> Tensor:
    """Return a float32 copy of a parameter, the full one if it is sharded over processes."""
    return gather_value(parameter).float().clone()


def write_value(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter in place. If it is sharded, every process passes the same full value."""
    parameter.copy_(distribute_like(parameter, value))


def gather_value(parameter: Tensor) -> Tensor:
    """Return the value of a parameter, not copied unless it is sharded over processes."""
    x = parameter.detach()
    return cast(Any, x).full_tensor() if is_sharded(x) else x
