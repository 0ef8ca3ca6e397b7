"""Checks of PEFT's LoRA settings against lists of the supported ones.

An unlisted setting, such as one of a later PEFT, is accepted with PEFT's default value: PEFT uses the default for older
adapters, so it changes nothing.
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
# The settings of rank and scale, with PEFT's defaults.
SCALE: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "lora_alpha": 8}
ANY = frozenset(  # any value: a finished adapter's update is s B A at the weights that its tensors name
    {
        *SCALE,
        "r",
        *("peft_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config"),
        *("base_model_name_or_path", "revision"),  # compared in fedlora.training.base_model
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("lora_dropout", "fan_in_fan_out", "eva_config"),  # of training, attachment, initialization
        *("megatron_core", "qalora_group_size"),  # of settings that are refused below
    }
)
EQUAL = {  # settings that must be equal in all adapters, with the reason
    "task_type": "the adapters were trained for different tasks",
    "trainable_token_indices": "row by row, their trained embeddings belong to different tokens",
    "ensure_weight_tying": "they share different weights",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # the supported values
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),  # these leave the base unchanged
}
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that change the base
OFF = {  # settings that must be unset, with the reason
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
UNSET: tuple[Any, ...] = (None, False, "", [], {})


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a PEFT folder. Raises ``ValueError`` for a setting that is not supported."""
    settings = _read_json(folder)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{str(folder)!r} holds an adapter of kind {kind!r}; only LORA can be used.")
    for key, value in settings.items():
        reason = unsupported_reason(key, value)
        if reason:
            raise ValueError(f"{str(folder)!r} sets {key}{reason}")
    for key, default in SCALE.items():
        if settings.get(key) is None:
            settings[key] = default
        _check_scale(folder, key, settings[key], default)
    return settings


def compare_settings(first: Path, config: Mapping[str, Any], second: Path, other: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if two adapters have settings with which their tensors cannot be combined."""
    for key, reason in EQUAL.items():
        value, other_value = config.get(key), other.get(key)
        optional = key == "task_type" and not (value and other_value)
        if value != other_value and not optional and not (value in UNSET and other_value in UNSET):
            raise ValueError(
                f"{reason}: {key} is {value!r} in {str(first)!r} and {other_value!r} in {str(second)!r}; combine "
                "adapters that have the same value."
            )


def pattern_for(patterns: Mapping[str, Any], part: str) -> str:
    """Return PEFT's pattern for a weight, the first that matches the end of its path, or else the path."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", part)), part)


def unsupported_reason(key: str, value: Any) -> str | None:
    """Return the end of the message ``... sets KEY`` for an unsupported setting, else None."""
    if key in ANY or key in EQUAL:
        return None
    if key in NEUTRAL:
        plain = value.lower() if isinstance(value, str) else value
        if any(plain is x or (isinstance(x, str) and plain == x) for x in NEUTRAL[key]):
            return None
        if key == "bias":
            return f" to {value!r}: it trains biases, which are no part of a LoRA; train it with bias = 'none'."
        if str(plain).startswith(CHANGING):
            return (
                f" to {value!r} and belongs to a base that PEFT changed; save it for the published base, with "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            )
        return f" to {value!r}, which is not understood and may belong to a base that PEFT changed; train it otherwise."
    if key in OFF:
        return None if _is_off(value, UNSET) else f", which cannot be used: {OFF[key]}."
    if _is_off(value, (_defaults()[key],) if key in _defaults() else UNSET):
        return None
    return (
        f" to {value!r}, a setting of PEFT that is not understood here and may change what the factors mean; train "
        "without it, or merge the adapter with PEFT."
    )


def _is_off(value: Any, off: Sequence[Any]) -> bool:
    return any(type(value) is type(x) and value == x for x in off)


@cache
def _defaults() -> Mapping[str, Any]:
    """Return the installed PEFT's defaults; empty without PEFT."""
    if find_spec("peft") is None:
        return {}
    from peft import LoraConfig

    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(LoraConfig)}


def _read_json(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(_explain_missing(folder)) from error
    except NotADirectoryError as error:
        raise ValueError(f"{str(folder)!r} is a file; name the folder that holds {CONFIG}.") from error
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error.strerror}; check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is no valid JSON: {error}; copy the file again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{str(file)!r} holds no table of settings; copy the file again.")
    return settings


def _explain_missing(folder: Path) -> str:
    inside = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG}"))
    if not inside:
        return f"{str(folder)!r} holds no {CONFIG}; name a folder that PEFT's save_pretrained wrote."
    names = ", ".join(map(repr, inside[:3])) + (f" and {len(inside) - 3} more" if len(inside) > 3 else "")
    advice = "does; name that folder" if len(inside) == 1 else "do; name one of these"
    return f"{str(folder)!r} holds no {CONFIG}, but {names} {advice}."


def _check_scale(folder: Path, key: str, value: Any, default: Any) -> None:
    """Raise ``ValueError`` unless a setting of rank or scale has values that PEFT would write."""
    fits = _is_positive(value) if key == "lora_alpha" else isinstance(value, type(default))
    if not fits or (isinstance(default, dict) and not all(map(_is_positive, value.values()))):
        raise ValueError(
            f"{str(folder / CONFIG)!r} sets {key} to {value!r}, but the rank and the scale must be greater than 0; "
            "copy the file again, or retrain the adapter."
        )
    for pattern in value if isinstance(default, dict) else ():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # "[[a]" may get another meaning in a later Python
                re.compile(pattern)
        except re.error as error:
            file = str(folder / CONFIG)
            raise ValueError(f"{file!r} has {pattern!r} in {key}, which is no pattern: {error}.") from error


def _is_positive(x: Any) -> bool:
    return type(x) in (int, float) and x > 0 and math.isfinite(x)
