"""Base updates in the base of a PEFT model: each is added once, even if the model is used several times."""

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlora.training.parts import add_update
from fedlora.training.peft_keys import PREFIX, strip_wrappers
from fedlora.types import Factors

ATTRIBUTE = "_fedlora_fold"  # of a base layer: the sum of the base updates in it


def find_lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the adapted layers by the part's name."""
    return {
        strip_wrappers(path).removeprefix(PREFIX): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def apply_base_updates(model: nn.Module, base_updates: Mapping[str, Factors]) -> None:
    """Set the base to the pretrained weights plus ``base_updates``, which replace those of an earlier call.

    Weights in float32 or float64 are changed in place. In a lower precision, or quantised, they would lose a small
    update: there, the update is added by a forward hook, and ``merge_and_unload`` does not save it.
    """
    layers = find_lora_layers(model)
    missing = sorted(base_updates.keys() - layers.keys())
    if missing:
        raise ValueError(
            f"the server folds into {missing[0]!r}, which this model does not adapt; make the model with the server's "
            "target_modules."
        )
    for part, layer in layers.items():
        base, new = layer.get_base_layer(), base_updates.get(part)
        old: Factors | None = getattr(base, ATTRIBUTE, None)
        if old is new or (old is not None and new is not None and all(map(torch.equal, old, new))):
            continue
        if new is not None and (new.U.shape[0], new.V.shape[1]) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"the server folds an update of {new.U.shape[0]} x {new.V.shape[1]} into {part!r}, a weight of "
                f"{layer.out_features} x {layer.in_features}; start server and client from one base model."
            )
        _change(base, layer, old, new)
        setattr(base, ATTRIBUTE, new)


@torch.no_grad()
def _change(base: nn.Module, layer: LoraLayer, old: Factors | None, new: Factors | None) -> None:
    weight = getattr(base, "weight", None)  # some quantised layers have none
    if weight is None or weight.dtype not in (torch.float32, torch.float64):
        if not hasattr(base, ATTRIBUTE):
            base.register_forward_hook(_add_base_update)
        return
    for sign, factors in ((-1, old), (1, new)):
        if factors is not None:
            U, V = (x.to(weight) for x in factors)
            # Transposed if the base has its weight as (inputs, outputs), as in GPT-2.
            weight.add_((U @ V).T if layer.fan_in_fan_out else U @ V, alpha=sign)


def _add_base_update(base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return add_update(output, inputs[0], getattr(base, ATTRIBUTE, None))
