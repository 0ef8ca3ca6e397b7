"""Beginning a federation at an adapter that was trained before."""

from pathlib import Path

import torch

from fedlora.method import Method
from fedlora.model import Model
from fedlora.peft_folder import AdapterFolder
from fedlora.rounds import Rules, received
from fedlora.types import Turn


def begin(model: Model, rules: Rules, method: Method, folder: str | Path, seed: int) -> None:
    """Lets the model begin at a PEFT folder that all parties hold.

    ``ValueError`` where the method would not keep it.
    """
    found = AdapterFolder.open(folder)
    model.start({part: found.lora(part).delta(found.layer(part)) for part in found.shapes}, found.modules())
    shared = model.initial(seed)
    own = received(rules, shared, {}, Turn(0, 0, method.adapter.budget))
    for part in found.shapes:
        if not torch.equal(*(method.adapter.delta(tree[part]).U for tree in (shared, own))):
            raise ValueError(
                f"{method.title} begins every turn afresh and would lose model.start; take another method."
            )
