"""A model of PEFT as a ``Model``: LoRA and VeRA layers are adapted parts, and ``modules_to_save`` whole parts."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from fedlora.adapters import Adapter, Dense, LoRA, VeRA
from fedlora.training.model import Model
from fedlora.training.parts import Part, PeftLoRAPart, PeftVeRAPart, WholePart, own_parameters
from fedlora.training.peft_keys import PREFIX, strip_wrappers
from fedlora.training.peft_settings import unsupported_reason
from fedlora.training.train_mode import disable_fast_paths

NEEDED = "give what PEFT's get_peft_model returns, or put an adapter on it with fedlora.attach"
VERA_DEFAULTS = (("bias", "none"), ("init_weights", True))
VERA = {  # settings of a VeraConfig that may have any value
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out",
    "modules_to_save", "layers_to_transform", "layers_pattern",
}  # fmt: skip


def attach_peft(model: Any) -> Model:
    """Return a ``PeftModel``, with one active LoRA or VeRA, as a ``Model``. The network itself stays as it is.

    The first leaves are the values that the model has now. Raises ``ValueError`` for an adapter that is not understood:
    another kind, several active adapters, a merged one, a setting that changes what the factors mean, or a trainable
    parameter that belongs to no adapter and to no module of ``modules_to_save``.
    """
    name = active_adapter(model)
    _check_config(model.peft_config[name])
    parts: dict[str, Part] = dict(_find_parts(model, name, main_adapter(model)))
    if not any(part.base is not None for part in parts.values()):
        raise ValueError(f"PEFT's adapter {name!r} has no layer in the model; name target_modules that the model has.")
    _check_trainable(model, parts)
    disable_fast_paths(model)
    first = next(iter(next(iter(parts.values())).leaves.values()))
    low = any(x.dtype in (torch.bfloat16, torch.float16) for x in model.parameters())
    return Model(model, parts, "float32", first.device, overlay=low)


def active_adapter(model: Any, remedy: str = NEEDED) -> str:
    """Return the name of the one active adapter of a ``PeftModel``. ``remedy`` ends the error for another model."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError(f"the model is a {type(model).__name__}; {remedy}.")
    name = model.active_adapter
    if not isinstance(name, str):
        raise ValueError(f"the adapters {name!r} are active at once; call model.set_adapter with one of them.")
    return name


def main_adapter(model: Any) -> Adapter:
    """Return the adapter of a ``PeftModel``'s configuration; single weights may have another rank or scale."""
    config = model.peft_config[active_adapter(model)]
    if kind_of(config) == "VERA":
        return VeRA(config.r, config.d_initial, config.projection_prng_key)
    return LoRA(config.r, float(config.lora_alpha), bool(config.use_rslora))


def read_peft_config(model: Any) -> dict[str, Any]:
    """Return the configuration of a ``PeftModel``'s active adapter, as ``save_pretrained`` writes it; else {}."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return {}
    config = model.peft_config[active_adapter(model)].to_dict()
    base = getattr(model.get_base_model(), "config", None)
    name = config.get("base_model_name_or_path") or getattr(base, "name_or_path", None)
    return {**json.loads(json.dumps(config, default=_to_plain)), "base_model_name_or_path": name or None}


def _to_plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def kind_of(config: Any) -> str:
    """Return PEFT's name of an adapter's kind, such as ``"LORA"``."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def _check_config(config: Any) -> None:
    kind, settings = kind_of(config), config.to_dict()
    if kind == "VERA":
        odd = [key for key, value in settings.items() if key not in VERA and (key, value) not in VERA_DEFAULTS]
        if odd:
            raise ValueError(f"the VeraConfig sets {odd[0]} to {settings[odd[0]]!r}, which is not supported here.")
        return
    if kind != "LORA":
        raise ValueError(
            f"the model has an adapter of PEFT's kind {kind!r}; federated methods are defined for LORA and VERA here, "
            "and for fedlora's own adapters by fedlora.attach."
        )
    for key, value in settings.items():
        if reason := unsupported_reason(key, value):
            raise ValueError(f"the LoraConfig sets {key}{reason}")
    if settings.get("trainable_token_indices"):
        raise ValueError(
            "the LoraConfig sets trainable_token_indices, which no federated method combines; leave it out."
        )


def _find_parts(model: nn.Module, name: str, main: Adapter) -> Iterator[tuple[str, Part]]:
    """Yield the path in the base network and the part of each adapted layer and each module trained in full."""
    for path, module in model.named_modules():
        key = strip_wrappers(path).removeprefix(PREFIX)
        inside = f".modules_to_save.{name}"
        if inside in path:
            if own_parameters(module):
                yield key.replace(inside, ""), WholePart(module, Dense(frozenset(own_parameters(module))))
        elif hasattr(module, "get_base_layer"):
            part = _adapted_part(key, module, name, main)
            if part is not None:
                yield key, part


def _adapted_part(path: str, layer: Any, name: str, main: Adapter) -> Part | None:
    """Return the part of a layer of PEFT, or None if this adapter is not on it."""
    if name in getattr(layer, "lora_embedding_A", ()):
        raise ValueError(
            f"the LoRA adapts an embedding ({path!r}): its factors act on rows that are looked up, not on a product, "
            "and cannot be combined here; leave it out of target_modules."
        )
    if name in getattr(layer, "lora_A", ()):
        A, B = layer.lora_A[name], layer.lora_B[name]
        if not (isinstance(A, nn.Linear) and isinstance(B, nn.Linear)):
            kind = type(layer.get_base_layer()).__name__
            raise ValueError(f"the LoRA adapts {path!r}, a {kind}; only linear layers can be combined here.")
        _check_active(path, layer, name)
        own = replace(cast(LoRA, main), rank=layer.r[name], alpha=float(layer.lora_alpha[name]))
        if own.scale(own.rank) != layer.scaling[name]:
            raise ValueError(
                f"the LoRA on {path!r} has the scale {layer.scaling[name]}, and its configuration says "
                f"{own.scale(own.rank)}; set the scale by lora_alpha and use_rslora."
            )
        return PeftLoRAPart(layer, own, name)
    if name in getattr(layer, "vera_lambda_d", ()):
        _check_active(path, layer, name)
        A, B = layer.vera_A[name][:, : layer.in_features], layer.vera_B[name][: layer.out_features]
        frozen = {leaf: nn.Parameter(x, requires_grad=False) for leaf, x in (("A", A), ("B", B))}
        return PeftVeRAPart(layer, main, name, frozen)
    return None


def _check_active(path: str, layer: Any, name: str) -> None:
    if list(layer.active_adapters) != [name]:
        raise ValueError(
            f"the adapters {', '.join(layer.active_adapters)} are active on {path!r}, and the model trains {name!r}; "
            "call model.set_adapter with one of them."
        )
    if layer.merged or layer.disable_adapters:
        state = "merged into the base" if layer.merged else "disabled"
        raise ValueError(f"the adapter on {path!r} is {state}; call unmerge_adapter() or enable it before training.")


def _check_trainable(model: nn.Module, parts: dict[str, Part]) -> None:
    known = {id(x) for part in parts.values() for x in part.leaves.values()}
    odd = [name for name, x in model.named_parameters() if x.requires_grad and id(x) not in known]
    if odd:
        raise ValueError(
            f"{odd[0]!r} is trainable and belongs to no adapter and to no module of modules_to_save, so its training "
            "would be lost; freeze it, or name its module in modules_to_save."
        )
