"""Columns, tokens and padded batches of all tasks on sentences and pairs of sentences."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Data, Examples, TableTask
from fedlora.tasks.data.labels import Classes, Targets
from fedlora.tasks.data.rows import client_groups, concatenate, read_column
from fedlora.tasks.data.tokens import flatten_rows, locate_rows, random_batch, truncation_note
from fedlora.tasks.networks.pretrained import load_tokenizer, load_with_new_head

# The usual columns of public data sets, tried in this order if task.text is not set.
USUAL = (
    ("question", "sentence"), ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("text",), ("sentence",), ("content",),
)  # fmt: skip


@dataclass(frozen=True)
class TextTask(TableTask):
    """The keys of the ``[task]`` table about texts."""

    text: PerMachine[str | list[str] | None] = None  # one column or two; None: the usual names
    label: PerMachine[str] = "label"
    max_length: int = 128  # tokens; longer texts are cut
    pad_to_max_length: bool = False  # pad every batch to max_length instead of its longest row
    metric: str = ""
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    accepts_loading: ClassVar[bool] = True
    peft: ClassVar[str | None] = "SEQ_CLS"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 1:
            raise ValueError(f"task.max_length is {self.max_length}; it must be at least 1 token.")

    def classes(self, splits: Sequence[Any]) -> Classes | None:
        """Return the classes of these splits' rows; None for a regression."""
        return None

    @abstractmethod
    def targets(self, train: Any, test: Any, classes: Classes | None) -> Targets:
        """Return the targets as numbers. Raises ``ValueError`` if the column has other values."""

    def strata(self, known: Tensor, values: Tensor) -> Tensor | None:
        """Return labels for partitions by label if ``values`` are no labels; ``known`` are the training targets."""
        return None

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Read, check and tokenize all splits once."""
        splits = self.load_splits(seed)
        classes = self.classes(splits)
        train, *tests = self.draw_splits(splits, seed, self.label, classes)
        test, sets = concatenate(tests)
        columns, targets = self._choose_columns(train), self.targets(train, test, classes)
        tokenizer = load_tokenizer(model)
        both, notes = [], list(targets.notes)
        for split, labels, role in ((train, targets.train, "training"), (test, targets.test, "test")):
            features, lengths, note = self._encode(split, columns, tokenizer, role)
            groups, strata = client_groups(split, client_column, role), self.strata(targets.train, labels)
            both.append(Examples(features, labels, lengths, groups, strata, sets=sets if split is test else None))
            notes += [note] if note else []
        return Data(both[0], both[1], targets.names, tuple(notes), targets.reading)

    def _choose_columns(self, split: Any) -> Sequence[str]:
        if self.text is None:
            for columns in USUAL:
                if set(columns) <= set(split.column_names):
                    return columns
            raise ValueError(f"no text column among {', '.join(split.column_names)}; set task.text to one or two.")
        named = [self.text] if isinstance(self.text, str) else self.text
        if not 1 <= len(named) <= 2:
            raise ValueError(f"task.text names {len(named)} columns; a text is one column, or a pair of two.")
        return named

    def _encode(
        self, split: Any, columns: Sequence[str], tokenizer: Any, role: str
    ) -> tuple[dict[str, Tensor], Tensor, str]:
        """Return features, each row's length, and a note about texts that were cut, or an empty string."""
        texts = [read_column(split, name, "task.text") for name in columns]
        for name, values in zip(columns, texts):
            odd = next((value for value in values if not isinstance(value, str)), None)
            if odd is not None:
                raise ValueError(f"column {name!r} (task.text) holds {odd!r}, which is not text; name a text column.")
        empty = sum(not any(row) for row in zip(*(map(str.strip, values) for values in texts)))
        if empty:
            raise ValueError(f"column {columns[0]!r} (task.text) has {empty} empty texts; drop these rows.")
        tokens = tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
        # Stored without padding and in 32 bits, so that a million short texts take tens of megabytes.
        flat = {name: flatten_rows(tokens[name]) for name in ("input_ids", "token_type_ids") if name in tokens}
        offsets = flat["input_ids"][1]
        lengths = offsets.diff()
        longest = self.max_length if self.pad_to_max_length else int(lengths.max())
        most = tokenizer.model_max_length
        if longest > most:
            raise ValueError(
                f"task.max_length is {self.max_length} and a text comes to {longest} tokens, but the model reads at "
                f"most {most}; set task.max_length to {most}."
            )
        cut = self._count_longer(texts, lengths, tokenizer)
        note = truncation_note(cut, len(lengths), self.max_length, tokenizer.truncation_side, role) + "." if cut else ""
        features = {name: ids for name, (ids, _) in flat.items()}
        return {**features, "offsets": offsets, "pad": torch.tensor(tokenizer.pad_token_id)}, lengths, note

    def _count_longer(self, texts: Sequence[Sequence[str]], lengths: Tensor, tokenizer: Any) -> int:
        """Return the number of rows that were longer than ``max_length``; only full rows are tokenized again."""
        full = (lengths >= self.max_length).nonzero()[:, 0].tolist()
        if not full:
            return 0
        tokens = tokenizer(*([part[i] for i in full] for part in texts), return_attention_mask=False, verbose=False)
        return sum(len(ids) > self.max_length for ids in tokens["input_ids"])

    def network(self, model: str, labels: int, seed: int, loading: Any = None) -> nn.Module:
        """Return the pretrained network with a new head of ``labels`` outputs."""
        from transformers import AutoModelForSequenceClassification

        self.check_labels(labels)
        network = load_with_new_head(AutoModelForSequenceClassification, model, labels, seed, loading)
        if network.config.pad_token_id is None:  # causal models use the last token that is not padding
            network.config.pad_token_id = load_tokenizer(model).pad_token_id
        return network

    def probe(self, network: Any) -> Batch:
        return random_batch(network.config.vocab_size)

    def preprocessor(self, model: str) -> Any:
        return load_tokenizer(model)

    def padded_lengths(self, examples: Examples, rows: Tensor) -> Tensor:
        lengths = examples.lengths[rows, None]
        return torch.full_like(lengths, self.max_length) if self.pad_to_max_length else lengths

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Return a batch, padded to its longest row or to ``max_length``."""
        width = self.max_length if self.pad_to_max_length else None
        places, mask = locate_rows(examples.features["offsets"], rows, width)
        batch = {"attention_mask": mask.long(), "labels": examples.labels[rows]}
        for name, fill in (("input_ids", examples.features["pad"]), ("token_type_ids", 0)):
            if name in examples.features:
                batch[name] = torch.where(mask, examples.features[name][places].long(), fill)
        return batch
