"""Values of the pretrained network for each row, which a task's loss compares with, such as DPO's reference."""

from dataclasses import replace

import torch

from fedlora.tasks._base import Data, Examples, Task
from fedlora.training.evaluation import Evaluation
from fedlora.training.model import Model
from fedlora.training.parts import AdaptedPart


@torch.no_grad()
def add_reference(model: Model, task: Task, data: Data, settings: Evaluation) -> Data:
    """Return the data with ``Examples.reference``, if the task needs it; before the first ``load`` of the model."""
    if not task.needs_reference:
        return data
    is_loaded = any(len(part.leaves) for part in model.parts.values() if isinstance(part, AdaptedPart))
    assert not is_loaded and model.base_version == 0, "the network is still the pretrained one"
    model.network.eval()
    return replace(data, train=_add(model, task, data.train, settings), test=_add(model, task, data.test, settings))


def _add(model: Model, task: Task, examples: Examples, settings: Evaluation) -> Examples:
    batches, values = settings.split(task, examples, torch.arange(len(examples)), model), []
    for rows in batches:
        with model.running():
            values.append(task.reference(model.network, examples, rows, model.device).cpu())
    if not len(examples):
        return examples
    together = torch.cat(values)
    return replace(examples, reference=torch.empty_like(together).index_copy_(0, torch.cat(batches), together))
