"""Label flip: training on wrong labels.

Tolpegin et al. Data Poisoning Attacks Against Federated Learning Systems. ESORICS 2020.
https://arxiv.org/abs/2007.08432
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.security.attacks._base import Attack, TaskWrapper
from fedlora.tasks._base import Batch, Classification, Examples
from fedlora.tasks.metrics.scores import Scores


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Trains on label ``y + 1`` instead of ``y``, and 0 instead of the last. Success: test rows predicted so."""

    cite = """@inproceedings{tolpegin2020poisoning, title = {Data Poisoning Attacks Against Federated Learning Systems},
      author = {Tolpegin and others}, booktitle = {ESORICS}, year = {2020}, eprint = {2007.08432},
      archiveprefix = {arXiv}}"""

    def check(self, method, task, hidden):
        if not isinstance(task, Classification):
            raise ValueError("attack.name is 'label-flip', which needs rows with labels; take a classification task.")

    def poison(self, task):
        return _FlippedTask(task)

    def success_task(self, task):
        return _SuccessTask(task)


class _FlippedTask(TaskWrapper):
    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        return self._flip(self.task.collate(examples, rows), examples)

    def collate_for_training(self, examples: Examples, rows: Tensor, draws: torch.Generator) -> Batch:
        return self._flip(self.task.collate_for_training(examples, rows, draws), examples)

    def _flip(self, batch: Batch, examples: Examples) -> Batch:
        return {**batch, "labels": (batch["labels"] + 1) % (1 + int(examples.labels.max()))}


class _SuccessTask(TaskWrapper):
    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        flipped = (labels + 1) % outputs.shape[-1]
        return Scores({"success": (int((outputs.argmax(-1) == flipped).sum()), len(labels))})
