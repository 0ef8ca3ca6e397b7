"""Sequence to sequence: a source text, a target text, as T5 does classification and question answering."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Data, Examples, move_batch
from fedlora.tasks._tokens import TokenTask
from fedlora.tasks.data import templates
from fedlora.tasks.data.labels import Classes, check_names
from fedlora.tasks.data.rows import client_groups, is_missing, read_column
from fedlora.tasks.data.tokens import IGNORED, flatten_rows, locate_rows
from fedlora.tasks.metrics.answers import answer_f1, exact_match
from fedlora.tasks.metrics.scores import Scores
from fedlora.tasks.networks.generation import generation_config
from fedlora.tasks.networks.next_token_loss import Inputs, prepare_loss
from fedlora.tasks.networks.pretrained import load_complete, load_quietly, load_tokenizer, max_positions

# Templates over the usual columns of public data sets, tried in this order if nothing is set.
USUAL = (
    ("question: {question} context: {context}", "answers"),  # SQuAD, MRQA
    ("{source}", "target"), ("{input}", "target"), ("{text}", "label_text"), ("{text}", "label"),
)  # fmt: skip
DROP = "fill or drop these rows, or set task.drop_unlearnable = true"


@dataclass(frozen=True)
class Seq2Seq(TokenTask):
    """The ``[task]`` table of sequence-to-sequence models."""

    source: PerMachine[str | None] = None  # a column, or a template such as "question: {question} context: {context}"
    target: PerMachine[str | None] = (
        None  # a column: text, a list of right answers, or SQuAD's {"text": [...]}; or a template
    )
    label: PerMachine[str | None] = None  # a column for partitions by label, such as the class
    label_names: list[str] | None = None  # all texts that a target may be; numbers are matched with them
    max_source_length: int = 512  # tokens; longer sources are cut
    max_target_length: int = 64  # tokens; longer targets are an error
    max_new_tokens: int = 32  # of a generated answer
    drop_unlearnable: bool = False  # leave out rows without source or target, or with one too long; False: an error
    metric: str = "exact_match"  # or "answer_f1", or "nll" without generating anything
    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    accepts_loading: ClassVar[bool] = True
    peft: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    brings_head: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("exact_match", "answer_f1", "nll")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("max_source_length", "max_target_length", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"task.{key} is {getattr(self, key)}; it must be at least 1 token.")
        if (self.source is None) != (self.target is None):
            given, lacks = ("target", "source") if self.source is None else ("source", "target")
            raise ValueError(f"task.{given} is set without task.{lacks}; set both, or neither for the usual columns.")
        for key, template in (("task.source", self.source), ("task.target", self.target)):
            templates.check_template(template or "", key)
        check_names(self.label_names)
        if self.label_names and "{" in (self.target or ""):
            raise ValueError("task.label_names is for a target column, but task.target is a template; keep one.")

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Read, check and tokenize both splits once."""
        both, roles, notes = self.draw_splits(self.load_splits(seed), seed), ("training", "test"), list[str]()
        if self.drop_unlearnable:
            learnable = [self._select_learnable(split, model, role) for split, role in zip(both, roles)]
            both, notes = [split for split, _ in learnable], [note for _, note in learnable]
        examples = []
        for split, strata, role in zip(both, templates.label_strata(both[0], both[1], self.label), roles):
            encoded, more = self._encode(split, model, strata, client_groups(split, client_column, role), role)
            examples.append(encoded)
            notes += more
        return Data(examples[0], examples[1], (), tuple(note for note in notes if note))

    def _select_learnable(self, split: Any, model: str, role: str) -> tuple[Any, str]:
        """Return the rows with a source and with a target within the limit, and a note on the others."""
        sources, golds, _ = read_pairs(split, self.source, self.target, self.label_names, role, allow_empty=True)
        targets = _encode_targets(load_tokenizer(model), [answers[0] if answers else "" for answers in golds])
        fits = [len(ids) <= self.max_target_length for ids in targets]
        keep = [bool(text.strip() and answers and fit) for text, answers, fit in zip(sources, golds, fits)]
        (learnable,) = templates.select_rows(keep, split)
        return learnable, templates.dropped_note(
            len(keep), sum(keep), role, "; raise task.max_target_length, or give the rows texts"
        )

    def _encode(self, split: Any, model: str, strata: Any, groups: Any, role: str) -> tuple[Examples, list[str]]:
        sources, golds, notes = read_pairs(split, self.source, self.target, self.label_names, role)
        empty = sum(not text.strip() for text in sources)
        if empty:
            raise ValueError(f"{empty} {role} rows have an empty source (task.source); {DROP}.")
        tokenizer, limit = load_tokenizer(model), self.max_source_length
        inputs = tokenizer(sources, return_attention_mask=False, verbose=False)["input_ids"]
        cut = sum(len(ids) > limit for ids in inputs)
        if cut:  # encoded again, so that the end token stays
            inputs = tokenizer(sources, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]
            notes.append(f"{cut} of {len(inputs)} {role} sources were cut to {limit} tokens.")
        targets = _encode_targets(tokenizer, [answers[0] for answers in golds])
        self._check_lengths(max(map(len, inputs)), list(map(len, targets)), model, role)
        features = {"pad": torch.tensor(tokenizer.pad_token_id)}
        for name, rows in (("source", inputs), ("target", targets)):
            features[name], features[f"{name}_offsets"] = flatten_rows(rows)
        labels, lengths = torch.zeros(len(inputs), dtype=torch.int64), features["source_offsets"].diff()
        texts = tuple({"source": text, "golds": tuple(answers)} for text, answers in zip(sources, golds))
        return Examples(features, labels, lengths, groups, strata, texts), notes

    def _check_lengths(self, source: int, targets: list[int], model: str, role: str) -> None:
        from transformers import AutoConfig

        longer = sum(length > self.max_target_length for length in targets)
        if longer:
            raise ValueError(
                f"{longer} {role} rows have a target of more than task.max_target_length = {self.max_target_length} "
                f"tokens, the longest {max(targets)}; raise it, drop these rows, or set "
                "task.drop_unlearnable = true."
            )
        most = max_positions(load_quietly(AutoConfig, model))  # T5's positions are relative and unlimited
        if max(source, *targets) > most:
            raise ValueError(
                f"some {role} rows have more than the {most} tokens that the model reads at most; "
                f"set task.max_source_length to {most}, and drop rows whose target is longer."
            )

    def known_labels(self) -> tuple[str, ...] | None:
        return ()

    def network(self, model: str, labels: int, seed: int, loading: Any = None) -> nn.Module:
        from transformers import AutoModelForSeq2SeqLM

        network = load_complete(AutoModelForSeq2SeqLM, model, loading)
        prepare_loss(network, move_batch(self.probe(network), next(network.parameters()).device))
        return network

    def probe(self, network: Any) -> Batch:
        draws = torch.Generator().manual_seed(0)
        ids, target = (torch.randint(network.config.vocab_size, (4, size), generator=draws) for size in (12, 5))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": target}

    def preprocessor(self, model: str) -> Any:
        return load_tokenizer(model)

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Return a batch, padded to its longest source and its longest target; padded labels are -100."""
        ids, mask = _pad(examples, "source", rows, int(examples.features["pad"]))
        labels, _ = _pad(examples, "target", rows, IGNORED)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    def padded_lengths(self, examples: Examples, rows: Tensor) -> Tensor:
        """Return the lengths of sources and targets (b, 2)."""
        ends = [examples.features[f"{name}_offsets"] for name in ("source", "target")]
        return torch.stack([offsets[rows + 1] - offsets[rows] for offsets in ends], 1)

    def inputs(self, network: Any, batch: Batch) -> Inputs:
        """Return the network's arguments; the decoder's inputs are the targets shifted by one."""
        shifted = network.prepare_decoder_input_ids_from_labels(batch["labels"])
        others = {name: x for name, x in batch.items() if name != "labels"}
        return {**others, "decoder_input_ids": shifted, "use_cache": False}

    def targets(self, batch: Batch) -> Tensor:
        return batch["labels"]

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return each row's negative log-likelihood and number of target tokens."""
        return self.sums(network, batch)[:, :2].float()

    def evaluate(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """Return each row's ``outputs``, and the exact match and F1 of the generated answer."""
        batch = move_batch(self.collate(examples, rows), device)
        outputs = self.outputs(network, batch)
        if self.metric == "nll":
            return outputs
        assert examples.texts is not None, "rows have right answers"
        golds = [examples.texts[row]["golds"] for row in rows.tolist()]
        answers = zip(self.answers(network, batch), golds)
        pairs = [(float(exact_match(text, right)), answer_f1(text, right)) for text, right in answers]
        return torch.cat([outputs, torch.tensor(pairs, device=device)], 1)

    @torch.no_grad()
    def answers(self, network: nn.Module, batch: Batch) -> list[str]:
        """Return the network's greedy answers, without special tokens."""
        tokenizer, first = load_tokenizer(network.config.name_or_path), network.generation_config.decoder_start_token_id
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        options["eos_token_id"] = tokenizer.eos_token_id
        options["decoder_start_token_id"] = network.config.decoder_start_token_id if first is None else first
        with generation_config(network, tokenizer, **options):
            output = network.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Return sums over target tokens, and over rows if answers were generated."""
        nll, tokens, *right = outputs.double().sum(0).tolist()
        names = ("exact_match", "answer_f1")
        return Scores({"nll": (nll, int(tokens)), **{n: (x, len(outputs)) for n, x in zip(names, right)}})


def _pad(examples: Examples, name: str, rows: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of some rows, padded on the right to the longest, and their mask."""
    places, mask = locate_rows(examples.features[f"{name}_offsets"], rows)
    return torch.where(mask, examples.features[name][places].long(), fill), mask


def _encode_targets(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the tokens of target texts, each with an end token."""
    end, rows = tokenizer.eos_token_id, tokenizer(text_target=texts)["input_ids"]
    return [ids if end is None or (ids and ids[-1] == end) else [*ids, end] for ids in rows]


def read_pairs(
    split: Any, source: str | None, target: str | None, names: Sequence[str] | None = None, role: str = "training",
    allow_empty: bool = False,
) -> tuple[list[str], list[list[str]], list[str]]:  # fmt: skip
    """Return each row's source, its right answers, the first of which is learnt, and notes on how they were read.

    ``source`` and ``target`` are columns or templates; None: the first usual ones that the data has. ``names`` are all
    texts that a target may be; None: any. With ``allow_empty`` a row without a target has no answers.
    """
    source, target = _choose_columns(split, source, target)
    sources = templates.fill_rows(source, split, "task.source")
    if "{" in target:
        targets = templates.fill_rows(target, split, "task.target", allow_missing=allow_empty)
        empty = sum(not text.strip() for text in targets)
        if empty and not allow_empty:
            raise ValueError(f"task.target is empty in {empty} of {len(targets)} rows; {DROP}.")
        return sources, [[text] if text.strip() else [] for text in targets], []
    values = read_column(split, target, "task.target", allow_empty)
    if names:
        classes = Classes(tuple(names), True, key="task.target")
        present = [i for i, value in enumerate(values) if not _is_blank(value)]
        rows = split if len(present) == len(values) else split.select(present)
        numbers = dict(zip(present, classes.of_rows(rows, target, role).tolist(), strict=True))
        answers = [[classes.names[numbers[i]]] if i in numbers else [] for i in range(len(values))]
        return sources, answers, classes.notes(rows, target, role)
    label_names = getattr(split.features.get(target), "names", None)
    return sources, [_read_answers(value, label_names, target, allow_empty) for value in values], []


def _choose_columns(split: Any, source: str | None, target: str | None) -> tuple[str, str]:
    if source is not None and target is not None:
        return templates.to_template(source), target
    for template, column in USUAL:
        if {*templates.template_columns(template), column} <= set(split.column_names):
            return template, column
    raise ValueError(f"no source and target among {', '.join(split.column_names)}; set task.source and task.target.")


def _read_answers(value: Any, names: Sequence[str] | None, column: str, allow_empty: bool) -> list[str]:
    """Return a row's right answers. An empty list of answers means an unanswerable question (SQuAD 2): ``[""]``."""
    if allow_empty and _is_blank(value):
        return []
    answer = value["text"] if isinstance(value, dict) and "text" in value else value
    if isinstance(answer, list) and all(isinstance(text, str) for text in answer):
        return answer or [""]
    if isinstance(answer, bool) or not isinstance(answer, str | int):
        raise ValueError(f"column {column!r} (task.target) holds {value!r}; it needs text, or a list of texts.")
    if isinstance(answer, int) and names is not None:
        if not 0 <= answer < len(names):
            raise ValueError(f"column {column!r} (task.target) holds {answer}, but there are {len(names)} label names.")
        return [names[answer]]
    if not str(answer).strip():
        raise ValueError(f"column {column!r} (task.target) holds an empty text; {DROP}.")
    return [str(answer)]


def _is_blank(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, str) and not value.strip())
