"""Text classification: one sentence or a pair, one label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.tasks._base import Classification
from fedlora.tasks._text import TextTask
from fedlora.tasks.data.labels import Classes, Targets


@dataclass(frozen=True)
class TextClassification(Classification, TextTask):
    """The ``[task]`` table of text classification."""

    label_names: list[str] | None = None
    labels: list[int | str] | None = None  # keep only these labels, numbered from 0
    metric: str = "accuracy"  # or "macro_f1", or with two labels "f1" or "matthews"

    def classes(self, splits: Sequence[Any]) -> Classes:
        return Classes.of(splits, self.label, self.label_names, self.labels)

    def targets(self, train: Any, test: Any, classes: Classes | None) -> Targets:
        assert classes is not None, "labels have classes"
        return classes.targets(train, test, self.label)
