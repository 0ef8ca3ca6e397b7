"""The GLUE benchmark's tasks by name, with their columns, labels and metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedlora.registry import unknown
from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Examples
from fedlora.tasks._text import Texts
from fedlora.tasks.data import rows as source
from fedlora.tasks.data.labels import Classes, Targets
from fedlora.tasks.metrics.scores import Scores
from fedlora.tasks.text_classification import TextClassification
from fedlora.tasks.text_regression import TextRegression


class Subset(NamedTuple):
    """One of GLUE's tasks."""

    text: tuple[str, ...]  # columns
    metric: str
    labels: tuple[str, ...] | None  # in the order of their numbers; None: a score from 0 to 5
    tests: tuple[str, ...] = ("validation",)


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
SUBSETS = {
    "cola": Subset(("sentence",), "matthews", ("unacceptable", "acceptable")),
    "sst2": Subset(("sentence",), "accuracy", ("negative", "positive")),
    "mrpc": Subset(PAIR, "f1", ("not_equivalent", "equivalent")),
    "qqp": Subset(("question1", "question2"), "f1", ("not_duplicate", "duplicate")),
    "stsb": Subset(PAIR, "pearson", None),
    "mnli": Subset(
        ("premise", "hypothesis"),
        "accuracy",
        ("entailment", "neutral", "contradiction"),
        ("validation_matched", "validation_mismatched"),
    ),
    "qnli": Subset(("question", "sentence"), "accuracy", ENTAILMENT),
    "rte": Subset(PAIR, "accuracy", ENTAILMENT),
    "wnli": Subset(PAIR, "accuracy", ("not_entailment", "entailment")),
}
HIDDEN = {"-1", "-1.0"}  # what GLUE's test rows have for a label


@dataclass(frozen=True)
class Glue(Texts):
    """The ``[task]`` table of a GLUE task; what is left out is as the benchmark has it."""

    data: PerMachine[str] = "nyu-mll/glue"  # or a folder or file with the same columns
    subset: str = ""
    test_split: PerMachine[str] = "validation"  # MNLI's is two, matched and mismatched, each scored by itself

    def __post_init__(self):
        if self.subset not in SUBSETS:
            said = "task.subset is missing; it is one of " + ", ".join(SUBSETS) + "."
            raise ValueError(unknown("GLUE task", self.subset, SUBSETS, "names (task.subset)") if self.subset else said)
        # What the subset says is written out, so that the settings of a run are whole.
        object.__setattr__(self, "metric", self.metric or SUBSETS[self.subset].metric)
        object.__setattr__(self, "data_config", self.data_config or self.subset)
        self.own  # noqa: B018 - what is wrong with the rest is said at once

    @cached_property
    def own(self) -> TextClassification | TextRegression:
        """The classification or regression that this is."""
        given = {f.name: getattr(self, f.name) for f in fields(Texts)}
        labels = SUBSETS[self.subset].labels
        if labels is None:
            return TextRegression(**given)
        return TextClassification(**given, label_names=list(labels))

    @property
    def test_splits(self) -> tuple[str, ...]:
        """The splits that are tested on."""
        return SUBSETS[self.subset].tests if self.test_split == "validation" else (self.test_split,)

    def classes(self, splits: Sequence[Any]) -> Classes | None:
        """The benchmark's classes; None for a score."""
        return self.own.classes(splits)

    def targets(self, train: Any, test: Any, classes: Classes | None) -> Targets:
        """Labels or scores; ``ValueError`` where they are hidden."""
        for key, split in ((self.train_split, train), (self.test_split, test)):
            if HIDDEN & {str(value) for value in source.column(split, self.label, "task.label")}:
                raise ValueError(
                    f"the split {key!r} of GLUE's {self.subset} has the label -1, which stands for hidden: GLUE "
                    "keeps the labels of its test rows to itself; leave task.test_split out to test on validation rows."
                )
        return self.own.targets(train, test, classes)

    def _columns(self, split: Any) -> Sequence[str]:
        if self.text is None:
            for name in SUBSETS[self.subset].text:
                source.present(split, name, f"of GLUE's {self.subset}; task.text names others")
            return SUBSETS[self.subset].text
        return super()._columns(split)

    def strata(self, known: Tensor, values: Tensor) -> Tensor | None:
        """What partitions by label go by."""
        return self.own.strata(known, values)

    def agreed(self) -> tuple[str, ...] | None:
        """The labels: known without any rows."""
        return self.own.agreed()

    def all_labels(self) -> tuple[str, ...]:
        """The labels of the benchmark; empty for a score."""
        return self.own.all_labels()

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy, or the mean squared error of a score."""
        return self.own.loss(network, batch)

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Each row's own loss."""
        return self.own.losses(network, batch)

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Logits, or predicted scores; rows by outputs."""
        return self.own.outputs(network, batch)

    def graded(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """Outputs, and where there are two test sets which of them a row is of."""
        found = super().graded(network, examples, rows, device)
        if len(self.test_splits) == 1:
            return found
        sets = torch.zeros(len(examples)) if examples.sets is None else examples.sets
        return torch.cat([found.float(), sets[rows, None].to(found.device, torch.float32)], dim=1)

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """The metric's sums on the first test set; of the second, accuracy alone."""
        if len(self.test_splits) == 1:
            return self.own.scores(outputs, labels)
        outputs, second = outputs[:, :-1], outputs[:, -1] == 1
        if bool(second.all()):
            raise ValueError(
                f"a client has no rows of {self.test_splits[0]!r}; give each some, or set task.test_split."
            )
        sums = dict(self.own.scores(outputs[~second], labels[~second]).sums)
        if second.any():
            sums["accuracy_mismatched"] = self.own.scores(outputs[second], labels[second]).sums["accuracy"]
        return Scores(sums)
