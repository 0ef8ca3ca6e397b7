"""PEFT's state dict as a tree of parts and leaves in float32, and a tree as a state dict."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.training.peft_keys import read_keys
from fedlora.types import Tree

Value = Tensor | np.ndarray[Any, Any]  # of a state dict


def parse_keys(keys: Iterable[str]) -> tuple[dict[tuple[str, str], str], frozenset[str]]:
    """Return (part, leaf) -> key in the given order, and the parts that have LoRA factors.

    Raises ``ValueError`` for keys that cannot be combined or occur twice.
    """
    keys = list(keys)
    try:
        parsed = read_keys(keys)
    except ValueError as error:
        raise ValueError(f"the adapter {error}.") from error
    names = {key: (part, leaf) for part, pair in parsed.factors.items() for leaf, key in pair.items()}
    for path, key in parsed.whole.items():
        part, _, leaf = path.rpartition(".")
        names[key] = (part, leaf)
    return {names[key]: key for key in keys}, frozenset(parsed.factors)


@dataclass(frozen=True)
class PeftState:
    """A model's PEFT state dict: float32 leaves by part, the parts with factors, and the original keys."""

    tree: Tree  # part -> A (r n) and B (m r), or the parameters of a module trained in full
    adapted: frozenset[str]
    keys: Mapping[tuple[str, str], str]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "PeftState":
        """Build from a state dict. Raises ``ValueError`` for a key that cannot be combined."""
        keys, adapted = parse_keys(tensors)
        tree: dict[str, dict[str, Tensor]] = {}
        for (part, leaf), key in keys.items():
            tree.setdefault(part, {})[leaf] = tensors[key].detach().to("cpu", torch.float32)
        for part in adapted:
            shapes = {leaf: tuple(x.shape) for leaf, x in sorted(tree[part].items())}
            is_pair = shapes.keys() == {"A", "B"} and all(len(shape) == 2 for shape in shapes.values())
            if not is_pair or shapes["A"][0] != shapes["B"][1]:
                raise ValueError(
                    f"the factors of {part!r} do not fit together, found {shapes}; needed are A (r, n) and B (m, r) of "
                    "one linear layer."
                )
        if not adapted:
            raise ValueError(
                "the arrays hold no LoRA factors (keys ending in lora_A.weight); send what PEFT's "
                "get_peft_model_state_dict returns."
            )
        return cls(tree, adapted, keys)

    def ranks(self) -> dict[str, int]:
        """Return each adapted part's rank."""
        return {part: self.tree[part]["A"].shape[0] for part in self.adapted}

    def to_state_dict(self, tree: Tree, like: Mapping[str, Value]) -> dict[str, Value]:
        """Return a tree with these parts as a state dict, each value in the type, precision and device of ``like``.

        ``like`` is the state dict that this state was built from. Leaves that are those of this state are its values,
        with the same bits. Raises ``ValueError`` if a number is too large for its precision.
        """
        return {
            key: like[key] if tree[part][leaf] is self.tree[part][leaf] else _cast(key, tree[part][leaf], like[key])
            for (part, leaf), key in self.keys.items()
        }


def to_float32(key: str, value: Any) -> Tensor:
    """Return a value of a state dict as float32 on the CPU.

    Raises ``ValueError`` if it is no tensor or numpy array of floats, or is not finite.
    """
    if not isinstance(value, Tensor | np.ndarray):
        raise ValueError(f"{key!r} holds a {type(value).__name__} where a tensor or a numpy array is needed")
    if isinstance(value, Tensor):
        x = value.detach().to("cpu", torch.float32) if value.is_floating_point() else None
    else:
        x = torch.from_numpy(np.array(value, dtype=np.float32)) if value.dtype.kind == "f" else None
    if x is None:
        raise ValueError(f"{key!r} holds {value.dtype} where floats are needed")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{key!r} holds values that are NaN or infinite")
    return x


def _cast(key: str, x: Tensor, like: Value) -> Value:
    value: Value
    if isinstance(like, Tensor):
        value = x.contiguous().to(like)
        finite = bool(value.isfinite().all())
    else:
        with np.errstate(over="ignore"):
            value = x.contiguous().numpy().astype(like.dtype)
        finite = bool(np.isfinite(value).all())
    if not finite:
        raise ValueError(f"{key!r} is too large for {like.dtype}; send the adapter in float32.")
    return value
