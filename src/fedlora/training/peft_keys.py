"""The keys of a PEFT state dict: which weight and which factor, or which module trained in full, each one names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PREFIX = "base_model.model."
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch.compile, FSDP and the like
FACTOR = re.compile(r"^(?P<part>.+)\.lora_(?P<leaf>[AB])(\.(?P<adapter>[^.]+))?\.weight$")
SAVED = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)(?=\.)")


@dataclass(frozen=True)
class Keys:
    """Where the tensors of one adapter lie, under whatever names they were saved."""

    factors: Mapping[str, Mapping[str, str]]  # part -> A and B -> key
    paths: Mapping[str, str]  # part -> the path that PEFT knew the weight by, for its patterns
    whole: Mapping[str, str]  # path of a parameter that was trained in full -> key

    @property
    def renamed(self) -> bool:
        """Whether some weight's path in the network is not the one that PEFT knew it by."""
        return any(part != path for part, path in self.paths.items())


def strip_wrappers(key: str) -> str:
    """A key, or a module's path, without the names that wrappers of a network put into it."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key.removeprefix("module.") if key.startswith(f"module.{PREFIX}") else key


def read_keys(keys: Iterable[str]) -> Keys:
    """What the keys name. ``ValueError`` where one names no factor of a linear layer and no module trained in full."""
    factors: dict[str, dict[str, str]] = {}
    paths, whole, adapters = dict[str, str](), dict[str, str](), dict[str, str]()
    for key in keys:
        path = strip_wrappers(key).removeprefix(PREFIX)
        found = FACTOR.match(path)
        _check(key, path, found)
        if found:
            place, leaf = factors.setdefault(found["part"], {}), found["leaf"]
            paths[found["part"]] = FACTOR.sub(r"\g<part>", key.rpartition(PREFIX)[2])
        else:
            place, leaf = whole, SAVED.sub("", path)
        if leaf in place:
            raise ValueError(f"holds {place[leaf]!r} and {key!r}, two adapters on one weight; save one adapter")
        place[leaf] = key
        name = (found or SAVED.search(path) or {"adapter": None})["adapter"]
        if name:
            adapters.setdefault(name, key)
    if len(adapters) > 1:
        some = " and ".join(map(repr, list(adapters.values())[:2]))
        raise ValueError(f"holds {some}, of two adapters; save one adapter")
    return Keys(factors, paths, whole)


def _check(key: str, path: str, factor: re.Match[str] | None) -> None:
    """``ValueError`` where a key is neither a factor's nor that of a parameter trained in full."""
    if "lora_embedding_" in path:
        raise ValueError(
            f"adapts an embedding ({key!r}): its factors act on rows that are looked up, not on a product, and cannot "
            "be combined here; train it without the embedding"
        )
    if not factor and ".lora_" in f".{path}":
        raise ValueError(f"holds {key!r}, which is no part of s B A and cannot be combined")
    if ".base_layer." in f"{path}." or ".original_module." in path:
        raise ValueError(
            f"holds {key!r}, a weight of the base model; save what PEFT's get_peft_model_state_dict returns"
        )
    if path.startswith("base_model."):
        raise ValueError(f"holds {key!r}, an adapter on an adapted model; merge the inner one, and save the outer one")
