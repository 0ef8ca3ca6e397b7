"""PEFT's adapter folders, read weight by weight and written so that PEFT loads them without fedlora."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.limits import RefusedHeaderError, read_header
from fedlora.state import write
from fedlora.types import Layer

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?P<part>.+)\.lora_(?P<leaf>[AB])\.weight$")
UNREADABLE = {  # settings whose update is not s B A
    "use_dora": "DoRA's magnitudes make the weight no sum of products",
    "lora_bias": "a bias inside the adapter is no part of B A",
    "use_qalora": "QA-LoRA pools the inputs",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "target_parameters": "factors of a parameter that is no module's weight are laid out otherwise",
    "layer_replication": "layers that exist only in the adapter have no weight of the base",
}


@dataclass(frozen=True)
class AdapterFolder:
    """One finished LoRA: its settings and where its tensors lie. Tensors are read when they are asked for."""

    path: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int, int]]  # part -> m, n, r
    whole: Mapping[str, tuple[int, ...]]  # keys of the modules that were trained in full -> shape
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"  # where tensors are put

    @classmethod
    def open(cls, path: str | Path) -> "AdapterFolder":
        """Reads the settings and the tensors' names. ``ValueError`` says in a sentence what cannot be used."""
        folder = Path(path).expanduser()
        config = _settings(folder)
        file = folder / WEIGHTS
        if not file.is_file():
            if (folder / PICKLE).is_file():
                raise ValueError(
                    f"{str(folder)!r} holds {PICKLE}, a pickle, which can run code when it is read; load it with PEFT "
                    "where you trust it, and save it anew with save_pretrained(..., safe_serialization=True)."
                )
            raise ValueError(f"{str(folder)!r} holds no {WEIGHTS}; name the folder that PEFT's save_pretrained wrote.")
        shapes, dtypes = _header(file)
        factors, whole = _sorted(folder, shapes)
        most = Counter(dtypes.values()).most_common(1)[0][0]
        return cls(folder, config, factors, whole, most)

    def lora(self, part: str) -> LoRA:
        """The parametrisation of one weight: its rank and alpha, patterns included."""
        alpha = self.config["alpha_pattern"].get(
            pattern_for(self.config["alpha_pattern"], part), self.config["lora_alpha"]
        )
        return LoRA(self.shapes[part][2], float(alpha), bool(self.config["use_rslora"]))

    def layer(self, part: str) -> Layer:
        """``A (r n)`` and ``B (m r)`` of one weight, float32."""
        return {leaf: self.factor(part, leaf) for leaf in "AB"}

    def factor(self, part: str, leaf: str) -> Tensor:
        """``A`` or ``B`` of one weight, float32."""
        return self.tensor(f"{PREFIX}{part}.lora_{leaf}.weight")

    def modules(self) -> dict[str, Layer]:
        """Modules trained in full: path -> its own parameters."""
        found: dict[str, dict[str, Tensor]] = {}
        for key in self.whole:
            path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
            found.setdefault(path, {})[leaf] = self.tensor(key)
        return found

    def verify(self, part: str, layer: Layer) -> None:
        """``ValueError`` names a factor of this weight that is not finite."""
        for leaf, x in layer.items():
            self.finite(f"{PREFIX}{part}.lora_{leaf}.weight", x)

    def finite(self, key: str, x: Tensor) -> Tensor:
        """``x``, or ``ValueError`` where it is not finite."""
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"{str(self.path)!r} holds values that are NaN or infinite in {key!r}; leave this adapter out."
            )
        return x

    def tensor(self, key: str) -> Tensor:
        """One tensor, float32."""
        try:
            # Opened anew every time: what was mapped is let go with the tensor.
            with safe_open(self.path / WEIGHTS, framework="pt") as file:
                found: Tensor = file.get_tensor(key).to(self.device, torch.float32)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(self.path / WEIGHTS)!r} cannot be read: {error}; copy the file anew.") from error
        return found


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{str(folder)!r} holds no {CONFIG}; name a folder that PEFT's save_pretrained wrote."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(folder / CONFIG)!r} is no valid JSON: {error}; copy the file anew.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(folder / CONFIG)!r} holds no table of settings; copy the file anew.")
    if found.get("peft_type") != "LORA":
        raise ValueError(f"{str(folder)!r} holds an adapter of kind {found.get('peft_type')!r}; only LORA can be used.")
    for key, why in UNREADABLE.items():
        if found.get(key):
            raise ValueError(f"{str(folder)!r} sets {key}, which cannot be used: {why}.")
    start = found.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq")):
        raise ValueError(
            f"{str(folder)!r} belongs to a base that PEFT changed (init_lora_weights = {start!r}); save it for "
            "the published base, with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if found.get("bias", "none") != "none":
        raise ValueError(f"{str(folder)!r} trains biases (bias = {found['bias']!r}), which are no part of a LoRA.")
    defaults: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "lora_alpha": 8}
    found = {**found, **{key: found.get(key) or value for key, value in defaults.items()}}
    for key, value in defaults.items():
        fits = isinstance(found[key], int | float) if key == "lora_alpha" else isinstance(found[key], type(value))
        if not fits or (isinstance(value, dict) and not all(isinstance(x, int | float) for x in found[key].values())):
            raise ValueError(
                f"{str(folder / CONFIG)!r} sets {key} to {found[key]!r}, which PEFT would not; copy it anew."
            )
        for pattern in found[key] if isinstance(value, dict) else ():
            _compiled(folder, key, pattern)
    return found


def _compiled(folder: Path, key: str, pattern: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # "[[a]" may mean something else some day: no fault of it
            re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{str(folder / CONFIG)!r} has {pattern!r} in {key}, which is no pattern: {error}.") from error


def _header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    try:
        found = read_header(file).tensors
    except (RefusedHeaderError, OSError) as error:
        raise ValueError(f"{str(file)!r} cannot be read, it may be cut off: {error}; copy the file anew.") from error
    shapes = {key: entry.shape for key, entry in found.items()}
    return shapes, {key: DTYPES.get(entry.dtype, torch.float32) for key, entry in found.items()}


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _sorted(
    folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, int, int]], tuple[str, ...]]:
    """Factors by the weight they belong to, and the keys and shapes of modules trained in full."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    whole: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        found = FACTOR.match(key.removeprefix(PREFIX))
        if found:
            pairs.setdefault(found["part"], {})[found["leaf"]] = shape
        elif "lora_embedding_" in key:
            raise ValueError(
                f"{str(folder)!r} adapts an embedding ({key!r}): its factors act on rows that are looked up, not on a "
                "product, and cannot be combined here; train it without the embedding."
            )
        elif ".lora_" in key:
            raise ValueError(f"{str(folder)!r} holds {key!r}, which is no part of s B A and cannot be combined.")
        else:
            whole[key] = shape
    for part, leaves in pairs.items():
        if leaves.keys() != {"A", "B"} or any(len(s) != 2 for s in leaves.values()) or leaves["A"][0] != leaves["B"][1]:
            raise ValueError(f"{str(folder)!r}: the factors of {part!r} do not fit together: {leaves}.")
    if not pairs:
        raise ValueError(f"{str(folder / WEIGHTS)!r} holds no LoRA factors (keys ending in lora_A.weight).")
    return {part: (s["B"][0], s["A"][1], s["A"][0]) for part, s in sorted(pairs.items())}, dict(sorted(whole.items()))


def pattern_for(patterns: Mapping[str, Any], part: str) -> str:
    """The pattern that PEFT would apply to a weight: the first that matches its path's end."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", part)), part)


def save_folder(
    path: Path,
    like: Mapping[str, Any],
    layers: Mapping[str, Layer],
    alphas: Mapping[str, float],
    whole: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes an ordinary PEFT folder; ``layers`` may have ranks of their own, ``alphas`` an alpha each.

    ``like`` holds the settings that stay (base model, targets, rsLoRA). Ranks and alphas that are not the most common
    go into ``rank_pattern`` and ``alpha_pattern``, by the weight's whole path.
    """
    ranks = {part: layer["A"].shape[0] for part, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        **like,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {f"^{re.escape(part)}": r for part, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(part)}": _whole(a) for part, a in alphas.items() if a != alpha},
        "inference_mode": True,
        "init_lora_weights": True,  # what is loaded replaces it; a start by SVD of the base would change the base
    }
    tensors = {
        f"{PREFIX}{part}.lora_{leaf}.weight": layer[leaf].to("cpu", dtype).contiguous().clone()
        for part, layer in layers.items()
        for leaf in "AB"
    }
    tensors |= {key: x.cpu().contiguous().clone() for key, x in (whole or {}).items()}
    write(path / WEIGHTS, save(tensors, {"format": "pt"}))
    write(path / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _whole(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x
