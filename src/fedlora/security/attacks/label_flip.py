"""Label flip: training on wrong labels.

Tolpegin et al. Data Poisoning Attacks Against Federated Learning Systems. ESORICS 2020.
https://arxiv.org/abs/2007.08432
"""

import typing
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.security.attacks._base import Altered, Attack
from fedlora.tasks._base import Batch, Classification, Examples, Task
from fedlora.tasks.metrics.scores import Scores


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Label ``y`` is taught as ``y + 1``, the last one as the first. Success: test rows that are called so."""

    cite = """@inproceedings{tolpegin2020poisoning, title = {Data Poisoning Attacks Against Federated Learning Systems},
      author = {Tolpegin and others}, booktitle = {ESORICS}, year = {2020}, eprint = {2007.08432},
      archiveprefix = {arXiv}}"""

    def check(self, method, task, hidden):
        """``ValueError`` where rows have no labels."""
        if not isinstance(task, Classification):
            raise ValueError("attack.name is 'label-flip', which needs rows with labels; take a classification task.")

    def taught(self, task):
        """The rows with the labels flipped."""
        return typing.cast(Task, _Flipped(task))

    def judge(self, task):
        """Counts the rows that are called by their flipped label."""
        return typing.cast(Task, _Judge(task))


class _Flipped(Altered):
    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        return self._flipped(self.task.collate(examples, rows), examples)

    def augmented(self, examples: Examples, rows: Tensor, draws: torch.Generator) -> Batch:
        return self._flipped(self.task.augmented(examples, rows, draws), examples)

    def _flipped(self, batch: Batch, examples: Examples) -> Batch:
        return {**batch, "labels": (batch["labels"] + 1) % (1 + int(examples.labels.max()))}


class _Judge(Altered):
    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        flipped = (labels + 1) % outputs.shape[-1]
        return Scores({"success": (int((outputs.argmax(-1) == flipped).sum()), len(labels))})
