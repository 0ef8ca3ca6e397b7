"""The keys of a PEFT state dict: the weight and factor, or the module trained in full, that each key names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PREFIX = "base_model.model."
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch.compile, FSDP and others
FACTOR = re.compile(r"^(?P<part>.+)\.lora_(?P<leaf>[AB])(\.(?P<adapter>[^.]+))?\.weight$")
SAVED = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)(?=\.)")


@dataclass(frozen=True)
class Keys:
    """The keys of one adapter's tensors."""

    factors: Mapping[str, Mapping[str, str]]  # part -> A and B -> key
    paths: Mapping[str, str]  # part -> the path in PEFT's network, for its patterns
    whole: Mapping[str, str]  # path of a parameter that was trained in full -> key


def strip_wrappers(key: str) -> str:
    """Return a key, or a module's path, without the names of network wrappers."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key.removeprefix("module.") if key.startswith(f"module.{PREFIX}") else key


def read_keys(keys: Iterable[str]) -> Keys:
    """Parse keys. Raises ``ValueError`` if one is neither a linear layer's factor nor a module trained in full."""
    factors: dict[str, dict[str, str]] = {}
    paths, whole, adapters = dict[str, str](), dict[str, str](), dict[str, str]()
    for key in keys:
        path = strip_wrappers(key).removeprefix(PREFIX)
        factor = FACTOR.match(path)
        _check(key, path, factor)
        if factor:
            table, leaf = factors.setdefault(factor["part"], {}), factor["leaf"]
            paths[factor["part"]] = FACTOR.sub(r"\g<part>", key.rpartition(PREFIX)[2])
        else:
            table, leaf = whole, SAVED.sub("", path)
        if leaf in table:
            raise ValueError(f"holds {table[leaf]!r} and {key!r}, two adapters on one weight; save one adapter")
        table[leaf] = key
        name = (factor or SAVED.search(path) or {"adapter": None})["adapter"]
        if name:
            adapters.setdefault(name, key)
    if len(adapters) > 1:
        examples = " and ".join(map(repr, list(adapters.values())[:2]))
        raise ValueError(f"holds {examples}, of two adapters; save one adapter")
    return Keys(factors, paths, whole)


def _check(key: str, path: str, factor: re.Match[str] | None) -> None:
    if "lora_embedding_" in path:
        raise ValueError(
            f"adapts an embedding ({key!r}): its factors act on rows that are looked up, not on a product, and cannot "
            "be combined here; train it without the embedding"
        )
    if not factor and ".lora_" in f".{path}":
        raise ValueError(f"holds {key!r}, which is no part of s B A and cannot be combined")
    if ".base_layer." in f"{path}." or ".original_module." in path:
        raise ValueError(f"holds {key!r}, a base model's weight; save the result of PEFT's get_peft_model_state_dict")
    if path.startswith("base_model."):
        raise ValueError(f"holds {key!r}, an adapter on an adapted model; merge the inner one, and save the outer one")
