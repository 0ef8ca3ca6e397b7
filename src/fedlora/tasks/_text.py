"""What all tasks on sentences and pairs of sentences have in common: columns, tokens, padded batches."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Data, Examples, Supervised
from fedlora.tasks.data import rows as source
from fedlora.tasks.data.labels import Classes, Targets
from fedlora.tasks.data.tokens import cut_note
from fedlora.tasks.networks.pretrained import network, tokenizer

# The columns that public sets use, tried in this order where task.text is not set.
USUAL = (
    ("question", "sentence"), ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("text",), ("sentence",), ("content",),
)  # fmt: skip


@dataclass(frozen=True)
class Texts(Supervised):
    """The part of the ``[task]`` table that says where texts lie and how they are read."""

    data: PerMachine[str]  # a hub id, a folder, a file
    data_config: PerMachine[str | None] = None  # of a hub id that has several
    encoding: PerMachine[str | None] = None  # of CSV and JSON files; None: as the file shows, else UTF-8
    delimiter: PerMachine[str | None] = None  # of CSV files; None: as the header shows
    text: PerMachine[str | list[str] | None] = None  # one column or two; None: the usual names
    label: PerMachine[str] = "label"
    train_split: PerMachine[str] = "train"
    test_split: PerMachine[str] = "test"
    max_length: int = 128  # tokens; longer texts are cut
    pad_to_max_length: bool = False  # pad every batch to max_length instead of its own longest row
    train_rows: int | None = None  # a seeded draw of so many rows
    test_rows: int | None = None
    metric: str = ""
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    peft: ClassVar[str | None] = "SEQ_CLS"

    def __post_init__(self):
        super().__post_init__()
        source.text_format(self)
        if self.max_length < 1:
            raise ValueError(f"task.max_length is {self.max_length}; it must be at least 1 token.")

    @property
    def test_splits(self) -> tuple[str, ...]:
        """The splits that are tested on: one, or several that are scored each by itself."""
        return (self.test_split,)

    def classes(self, splits: Sequence[Any]) -> Classes | None:
        """The classes that the rows of these splits have; None where a target is a number."""
        return None

    @abstractmethod
    def targets(self, train: Any, test: Any, classes: Classes | None) -> Targets:
        """What is learnt, as numbers; ``ValueError`` names what is wrong with the column."""

    def strata(self, known: Tensor, values: Tensor) -> Tensor | None:
        """What partitions by label go by, where ``values`` are no labels; ``known`` are the training rows' own."""
        return None

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Reads, checks and tokenises all splits once."""
        where = (self.data, self.data_config, self.train_split, self.test_splits)
        found = source.splits(*where, seed, source.text_format(self))
        counts = (self.train_rows, *[self.test_rows] * (len(found) - 1))
        whats = ("training", *["test"] * (len(found) - 1))
        classes = self.classes(found)
        train, *tests = (
            source.subset(split, rows, classes and classes.values(split, self.label), self.label, seed, what)
            for split, rows, what in zip(found, counts, whats)
        )
        test, sets = source.joined(tests)
        columns, targets, own = self._columns(train), self.targets(train, test, classes), tokenizer(model)
        both, notes = [], list(targets.notes)
        for split, labels, what in ((train, targets.train, "training"), (test, targets.test, "test")):
            features, lengths, note = self._encoded(split, columns, own, what)
            groups, strata = source.groups(split, client_column, what), self.strata(targets.train, labels)
            both.append(Examples(features, labels, lengths, groups, strata, sets=sets if split is test else None))
            notes += [note] if note else []
        return Data(*both, targets.names, tuple(notes), targets.reading)

    def _columns(self, split: Any) -> Sequence[str]:
        if self.text is None:
            for columns in USUAL:
                if set(columns) <= set(split.column_names):
                    return columns
            raise ValueError(
                f"no text column was found among {', '.join(split.column_names)}; set task.text to one or two of them."
            )
        columns = [self.text] if isinstance(self.text, str) else self.text
        if not 1 <= len(columns) <= 2:
            raise ValueError(f"task.text names {len(columns)} columns; a text is one column, or a pair of two.")
        return columns

    def _encoded(
        self, split: Any, columns: Sequence[str], tokenizer: Any, what: str
    ) -> tuple[dict[str, Tensor], Tensor, str]:
        """Features, each row's length, and a sentence that says what was cut, or nothing."""
        texts = [source.column(split, name, "task.text") for name in columns]
        for name, values in zip(columns, texts):
            odd = next((value for value in values if not isinstance(value, str)), None)
            if odd is not None:
                raise ValueError(f"column {name!r} (task.text) holds {odd!r}, which is not text; name a text column.")
        empty = sum(not any(row) for row in zip(*(map(str.strip, values) for values in texts)))
        if empty:
            raise ValueError(f"column {columns[0]!r} (task.text) has {empty} empty texts; drop these rows.")
        tokens = tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
        lengths = torch.tensor([len(ids) for ids in tokens["input_ids"]])
        longest, most = int(lengths.max()), tokenizer.model_max_length
        longest = self.max_length if self.pad_to_max_length else longest
        if longest > most:
            raise ValueError(
                f"task.max_length is {self.max_length} and a text comes to {longest} tokens, but the model reads at "
                f"most {most}; set task.max_length to {most}."
            )
        # Flat and 32 bits: a million short texts in tens of megabytes, and no padding until a batch is made.
        features = {
            name: torch.tensor(list(chain.from_iterable(tokens[name])), dtype=torch.int32)
            for name in ("input_ids", "token_type_ids")
            if name in tokens
        }
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        pad = torch.tensor(tokenizer.pad_token_id)
        cut = self._cut(texts, lengths, tokenizer)
        note = cut_note(cut, len(lengths), self.max_length, tokenizer.truncation_side, what) + "." if cut else ""
        return {**features, "offsets": offsets, "pad": pad}, lengths, note

    def _cut(self, texts: Sequence[Sequence[str]], lengths: Tensor, tokenizer: Any) -> int:
        """How many rows were longer than ``max_length``, among those that fill it."""
        full = (lengths >= self.max_length).nonzero()[:, 0].tolist()
        if not full:
            return 0
        whole = tokenizer(*([part[i] for i in full] for part in texts), return_attention_mask=False, verbose=False)
        return sum(len(ids) > self.max_length for ids in whole["input_ids"])

    def network(self, model: str, labels: int, seed: int) -> nn.Module:
        """The pretrained network with a new head of so many outputs."""
        from transformers import AutoModelForSequenceClassification

        self.fits(labels)
        found = network(AutoModelForSequenceClassification, model, labels, seed)
        if found.config.pad_token_id is None:  # causal models look for the last token that is none
            found.config.pad_token_id = tokenizer(model).pad_token_id
        return found

    def probe(self, network: nn.Module) -> Batch:
        """Some tokens, to compare two networks on."""
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(network.config.vocab_size, (4, 12), generator=draws)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def preprocessor(self, model: str) -> Any:
        """What has to be saved beside a network for others to use it."""
        return tokenizer(model)

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """A padded batch: rows by its longest row, or by ``max_length``."""
        lengths = examples.lengths[rows]
        width = self.max_length if self.pad_to_max_length else int(lengths.max())
        places = torch.arange(width)
        mask = places < lengths[:, None]
        at = torch.where(mask, examples.features["offsets"][rows, None] + places, 0)
        batch = {"attention_mask": mask.long(), "labels": examples.labels[rows]}
        for name, fill in (("input_ids", examples.features["pad"]), ("token_type_ids", 0)):
            if name in examples.features:
                batch[name] = torch.where(mask, examples.features[name][at].long(), fill)
        return batch
