"""Beginning a federation at an adapter that was trained before."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fedlora.methods._base import Method
from fedlora.rounds import Rules, client_start
from fedlora.text import display_safe
from fedlora.training.base_model import Base, same_base
from fedlora.training.model import Model
from fedlora.training.peft_folder import AdapterFolder
from fedlora.types import Layer, Turn


def begin(
    model: Model,
    rules: Rules,
    method: Method,
    folder: str | Path,
    seed: int,
    labels: Sequence[str] = (),
    base: str | None = None,
) -> None:
    """Lets the model begin at a PEFT folder that all parties hold.

    ``ValueError`` where the method would not keep it, where its labels are not the run's ``labels``, and where its base
    is not the model called ``base``; None: it is known to be.
    """
    found = AdapterFolder.open(folder)
    if base is not None:
        _check_base(found, base)
    _check_labels(found, labels)
    whole = {path: layer for path, layer in found.modules().items() if not _is_own(model, path, layer)}
    model.start({part: found.lora(part).delta(found.layer(part)) for part in found.shapes}, whole)
    shared = model.initial(seed)
    own = client_start(rules, shared, {}, Turn(0, 0, method.adapter.budget))
    for part in found.shapes:
        if not torch.equal(*(method.adapter.delta(tree[part]).U for tree in (shared, own))):
            raise ValueError(
                f"{method.title} begins every turn afresh and would lose model.start; take another method."
            )


def _check_base(found: AdapterFolder, name: str) -> None:
    """By the rule that ``fedlora aggregate`` compares bases by."""
    known = same_base(found.base, Base.named({"base_model_name_or_path": name}))
    if known:
        return
    if found.base.name is None:
        raise ValueError(
            f"model.start, {str(found.path)!r}, does not say which base model it was trained for; where that is "
            f"{name!r} (model.name), set model.same_base = true."
        )
    if known is None:
        raise ValueError(
            f"model.start, {str(found.path)!r}, was trained for the base model {found.base}, and model.name is "
            f"{name!r}; name an adapter of this model, or where these are two names of one, set model.same_base = true."
        )
    raise ValueError(
        f"model.start, {str(found.path)!r}, was trained for other weights of {found.base} than those of model.name, "
        f"{name!r}; name an adapter of this model, or where the files differ but not the weights, set "
        "model.same_base = true."
    )


def _check_labels(found: AdapterFolder, labels: Sequence[str]) -> None:
    if found.labels is not None and labels and list(found.labels) != list(labels):
        raise ValueError(
            f"model.start was trained for the labels {display_safe(', '.join(found.labels), 100)}, and the run has "
            f"{display_safe(', '.join(labels), 100)}; set task.label_names to those of model.start, in their order."
        )


def _is_own(model: Model, path: str, layer: Layer) -> bool:
    """Whether a module that is not trained here is the network's own as it is."""
    if path in model.parts:
        return False
    own = dict(model.network.named_parameters())
    pairs = [(own.get(f"{path}.{leaf}"), x) for leaf, x in layer.items()]
    return all(mine is not None and torch.equal(mine.cpu(), x.cpu()) for mine, x in pairs)
