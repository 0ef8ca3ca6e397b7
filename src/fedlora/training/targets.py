"""Which modules of a network are adapted, and which are trained in full: by name, settled once at attachment."""

import difflib
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

# Query and value projections, as the families call them; the first line whose names all occur is taken.
# BERT RoBERTa ELECTRA ViT DeiT | Llama Mistral Qwen (newer ViT DeiT Swin) | DistilBERT | DeBERTa | GPT-2 (fused) |
# GPT-NeoX Pythia BLOOM Falcon (fused) | Phi-3 (fused) | MPT (fused) | T5
# and where there is no attention: ConvNeXt's pointwise layers
USUAL = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("q", "v"),
    ("pwconv1", "pwconv2"),
)


ALL = "all-linear"  # PEFT's word


def matches(path: str, pattern: str) -> bool:
    """Whether a module's path is named: in full, by its last names (``attention.query``), or with ``*``."""
    return path == pattern or path.endswith("." + pattern) or fnmatch.fnmatchcase(path, pattern)


def adapted(
    network: nn.Module, patterns: Sequence[str] | str | None, whole: Collection[str] = ()
) -> dict[str, nn.Module]:
    """Path -> ``Linear`` or ``Conv1D`` of every adapted weight, in the network's order.

    ``None`` takes the family's query and value projections; a list has patterns of names. One text is read as PEFT
    reads it: ``all-linear`` for every linear layer but the outputs', or a regular expression of whole paths; both leave
    out the modules of ``whole``, which are trained in full. ``ValueError`` names a pattern that matches nothing.
    """
    weights = {path: module for path, module in network.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if isinstance(patterns, str):
        found = _by_text(network, patterns, {path: x for path, x in weights.items() if path not in whole})
    else:
        names = _usual(weights) if patterns is None else patterns
        for pattern in names:
            if not any(matches(path, pattern) for path in weights):
                raise ValueError(_unmatched(network, "model.targets", pattern, list(weights)))
        found = {path: module for path, module in weights.items() if any(matches(path, p) for p in names)}
    _untied(network, found, "model.targets")
    return found


def _by_text(network: nn.Module, text: str, weights: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    if text.lower() == ALL:
        outside = _outputs(network)
        return {path: x for path, x in weights.items() if not any(f"{path}.".startswith(f"{o}.") for o in outside)}
    try:
        found = {path: module for path, module in weights.items() if re.fullmatch(text, path)}
    except re.error as error:
        raise ValueError(
            f"model.targets is {text!r}, not a valid regular expression ({error}); give {ALL!r}, a regular expression "
            "of whole paths, or a list of names."
        ) from error
    if not found:
        said = _unmatched(network, "model.targets", text, list(weights))
        raise ValueError(f"{said[:-1]}; one text is a regular expression of whole paths, and names go into a list.")
    return found


def _outputs(network: nn.Module) -> list[str]:
    """What ``all-linear`` leaves out: the output layer of a language model, and what a task put on top."""
    given = getattr(network, "get_output_embeddings", lambda: None)()
    own = [path for path, module in network.named_modules() if given is not None and module is given]
    body = getattr(network, "base_model_prefix", "")
    return own + (fresh(network) if body and hasattr(network, body) else [])


def trained_in_full(network: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """Path -> module of every part trained in full: those at or below ``patterns`` that hold parameters themselves.

    ``None`` takes what a task put on top of the pretrained network (``classifier``, ``score``, ...), and what else was
    drawn anew because the checkpoint lacks it.
    """
    paths = [path for path, _ in network.named_modules() if path]
    if patterns is None:
        patterns = fresh(network)
    else:
        for pattern in patterns:
            if not any(matches(path, pattern) for path in paths):
                raise ValueError(_unmatched(network, "model.head", pattern, paths))
    roots = [path for path in paths if any(matches(path, pattern) for pattern in patterns)]
    found = {
        path: module
        for path, module in network.named_modules()
        if any(path == root or path.startswith(root + ".") for root in roots)
        and next(module.parameters(recurse=False), None) is not None
    }
    _untied(network, found, "model.head")
    return found


def fresh(network: nn.Module) -> list[str]:
    """Paths of what a task put on top of the pretrained network, and of what else its checkpoint lacks."""
    body = getattr(network, "base_model_prefix", "")
    on_top = [name for name, _ in network.named_children() if name != body]
    return [*getattr(network, "put_on_top", on_top), *getattr(network, "drawn_anew", [])]


def _untied(network: nn.Module, chosen: Mapping[str, nn.Module], key: str) -> None:
    """``ValueError`` where a chosen weight is another module's as well: to change one would change both."""
    owners: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for path, module in chosen.items():
        others = [o for p in module.parameters(recurse=False) for o in owners.get(id(p), []) if o != path]
        if others:
            raise ValueError(f"{key} names {path!r}, whose weight is also that of {others[0]!r} (tied); leave it out.")


def _usual(weights: dict[str, nn.Module]) -> Sequence[str]:
    for names in USUAL:
        if all(any(matches(path, name) for path in weights) for name in names):
            return names
    raise ValueError(
        "this network has none of the usual query and value projections; set model.targets to some of its linear "
        f"layers: {_sample(list(weights))}."
    )


def _unmatched(network: nn.Module, key: str, pattern: str, paths: Sequence[str]) -> str:
    """Why a pattern names nothing, and what does: names, one whole path, and a pattern of its like."""
    names = _names(paths)
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    near = near or difflib.get_close_matches(pattern.rsplit(".", 1)[-1], names, n=3, cutoff=0.3) or list(names)[:8]
    if not near:
        return f"{key} has {pattern!r}, but this network has no linear layer at all."
    path = names[near[0]]
    alike = ".".join("*" if name.isdigit() else name for name in path.split("."))
    more = f", and the pattern {alike!r} matches all of them" if alike != path else ""
    why = (_other_kind(network, pattern) if key == "model.targets" else None) or "matches no module of this network"
    return f"{key} has {pattern!r}, which {why}; near names are {', '.join(near)} (one is {path!r}{more})."


def _other_kind(network: nn.Module, pattern: str) -> str | None:
    """What a pattern names where that is there, but no linear layer."""
    for path, x in network.named_parameters():
        if x.dim() > 2 and matches(path, pattern):
            sizes = " x ".join(map(str, x.shape))
            return (
                f"names {path!r} ({sizes}), a parameter and no linear layer, such as the stacked experts of a mixture "
                "(PEFT's target_parameters), whose factors have another layout and cannot be combined here"
            )
    for path, module in network.named_modules():
        if path and matches(path, pattern) and not isinstance(module, nn.Linear | Conv1D):
            return f"names {path!r}, of the kind {type(module).__name__}, where only linear layers can be adapted"
    return None


def _names(paths: Sequence[str]) -> dict[str, str]:
    """The modules' own names, sorted, with a path each; where a name is a number, with the name before it."""
    found: dict[str, str] = {}
    for path in paths:
        words = path.split(".")
        named = next((i for i in range(len(words) - 1, -1, -1) if not words[i].isdigit()), 0)
        found.setdefault(".".join(words[named:]), path)
    return dict(sorted(found.items()))


def _sample(paths: list[str]) -> str:
    return ", ".join(list(_names(paths))[:10]) or "it has no linear layer at all"
