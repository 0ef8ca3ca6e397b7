"""Text classification: one sentence or a pair, one label."""

from dataclasses import dataclass
from typing import Any

from fedlora.tasks import data as source
from fedlora.tasks.task import Classification
from fedlora.tasks.texts import Targets, Texts


@dataclass(frozen=True)
class TextClassification(Classification, Texts):
    """The ``[task]`` table of text classification."""

    label_names: list[str] | None = None
    labels: list[int | str] | None = None  # keep only these labels, numbered anew
    metric: str = "accuracy"  # or "macro_f1", or with two labels "f1" or "matthews"

    @property
    def kept(self):
        """The labels that rows are kept of."""
        return self.labels

    def targets(self, train: Any, test: Any) -> Targets:
        """Labels as numbers from 0."""
        return source.renumbered(source.labels(train, test, self.label, self.label_names), self.labels)
