"""Text classification: one sentence or a pair, one label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.tasks._base import Classification
from fedlora.tasks._text import Texts
from fedlora.tasks.data.labels import Classes, Targets


@dataclass(frozen=True)
class TextClassification(Classification, Texts):
    """The ``[task]`` table of text classification."""

    label_names: list[str] | None = None
    labels: list[int | str] | None = None  # keep only these labels, numbered anew
    metric: str = "accuracy"  # or "macro_f1", or with two labels "f1" or "matthews"

    def classes(self, splits: Sequence[Any]) -> Classes:
        """The classes that the rows of these splits have."""
        return Classes.of(splits, self.label, self.label_names, self.labels)

    def targets(self, train: Any, test: Any, classes: Classes | None) -> Targets:
        """Labels as numbers from 0."""
        assert classes is not None, "labels have classes"
        return classes.targets(train, test, self.label)
