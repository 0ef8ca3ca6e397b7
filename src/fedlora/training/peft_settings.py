"""PEFT's LoRA settings: which of them are understood, and which of an adapter's settings are not.

A setting that is not in these lists may be there, as it will be in PEFT's next version, as long as it is left as PEFT
has it by default: PEFT gives an adapter that was written before a setting existed that default, so it changes nothing.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
# What rank and scale come from, with PEFT's defaults.
SCALE: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "lora_alpha": 8}
ANY = frozenset(  # whatever they are, a finished adapter's update is s B A at the weights that its tensors name
    {
        *SCALE,
        "r",
        *("peft_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config"),
        *("base_model_name_or_path", "revision"),  # compared by fedlora.training.base_model
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("lora_dropout", "fan_in_fan_out", "eva_config"),  # of training, of attaching, of the start
        *("megatron_core", "qalora_group_size"),  # of settings that are refused below
    }
)
EQUAL = {  # settings that are understood where all adapters have them alike, and why they must
    "task_type": "the adapters were trained for different tasks",
    "trainable_token_indices": "row by row, their trained embeddings belong to different tokens",
    "ensure_weight_tying": "they share different weights",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # all other values of these are refused
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),  # starts that leave the base
}
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that change the base
OFF = {  # settings that are understood only where they are not set, and why
    "use_dora": "with DoRA's magnitudes the update is not a product of factors",
    "lora_bias": "a bias inside the adapter is no part of B A",
    "use_qalora": "QA-LoRA pools the inputs",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "target_parameters": "factors of a parameter that is no module's weight, such as the stacked experts of a mixture, "
    "have another layout",
    "layer_replication": "layers that exist only in the adapter have no weight of the base",
    "use_bdlora": "block-diagonal factors are stored as their blocks",
    "kasa_config": "KaSA changes the base and puts singular values between B and A",
    "monteclora_config": "its factors are sampled again at every step",
    "velora_config": "it keeps projections beside B and A",
    "arrow_config": "a router chooses between adapters",
    "megatron_config": "factors of parallel layers are split over processes",
    "loftq_config": "LoftQ changes the base",
    "corda_config": "CorDA changes the base",
    "lora_ga_config": "LoRA-GA changes the base",
}
UNSET = (None, False, "", [], {})


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a PEFT folder. ``ValueError`` names a setting that is not understood."""
    found = _parsed(folder)
    if found.get("peft_type") != "LORA":
        raise ValueError(f"{str(folder)!r} holds an adapter of kind {found.get('peft_type')!r}; only LORA can be used.")
    for key, value in found.items():
        why = _why_not(key, value)
        if why:
            raise ValueError(f"{str(folder)!r} sets {key}{why}")
    return _scale(folder, {**found, **{key: _or_default(found.get(key), value) for key, value in SCALE.items()}})


def compare_settings(first: Path, config: Mapping[str, Any], second: Path, other: Mapping[str, Any]) -> None:
    """``ValueError`` where two adapters' settings mean that their tensors do not belong together."""
    for key, why in EQUAL.items():
        here, there = config.get(key), other.get(key)
        said = key != "task_type" or (here and there)  # an adapter need not say its task
        if said and here != there and not (here in UNSET and there in UNSET):
            raise ValueError(
                f"{why}: {key} is {here!r} in {str(first)!r} and {there!r} in {str(second)!r}; combine adapters that "
                "have the same value."
            )


def plain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an adapter that is written anew: as they are, without its start."""
    # What is loaded replaces the start. Left out, PEFT has a setting by default.
    return {**{key: value for key, value in config.items() if key != "eva_config"}, "init_lora_weights": True}


def pattern_for(patterns: Mapping[str, Any], part: str) -> str:
    """The pattern that PEFT would apply to a weight: the first that matches its path's end."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", part)), part)


def _why_not(key: str, value: Any) -> str | None:
    """What to say after ``... sets KEY`` of a setting that cannot be used."""
    if key in ANY or key in EQUAL:
        return None
    if key in NEUTRAL:
        plain = value.lower() if isinstance(value, str) else value
        if any(plain is x or (isinstance(x, str) and plain == x) for x in NEUTRAL[key]):
            return None
        return _refused(key, value, str(plain))
    if key in OFF:
        return None if _is_off(value, UNSET) else f", which cannot be used: {OFF[key]}."
    if _is_off(value, (_defaults()[key],) if key in _defaults() else UNSET):
        return None
    return (
        f" to {value!r}, a setting of PEFT that is not understood here and may change what the factors mean; train "
        "without it, or merge the adapter with PEFT."
    )


def _refused(key: str, value: Any, plain: str) -> str:
    if key == "bias":
        return f" to {value!r}: it trains biases, which are no part of a LoRA; train it with bias = 'none'."
    if plain.startswith(CHANGING):
        return (
            f" to {value!r} and belongs to a base that PEFT changed; save it for the published base, with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    return f" to {value!r}, which is not understood and may belong to a base that PEFT changed; train it otherwise."


def _is_off(value: Any, off: Sequence[Any]) -> bool:
    return any(type(value) is type(x) and value == x for x in off)


@cache
def _defaults() -> Mapping[str, Any]:
    """The installed PEFT's defaults, as its files have them; nothing where it is not installed."""
    if find_spec("peft") is None:
        return {}
    from peft import LoraConfig

    made = ((f.name, f.default if f.default_factory is MISSING else f.default_factory()) for f in fields(LoraConfig))
    return dict(made)


def _parsed(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(_missing(folder)) from error
    except NotADirectoryError as error:
        raise ValueError(f"{str(folder)!r} is a file; name the folder that holds {CONFIG}.") from error
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error.strerror}; check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is no valid JSON: {error}; copy the file again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} holds no table of settings; copy the file again.")
    return found


def _missing(folder: Path) -> str:
    inside = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG}"))
    if len(inside) == 1:
        return f"{str(folder)!r} holds no {CONFIG}, but {inside[0]!r} does; name that folder."
    if inside:
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        some = ", ".join(map(repr, inside[:3]))
        return f"{str(folder)!r} holds no {CONFIG}, but {some}{more} do; name one of these."
    return f"{str(folder)!r} holds no {CONFIG}; name a folder that PEFT's save_pretrained wrote."


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _scale(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """``found``, where all that rank and scale come from is what PEFT would write."""
    for key, value in SCALE.items():
        own = found[key]
        fits = _above_zero(own) if key == "lora_alpha" else isinstance(own, type(value))
        if not fits or (isinstance(value, dict) and not all(_above_zero(x) for x in own.values())):
            raise ValueError(
                f"{str(folder / CONFIG)!r} sets {key} to {own!r}, but the rank and the scale must be greater than 0; "
                "copy the file again, or retrain the adapter."
            )
        for pattern in own if isinstance(value, dict) else ():
            _compiled(folder, key, pattern)
    return found


def _above_zero(x: Any) -> bool:
    return type(x) in (int, float) and x > 0 and math.isfinite(x)


def _compiled(folder: Path, key: str, pattern: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # "[[a]" may mean something else some day: no fault of it
            re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{str(folder / CONFIG)!r} has {pattern!r} in {key}, which is no pattern: {error}.") from error
