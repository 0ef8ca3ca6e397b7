"""The modules of a network that are adapted, and those that are trained in full, by name."""

import difflib
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from fedlora.schema import ConfigError

# The names of query and value projections; the first line whose names all occur is used.
# BERT RoBERTa ELECTRA ViT DeiT | Llama Mistral Qwen (newer ViT DeiT Swin) | DistilBERT | DeBERTa | GPT-2 (fused) |
# GPT-NeoX Pythia BLOOM Falcon (fused) | Phi-3 (fused) | MPT (fused) | T5
# and without attention: ConvNeXt's pointwise layers
USUAL = (
    ("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("query_proj", "value_proj"), ("c_attn",),
    ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("q", "v"), ("pwconv1", "pwconv2"),
)  # fmt: skip
ALL = "all-linear"  # PEFT's word


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern names a module: by its path, by its last names (``attention.query``), or with ``*``."""
    return path == pattern or path.endswith("." + pattern) or fnmatch.fnmatchcase(path, pattern)


def find_targets(
    network: nn.Module, patterns: Sequence[str] | str | None, whole: Collection[str] = ()
) -> dict[str, nn.Module]:
    """Return path -> ``Linear`` or ``Conv1D`` of every adapted weight, in the network's order.

    ``None`` selects the usual query and value projections; a list has patterns of names. A string has PEFT's meaning:
    ``all-linear`` for every linear layer except outputs, or a regular expression of whole paths; both leave out the
    modules of ``whole``, which are trained in full. Raises ``ConfigError`` for a pattern that matches nothing.
    """
    weights = {path: module for path, module in network.named_modules() if is_adaptable(module)}
    if isinstance(patterns, str):
        targets = _find_by_text(network, patterns, {path: x for path, x in weights.items() if path not in whole})
    else:
        names = _usual_names(weights) if patterns is None else patterns
        for pattern in names:
            if not any(matches(path, pattern) for path in weights):
                raise ConfigError(_explain_mismatch(network, "model.targets", pattern, list(weights)))
        targets = {path: module for path, module in weights.items() if any(matches(path, p) for p in names)}
    _check_ties(network, targets, "model.targets")
    return targets


def is_adaptable(module: nn.Module) -> bool:
    """Whether a module is a ``Linear`` or ``Conv1D`` that is called.

    The output layer of ``nn.MultiheadAttention`` is not: only its weight is read.
    """
    return isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _find_by_text(network: nn.Module, text: str, weights: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    if text.lower() == ALL:  # without a language model's output layer and a task's new modules
        output = getattr(network, "get_output_embeddings", lambda: None)()
        outside = [path for path, module in network.named_modules() if module is output]
        if hasattr(network, getattr(network, "base_model_prefix", "")):
            outside += new_modules(network)
        return {path: x for path, x in weights.items() if not any(f"{path}.".startswith(f"{o}.") for o in outside)}
    try:
        targets = {path: module for path, module in weights.items() if re.fullmatch(text, path)}
    except re.error as error:
        raise ConfigError(
            f"model.targets is {text!r}, not a valid regular expression ({error}); give {ALL!r}, a regular expression "
            "of whole paths, or a list of names."
        ) from error
    if not targets:
        reason = _explain_mismatch(network, "model.targets", text, list(weights))
        raise ConfigError(f"{reason[:-1]}; one text is a regular expression of whole paths, and names go into a list.")
    return targets


def find_full_modules(network: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return path -> module of every part trained in full: modules with parameters at or below ``patterns``.

    ``None`` selects the new modules, such as ``classifier`` or ``score``; see ``new_modules``.
    """
    paths = [path for path, _ in network.named_modules() if path]
    for pattern in patterns or ():
        if not any(matches(path, pattern) for path in paths):
            raise ConfigError(_explain_mismatch(network, "model.head", pattern, paths))
    patterns = new_modules(network) if patterns is None else patterns
    roots = [path for path in paths if any(matches(path, pattern) for pattern in patterns)]
    modules = {
        path: module
        for path, module in network.named_modules()
        if any(path == root or path.startswith(root + ".") for root in roots)
        and next(module.parameters(recurse=False), None) is not None
    }
    _check_ties(network, modules, "model.head")
    return modules


def new_modules(network: nn.Module) -> list[str]:
    """Return the paths of the modules on top of the pretrained network, and of those that its checkpoint lacks."""
    body = getattr(network, "base_model_prefix", "")
    on_top = [name for name, _ in network.named_children() if name != body]
    return [*getattr(network, "put_on_top", on_top), *getattr(network, "drawn_anew", [])]


def _check_ties(network: nn.Module, chosen: Mapping[str, nn.Module], key: str) -> None:
    """Raise ``ConfigError`` if a chosen weight also belongs to another module, which would change with it."""
    owners: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for path, module in chosen.items():
        others = [o for p in module.parameters(recurse=False) for o in owners.get(id(p), []) if o != path]
        if others:
            raise ConfigError(f"{key} names {path!r}, whose weight is also that of {others[0]!r} (tied); leave it out.")


def _usual_names(weights: Mapping[str, nn.Module]) -> Sequence[str]:
    for names in USUAL:
        if all(any(matches(path, name) for path in weights) for name in names):
            return names
    examples = ", ".join(list(_last_names(weights))[:10]) or "it has no linear layer at all"
    raise ConfigError(
        "this network has none of the usual query and value projections; set model.targets to some of its linear "
        f"layers: {examples}."
    )


def _explain_mismatch(network: nn.Module, key: str, pattern: str, paths: Sequence[str]) -> str:
    """Return why a pattern matches nothing, with near names, a whole path, and a pattern for all such paths."""
    names = _last_names(paths)
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    near = near or difflib.get_close_matches(pattern.rsplit(".", 1)[-1], names, n=3, cutoff=0.3) or list(names)[:8]
    if not near:
        return f"{key} has {pattern!r}, but this network has no linear layer at all."
    path = names[near[0]]
    alike = ".".join("*" if name.isdigit() else name for name in path.split("."))
    more = f", and the pattern {alike!r} matches all of them" if alike != path else ""
    kind = _explain_other_kind(network, pattern) if key == "model.targets" else None
    why = kind or "matches no module of this network"
    return f"{key} has {pattern!r}, which {why}; near names are {', '.join(near)} (one is {path!r}{more})."


def _explain_other_kind(network: nn.Module, pattern: str) -> str | None:
    """Return a sentence if a pattern names something other than a linear layer, else None."""
    for path, x in network.named_parameters():
        if x.dim() > 2 and matches(path, pattern):
            sizes = " x ".join(map(str, x.shape))
            return (
                f"names {path!r} ({sizes}), a parameter and no linear layer, such as the stacked experts of a mixture "
                "(PEFT's target_parameters), whose factors have another layout and cannot be combined here"
            )
    for path, module in network.named_modules():
        if matches(path, pattern) and isinstance(module, NonDynamicallyQuantizableLinear):
            return (
                f"names {path!r}, whose weight nn.MultiheadAttention reads without calling it, so no adapter would act"
            )
        if path and matches(path, pattern) and not is_adaptable(module):
            return f"names {path!r}, of the kind {type(module).__name__}, where only linear layers can be adapted"
    return None


def _last_names(paths: Collection[str]) -> dict[str, str]:
    """Return the modules' last names, sorted, each with one path; a number is joined with the name before it."""
    names: dict[str, str] = {}
    for path in paths:
        words = path.split(".")
        start = next((i for i in range(len(words) - 1, -1, -1) if not words[i].isdigit()), 0)
        names.setdefault(".".join(words[start:]), path)
    return dict(sorted(names.items()))
