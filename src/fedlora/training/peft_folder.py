"""PEFT's adapter folders: read weight by weight, written in PEFT's format, and checked for combination."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.files import Header, RefusedHeaderError, read_header, serialize, write
from fedlora.text import display_safe
from fedlora.training.base_model import BaseModel, is_same_base
from fedlora.training.peft_keys import PREFIX, Keys, read_keys
from fedlora.training.peft_settings import CONFIG, compare_settings, pattern_for, read_settings
from fedlora.types import Layer

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
LABELS = "labels.json"  # the names of the labels, with the keys of transformers' configurations
DIGEST = "base_digest"  # in the metadata of the tensors' file: of the base model's weights
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class AdapterFolder:
    """One finished LoRA: its settings, and its tensors, which are read on access."""

    path: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int, int]]  # part -> m, n, r
    whole: Mapping[str, tuple[int, ...]]  # PEFT's keys of the modules that were trained in full -> shape
    keys: Keys
    dtypes: Mapping[str, torch.dtype]  # key in the file -> dtype
    base: BaseModel
    labels: tuple[str, ...] | None = None  # of its outputs; None: unknown
    device: str | torch.device = "cpu"  # of the tensors

    @classmethod
    def open(cls, path: str | Path) -> "AdapterFolder":
        """Read the settings and the tensors' names. Raises ``ValueError`` if something is not supported."""
        folder = Path(path).expanduser()
        config = read_settings(folder)
        header = _read_header(folder)
        try:
            keys = read_keys(header.tensors)
        except ValueError as error:
            raise ValueError(f"{str(folder)!r} {error}.") from error
        sizes = {key: entry.shape for key, entry in header.tensors.items()}
        dtypes = {key: DTYPES.get(entry.dtype, torch.float32) for key, entry in header.tensors.items()}
        whole = {f"{PREFIX}{path}": sizes[key] for path, key in sorted(keys.whole.items())}
        base = BaseModel.from_config(config, header.metadata.get(DIGEST))
        adapter = cls(folder, config, _read_shapes(folder, keys, sizes), whole, keys, dtypes, base, read_labels(folder))
        for part, (_, _, rank) in adapter.shapes.items():
            setting = adapter._setting("rank_pattern", part, config.get("r", rank))
            if setting != rank:
                raise ValueError(
                    f"{str(folder)!r} holds factors of rank {rank} for {part!r}, and its {CONFIG} says {setting}; "
                    "copy both files again."
                )
        return adapter

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its factors."""
        dtypes = (self.dtypes[key] for leaves in self.keys.factors.values() for key in leaves.values())
        return Counter(dtypes).most_common(1)[0][0]

    def lora(self, part: str) -> LoRA:
        """Return the parametrization of one weight, with its rank and alpha."""
        alpha = float(self._setting("alpha_pattern", part, self.config["lora_alpha"]))
        return LoRA(self.shapes[part][2], alpha, bool(self.config["use_rslora"]))

    def _setting(self, key: str, part: str, default: Any) -> Any:
        """Return the value of a table of patterns for a weight."""
        patterns = self.config[key]
        return patterns.get(pattern_for(patterns, self.keys.paths[part]), default)

    def layer(self, part: str) -> Layer:
        """Return ``A (r n)`` and ``B (m r)`` of one weight, float32."""
        return {leaf: self.factor(part, leaf) for leaf in "AB"}

    def factor(self, part: str, leaf: str) -> Tensor:
        """Return ``A`` or ``B`` of one weight, float32."""
        return self.raw_tensor(self.keys.factors[part][leaf]).to(self.device, torch.float32)

    def parameter(self, key: str) -> Tensor:
        """Return a parameter that was trained in full by PEFT's key, float32."""
        return self.raw_tensor(self.file_key(key)).to(self.device, torch.float32)

    def file_key(self, key: str) -> str:
        """Return the key in the file for PEFT's key."""
        return self.keys.whole[key.removeprefix(PREFIX)]

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Return the modules trained in full: path -> its own parameters."""
        modules: dict[str, dict[str, Tensor]] = {}
        for key in self.whole:
            path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
            modules.setdefault(path, {})[leaf] = self.parameter(key)
        return modules

    def verify(self, part: str, layer: Layer) -> None:
        """Raise ``ValueError`` if a factor of this weight is not finite."""
        for leaf, x in layer.items():
            self.check_finite(self.keys.factors[part][leaf], x)

    def check_finite(self, key: str, x: Tensor) -> Tensor:
        """Return ``x``; raise ``ValueError`` if it is not finite."""
        if not bool(x.isfinite().all()):
            raise ValueError(f"{str(self.path)!r} holds NaN or infinite values in {key!r}; leave this adapter out.")
        return x

    def raw_tensor(self, key: str) -> Tensor:
        """Return one tensor as it is in the file."""
        try:
            # Opened for each tensor, so that the mapped memory is freed with the tensor.
            with safe_open(self.path / WEIGHTS, framework="pt") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(self.path / WEIGHTS)!r} cannot be read: {error}; copy the file again.") from error


def _read_header(folder: Path) -> Header:
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / PICKLE).is_file():
            raise ValueError(
                f"{str(folder)!r} holds {PICKLE}, a pickle, which can run code when it is read; load it with PEFT "
                "if you trust it, and save it anew with save_pretrained(..., safe_serialization=True)."
            )
        raise ValueError(f"{str(folder)!r} holds no {WEIGHTS}; name the folder that PEFT's save_pretrained wrote.")
    try:
        return read_header(file)
    except (RefusedHeaderError, OSError) as error:
        raise ValueError(f"{str(file)!r} cannot be read, it may be cut off: {error}; copy the file again.") from error


def _read_shapes(folder: Path, keys: Keys, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int, int]]:
    """Return ``m, n, r`` of each adapted weight."""
    shapes = {}
    for part, leaves in sorted(keys.factors.items()):
        s = {leaf: sizes[key] for leaf, key in leaves.items()}
        if s.keys() != {"A", "B"} or any(len(x) != 2 for x in s.values()) or s["A"][0] != s["B"][1]:
            raise ValueError(f"{str(folder)!r}: the factors of {part!r} do not fit together: {s}.")
        shapes[part] = (s["B"][0], s["A"][1], s["A"][0])
    if not shapes:
        raise ValueError(f"{str(folder / WEIGHTS)!r} holds no LoRA factors (keys ending in lora_A.weight).")
    return shapes


def read_labels(folder: Path) -> tuple[str, ...] | None:
    """Return the names of an adapter's outputs, in order; None if its folder has none."""
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
    """Write the names of an adapter's outputs, as keyword arguments of ``from_pretrained``."""
    table = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    write(folder / LABELS, (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode())


def save_folder(
    path: Path, like: Mapping[str, Any], layers: Mapping[str, Layer], alphas: Mapping[str, float],
    whole: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32, base_digest: str | None = None,
) -> None:  # fmt: skip
    """Write a PEFT folder. Each of ``layers`` may have its own rank, and has its alpha in ``alphas``.

    ``like`` has the other settings (base model, targets, rsLoRA). Ranks and alphas other than the most common go into
    ``rank_pattern`` and ``alpha_pattern``, by the weight's path. ``base_digest`` is the digest of the base model.
    """
    ranks = {part: layer["A"].shape[0] for part, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        **{key: value for key, value in like.items() if key != "eva_config"},  # without the initialization
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": _to_number(alpha),
        "rank_pattern": {f"^{re.escape(part)}": r for part, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(part)}": _to_number(a) for part, a in alphas.items() if a != alpha},
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


def _to_number(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x


def check_together(adapters: Sequence[AdapterFolder], one_base: bool = False) -> None:
    """Raise ``ValueError`` unless adapters have one base model (or ``one_base``), one task, and the same weights."""
    first = adapters[0]
    _check_labels(adapters)
    for other in adapters[1:]:
        if not one_base:
            _check_base(first, other)
        compare_settings(first.path, first.config, other.path, other.config)
        _check_weights(first, other)


def _check_weights(first: AdapterFolder, other: AdapterFolder) -> None:
    odd = sorted(set(first.shapes) ^ set(other.shapes)) or sorted(set(first.whole) ^ set(other.whole))
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(
            f"{str(first.path)!r} and {str(other.path)!r} do not adapt the same weights; only one of them has "
            f"{', '.join(odd[:3])}{more}."
        )
    pairs = [(p, s[:2], other.shapes[p][:2]) for p, s in first.shapes.items()]
    for part, *both in [*pairs, *((key, s, other.whole[key]) for key, s in first.whole.items())]:
        size, other_size = (" x ".join(map(str, sizes)) for sizes in both)
        if size != other_size:
            raise ValueError(
                f"{part!r} is {size} in {str(first.path)!r} but {other_size} in {str(other.path)!r}; combine adapters "
                "of one model and task."
            )


def _check_base(first: AdapterFolder, other: AdapterFolder) -> None:
    same = is_same_base(first.base, other.base)
    if same is None:
        raise ValueError(
            f"the adapters have different base models: {first.base} in {str(first.path)!r} and {other.base} in "
            f"{str(other.path)!r}; combine adapters of one model, or if these are two names of one, say --same-base."
        )
    if not same:
        raise ValueError(
            f"the adapters have different base models: the weights of {first.base} in {str(first.path)!r} are not "
            f"those of {other.base} in {str(other.path)!r}; combine adapters of one model, or if the files differ "
            "but not the weights, say --same-base."
        )


def _check_labels(adapters: Sequence[AdapterFolder]) -> None:
    labelled = [(a.path, a.labels) for a in adapters if a.labels is not None]
    for path, labels in labelled[1:]:
        first, expected = labelled[0]
        if labels != expected:
            k, *names = next((k, *pair) for k, pair in enumerate(zip_longest(expected, labels)) if pair[0] != pair[1])
            name, other = ("none" if name is None else repr(name) for name in names)
            raise ValueError(
                f"the adapters have different labels: label {k} is {name} in {str(first)!r} and {other} in "
                f"{str(path)!r}; train them with one task.label_names."
            )
