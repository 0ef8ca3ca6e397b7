"""The tasks of the GLUE benchmark, with their columns, labels and metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedlora.registry import unknown
from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Examples
from fedlora.tasks._text import TextTask
from fedlora.tasks.data.labels import Classes, Targets
from fedlora.tasks.data.rows import check_column, read_column
from fedlora.tasks.metrics.scores import Scores
from fedlora.tasks.text_classification import TextClassification
from fedlora.tasks.text_regression import TextRegression


class Subset(NamedTuple):
    """One of GLUE's tasks."""

    text: tuple[str, ...]  # columns
    metric: str
    labels: tuple[str, ...] | None  # by number; None: a score from 0 to 5
    tests: tuple[str, ...] = ("validation",)


PAIR = ("sentence1", "sentence2")
MATCHED = ("validation_matched", "validation_mismatched")
ENTAILMENT = ("entailment", "not_entailment")
SUBSETS = {
    "cola": Subset(("sentence",), "matthews", ("unacceptable", "acceptable")),
    "sst2": Subset(("sentence",), "accuracy", ("negative", "positive")),
    "mrpc": Subset(PAIR, "f1", ("not_equivalent", "equivalent")),
    "qqp": Subset(("question1", "question2"), "f1", ("not_duplicate", "duplicate")),
    "stsb": Subset(PAIR, "pearson", None),
    "mnli": Subset(("premise", "hypothesis"), "accuracy", ("entailment", "neutral", "contradiction"), MATCHED),
    "qnli": Subset(("question", "sentence"), "accuracy", ENTAILMENT),
    "rte": Subset(PAIR, "accuracy", ENTAILMENT),
    "wnli": Subset(PAIR, "accuracy", ("not_entailment", "entailment")),
}
HIDDEN = {"-1", "-1.0"}  # the label of GLUE's test rows


@dataclass(frozen=True)
class Glue(TextTask):
    """The ``[task]`` table of a GLUE task; the defaults are the benchmark's."""

    data: PerMachine[str] = "nyu-mll/glue"  # or a folder or file with the same columns
    subset: str = ""
    test_split: PerMachine[str] = "validation"  # for MNLI both matched and mismatched, scored separately

    def __post_init__(self) -> None:
        if not self.subset:
            raise ValueError(f"task.subset is missing; it is one of {', '.join(SUBSETS)}.")
        if self.subset not in SUBSETS:
            raise ValueError(unknown("GLUE task", self.subset, SUBSETS, "names (task.subset)"))
        # Set here, so that the saved settings of a run are complete.
        object.__setattr__(self, "metric", self.metric or SUBSETS[self.subset].metric)
        object.__setattr__(self, "data_config", self.data_config or self.subset)
        self.task  # noqa: B018 - raises if another setting is wrong

    @cached_property
    def task(self) -> TextClassification | TextRegression:
        """The classification or regression with the same settings; most methods forward to it."""
        settings = {f.name: getattr(self, f.name) for f in fields(TextTask)}
        labels = SUBSETS[self.subset].labels
        return TextRegression(**settings) if labels is None else TextClassification(**settings, label_names=[*labels])

    @property
    def test_splits(self) -> tuple[str, ...]:
        return SUBSETS[self.subset].tests if self.test_split == "validation" else (self.test_split,)

    def classes(self, splits: Sequence[Any]) -> Classes | None:
        return self.task.classes(splits)

    def targets(self, train: Any, test: Any, classes: Classes | None) -> Targets:
        """Return labels or scores. Raises ``ValueError`` if they are hidden."""
        for key, split in ((self.train_split, train), (self.test_split, test)):
            if HIDDEN & set(map(str, read_column(split, self.label, "task.label"))):
                raise ValueError(
                    f"the split {key!r} of GLUE's {self.subset} has the label -1, which stands for hidden: GLUE "
                    "keeps the labels of its test rows to itself; leave task.test_split out to test on validation rows."
                )
        return self.task.targets(train, test, classes)

    def _choose_columns(self, split: Any) -> Sequence[str]:
        if self.text is not None:
            return super()._choose_columns(split)
        for name in SUBSETS[self.subset].text:
            check_column(split, name, f"of GLUE's {self.subset}; task.text names others")
        return SUBSETS[self.subset].text

    def strata(self, known: Tensor, values: Tensor) -> Tensor | None:
        return self.task.strata(known, values)

    def known_labels(self) -> tuple[str, ...] | None:
        return self.task.known_labels()

    def all_labels(self) -> tuple[str, ...]:
        return self.task.all_labels()

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(network, batch)

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        return self.task.losses(network, batch)

    def evaluate(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """Return the outputs, and each row's test set if there are two."""
        outputs = super().evaluate(network, examples, rows, device)
        if len(self.test_splits) == 1:
            return outputs
        sets = torch.zeros(len(examples)) if examples.sets is None else examples.sets
        return torch.cat([outputs.float(), sets[rows, None].to(outputs.device, torch.float32)], dim=1)

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Return the metric's sums on the first test set, and the accuracy on the second."""
        if len(self.test_splits) == 1:
            return self.task.scores(outputs, labels)
        outputs, second = outputs[:, :-1], outputs[:, -1] == 1
        if bool(second.all()):
            raise ValueError(f"a client has no rows of {self.test_splits[0]!r}; give it some, or set task.test_split.")
        sums = dict(self.task.scores(outputs[~second], labels[~second]).sums)
        if second.any():
            sums["accuracy_mismatched"] = self.task.scores(outputs[second], labels[second]).sums["accuracy"]
        return Scores(sums)
