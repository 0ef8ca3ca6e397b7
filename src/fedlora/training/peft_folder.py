"""PEFT's adapter folders, read weight by weight and written so that PEFT loads them without fedlora."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.files import Header, RefusedHeaderError, read_header, serialize, write
from fedlora.text import display_safe
from fedlora.training.base_model import Base
from fedlora.training.peft_keys import PREFIX, Keys, read_keys
from fedlora.training.peft_settings import CONFIG, pattern_for, plain_settings, read_settings
from fedlora.types import Layer

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
LABELS = "labels.json"  # what the labels are called, in the words of transformers' configurations
DIGEST = "base_digest"  # in the notes of the tensors' file: of the base model's weights
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class AdapterFolder:
    """One finished LoRA: its settings and where its tensors lie. Tensors are read when they are asked for."""

    path: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int, int]]  # part -> m, n, r
    whole: Mapping[str, tuple[int, ...]]  # PEFT's keys of the modules that were trained in full -> shape
    keys: Keys
    dtypes: Mapping[str, torch.dtype]  # key in the file -> dtype
    base: Base
    labels: tuple[str, ...] | None = None  # what its outputs are called; None where the folder does not say
    device: str | torch.device = "cpu"  # where tensors are put

    @classmethod
    def open(cls, path: str | Path) -> "AdapterFolder":
        """Reads the settings and the tensors' names. ``ValueError`` says in a sentence what cannot be used."""
        folder = Path(path).expanduser()
        config = read_settings(folder)
        header = _header(folder)
        try:
            keys = read_keys(header.tensors)
        except ValueError as error:
            raise ValueError(f"{str(folder)!r} {error}.") from error
        sizes = {key: entry.shape for key, entry in header.tensors.items()}
        dtypes = {key: DTYPES.get(entry.dtype, torch.float32) for key, entry in header.tensors.items()}
        whole = {f"{PREFIX}{path}": sizes[key] for path, key in sorted(keys.whole.items())}
        base = Base.named(config, header.metadata.get(DIGEST))
        found = cls(folder, config, _shapes(folder, keys, sizes), whole, keys, dtypes, base, read_labels(folder))
        found._check_ranks()
        return found

    @property
    def dtype(self) -> torch.dtype:
        """What most of its factors are stored in."""
        found = (self.dtypes[key] for leaves in self.keys.factors.values() for key in leaves.values())
        return Counter(found).most_common(1)[0][0]

    def lora(self, part: str) -> LoRA:
        """The parametrisation of one weight: its rank and alpha, patterns included."""
        return LoRA(
            self.shapes[part][2],
            float(self._set("alpha_pattern", part, self.config["lora_alpha"])),
            bool(self.config["use_rslora"]),
        )

    def _set(self, key: str, part: str, otherwise: Any) -> Any:
        """What a table of patterns says of a weight."""
        patterns = self.config[key]
        return patterns.get(pattern_for(patterns, self.keys.paths[part]), otherwise)

    def _check_ranks(self) -> None:
        """``ValueError`` where the settings give a weight another rank than its factors have."""
        for part, (_, _, rank) in self.shapes.items():
            told = self._set("rank_pattern", part, self.config.get("r", rank))
            if told != rank:
                raise ValueError(
                    f"{str(self.path)!r} holds factors of rank {rank} for {part!r}, and its {CONFIG} says {told}; "
                    "copy both files again."
                )

    def layer(self, part: str) -> Layer:
        """``A (r n)`` and ``B (m r)`` of one weight, float32."""
        return {leaf: self.factor(part, leaf) for leaf in "AB"}

    def factor(self, part: str, leaf: str) -> Tensor:
        """``A`` or ``B`` of one weight, float32."""
        return self.tensor(self.keys.factors[part][leaf])

    def parameter(self, key: str) -> Tensor:
        """A parameter that was trained in full, by PEFT's key for it, float32."""
        return self.tensor(self.where(key))

    def where(self, key: str) -> str:
        """The file's own key for what PEFT has under ``key``."""
        return self.keys.whole[key.removeprefix(PREFIX)]

    def modules(self) -> dict[str, Layer]:
        """Modules trained in full: path -> its own parameters."""
        found: dict[str, dict[str, Tensor]] = {}
        for key in self.whole:
            path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
            found.setdefault(path, {})[leaf] = self.parameter(key)
        return found

    def verify(self, part: str, layer: Layer) -> None:
        """``ValueError`` names a factor of this weight that is not finite."""
        for leaf, x in layer.items():
            self.finite(self.keys.factors[part][leaf], x)

    def finite(self, key: str, x: Tensor) -> Tensor:
        """``x``, or ``ValueError`` where it is not finite."""
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"{str(self.path)!r} holds values that are NaN or infinite in {key!r}; leave this adapter out."
            )
        return x

    def tensor(self, key: str) -> Tensor:
        """One tensor, float32."""
        return self.stored(key).to(self.device, torch.float32)

    def stored(self, key: str) -> Tensor:
        """One tensor as the file has it."""
        try:
            # Opened anew every time: what was mapped is let go with the tensor.
            with safe_open(self.path / WEIGHTS, framework="pt") as file:
                found: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(self.path / WEIGHTS)!r} cannot be read: {error}; copy the file again.") from error
        return found


def _header(folder: Path) -> Header:
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / PICKLE).is_file():
            raise ValueError(
                f"{str(folder)!r} holds {PICKLE}, a pickle, which can run code when it is read; load it with PEFT "
                "where you trust it, and save it anew with save_pretrained(..., safe_serialization=True)."
            )
        raise ValueError(f"{str(folder)!r} holds no {WEIGHTS}; name the folder that PEFT's save_pretrained wrote.")
    try:
        return read_header(file)
    except (RefusedHeaderError, OSError) as error:
        raise ValueError(f"{str(file)!r} cannot be read, it may be cut off: {error}; copy the file again.") from error


def _shapes(folder: Path, keys: Keys, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int, int]]:
    """Each adapted weight's ``m, n, r``."""
    found = {}
    for part, leaves in sorted(keys.factors.items()):
        s = {leaf: sizes[key] for leaf, key in leaves.items()}
        if s.keys() != {"A", "B"} or any(len(x) != 2 for x in s.values()) or s["A"][0] != s["B"][1]:
            raise ValueError(f"{str(folder)!r}: the factors of {part!r} do not fit together: {s}.")
        found[part] = (s["B"][0], s["A"][1], s["A"][0])
    if not found:
        raise ValueError(f"{str(folder / WEIGHTS)!r} holds no LoRA factors (keys ending in lora_A.weight).")
    return found


def read_labels(folder: Path) -> tuple[str, ...] | None:
    """What an adapter's outputs are called, in order; None where its folder does not say."""
    file = folder / LABELS
    if not file.exists():
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["id2label"]
        return tuple(str(names[str(number)]) for number in range(len(names)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{str(file)!r} does not say what the labels are called ({display_safe(error, 100)}); copy it anew, or "
            "remove it."
        ) from error


def save_labels(folder: Path, names: Sequence[str]) -> None:
    """Writes what an adapter's outputs are called, as keyword arguments of ``from_pretrained``."""
    table = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    write(folder / LABELS, (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode())


def save_folder(
    path: Path,
    like: Mapping[str, Any],
    layers: Mapping[str, Layer],
    alphas: Mapping[str, float],
    whole: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    base_digest: str | None = None,
) -> None:
    """Writes an ordinary PEFT folder; ``layers`` may have ranks of their own, ``alphas`` an alpha each.

    ``like`` holds the settings that stay (base model, targets, rsLoRA). Ranks and alphas that are not the most common
    go into ``rank_pattern`` and ``alpha_pattern``, by the weight's whole path. ``base_digest`` says which weights of a
    base model they belong to.
    """
    ranks = {part: layer["A"].shape[0] for part, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        **plain_settings(like),
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {f"^{re.escape(part)}": r for part, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(part)}": _whole(a) for part, a in alphas.items() if a != alpha},
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{part}.lora_{leaf}.weight": layer[leaf].to("cpu", dtype).contiguous().clone()
        for part, layer in layers.items()
        for leaf in "AB"
    }
    tensors |= {key: x.cpu().contiguous().clone() for key, x in (whole or {}).items()}
    notes = {"format": "pt", **({} if base_digest is None else {DIGEST: base_digest})}
    write(path / WEIGHTS, serialize(tensors, notes))
    write(path / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _whole(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x
