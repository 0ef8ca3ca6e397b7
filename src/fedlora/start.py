"""Beginning a federation at an adapter that was trained before."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fedlora.limits import shown
from fedlora.method import Method
from fedlora.model import Model
from fedlora.peft_folder import AdapterFolder
from fedlora.rounds import Rules, received
from fedlora.types import Layer, Turn


def begin(
    model: Model, rules: Rules, method: Method, folder: str | Path, seed: int, labels: Sequence[str] = ()
) -> None:
    """Lets the model begin at a PEFT folder that all parties hold.

    ``ValueError`` where the method would not keep it, and where its labels are not the run's ``labels``.
    """
    found = AdapterFolder.open(folder)
    _check_labels(found, labels)
    whole = {path: layer for path, layer in found.modules().items() if not _is_own(model, path, layer)}
    model.start({part: found.lora(part).delta(found.layer(part)) for part in found.shapes}, whole)
    shared = model.initial(seed)
    own = received(rules, shared, {}, Turn(0, 0, method.adapter.budget))
    for part in found.shapes:
        if not torch.equal(*(method.adapter.delta(tree[part]).U for tree in (shared, own))):
            raise ValueError(
                f"{method.title} begins every turn afresh and would lose model.start; take another method."
            )


def _check_labels(found: AdapterFolder, labels: Sequence[str]) -> None:
    if found.labels is not None and labels and list(found.labels) != list(labels):
        raise ValueError(
            f"model.start was trained for the labels {shown(', '.join(found.labels), 100)}, and the run has "
            f"{shown(', '.join(labels), 100)}; set task.label_names to those of model.start, in their order."
        )


def _is_own(model: Model, path: str, layer: Layer) -> bool:
    """Whether a module that is not trained here is the network's own as it is."""
    if path in model.parts:
        return False
    own = dict(model.network.named_parameters())
    pairs = [(own.get(f"{path}.{leaf}"), x) for leaf, x in layer.items()]
    return all(mine is not None and torch.equal(mine.cpu(), x.cpu()) for mine, x in pairs)
