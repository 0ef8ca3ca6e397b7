"""Which modules of a network are adapted, and which are trained in full: by name, settled once at attachment."""

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

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


def matches(path: str, pattern: str) -> bool:
    """Whether a module's path is named: in full, by its last names (``attention.query``), or with ``*``."""
    return path == pattern or path.endswith("." + pattern) or fnmatch.fnmatchcase(path, pattern)


def adapted(network: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """Path -> ``Linear`` or ``Conv1D`` of every adapted weight, in the network's order.

    ``None`` takes the family's query and value projections. ``ValueError`` names a pattern that matches nothing.
    """
    weights = {path: module for path, module in network.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if patterns is None:
        patterns = _usual(weights)
    for pattern in patterns:
        if not any(matches(path, pattern) for path in weights):
            raise ValueError(_unmatched("model.targets", pattern, list(weights)))
    found = {path: module for path, module in weights.items() if any(matches(path, p) for p in patterns)}
    _untied(network, found, "model.targets")
    return found


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
                raise ValueError(_unmatched("model.head", pattern, paths))
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


def _unmatched(key: str, pattern: str, paths: list[str]) -> str:
    last = sorted({path.rsplit(".", 1)[-1] for path in paths if not path.rsplit(".", 1)[-1].isdigit()})
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], last, n=3, cutoff=0.3) or last[:8]
    return f"{key} has {pattern!r}, which matches no module of this network; near names are {', '.join(near)}."


def _sample(paths: list[str]) -> str:
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    return ", ".join(names[:10]) or "it has no linear layer at all"
