"""The start of a federation from an adapter that was trained before."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fedlora.methods._base import Method
from fedlora.rounds import Rules, client_start
from fedlora.text import display_safe
from fedlora.training.base_model import BaseModel, is_same_base
from fedlora.training.model import Model
from fedlora.training.peft_folder import AdapterFolder
from fedlora.types import Layer, Turn


def warm_start(
    model: Model, rules: Rules, method: Method, folder: str | Path, seed: int, labels: Sequence[str], base: str | None
) -> None:
    """Start the model from a PEFT folder that all clients have.

    Raises ``ValueError`` if the method would discard it, if its labels are not the run's ``labels``, or if its base is
    not the model ``base``; None: its base is known to be the same.
    """
    adapter = AdapterFolder.open(folder)
    if base is not None:
        _check_base(adapter, base)
    if adapter.labels is not None and labels and list(adapter.labels) != list(labels):
        raise ValueError(
            f"model.start was trained for the labels {display_safe(', '.join(adapter.labels), 100)}, and the run has "
            f"{display_safe(', '.join(labels), 100)}; set task.label_names to those of model.start, in their order."
        )
    whole = {path: layer for path, layer in adapter.modules().items() if not _is_unchanged(model, path, layer)}
    model.start_from({part: adapter.lora(part).delta(adapter.layer(part)) for part in adapter.shapes}, whole)
    shared = model.initial(seed)
    client = client_start(rules, shared, {}, Turn(0, 0, method.adapter.budget))
    for part in adapter.shapes:
        if not torch.equal(*(method.adapter.delta(tree[part]).U for tree in (shared, client))):
            raise ValueError(f"{method.title} begins every turn afresh and would lose model.start; use another method.")


def _check_base(adapter: AdapterFolder, name: str) -> None:
    """Compare base models as ``fedlora aggregate`` does."""
    same = is_same_base(adapter.base, BaseModel.from_config({"base_model_name_or_path": name}))
    if same:
        return
    if adapter.base.name is None:
        raise ValueError(
            f"model.start, {str(adapter.path)!r}, does not say which base model it was trained for; if that is "
            f"{name!r} (model.name), set model.same_base = true."
        )
    if same is None:
        raise ValueError(
            f"model.start, {str(adapter.path)!r}, was trained for the base model {adapter.base}, and model.name is "
            f"{name!r}; name an adapter of this model, or if these are two names of one, set model.same_base = true."
        )
    raise ValueError(
        f"model.start, {str(adapter.path)!r}, was trained for other weights of {adapter.base} than those of "
        f"model.name, {name!r}; name an adapter of this model, or if the files differ but not the weights, set "
        "model.same_base = true."
    )


def _is_unchanged(model: Model, path: str, layer: Layer) -> bool:
    """Whether a module that is not trained here equals the network's own."""
    if path in model.parts:
        return False
    parameters = dict(model.network.named_parameters())
    pairs = [(parameters.get(f"{path}.{leaf}"), x) for leaf, x in layer.items()]
    return all(mine is not None and torch.equal(mine.cpu(), x.cpu()) for mine, x in pairs)
