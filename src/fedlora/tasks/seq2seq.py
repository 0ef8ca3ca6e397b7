"""Sequence to sequence: a source text, a target text, as T5 does classification and question answering."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Data, Examples, Supervised
from fedlora.tasks.data import rows as source
from fedlora.tasks.data.columns import DROP, texts
from fedlora.tasks.data.labels import check_names
from fedlora.tasks.data.templates import checked, left_out, selected, strata
from fedlora.tasks.metrics.scores import Scores
from fedlora.tasks.metrics.squad import answer_f1, exact_match
from fedlora.tasks.networks.pretrained import quietly, tokenizer, whole

IGNORED = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class Seq2Seq(Supervised):
    """The ``[task]`` table of sequence-to-sequence models."""

    data: PerMachine[str]  # a hub id, a folder, a file
    data_config: PerMachine[str | None] = None  # of a hub id that has several
    encoding: PerMachine[str | None] = None  # of CSV and JSON files; None: as the file shows, else UTF-8
    delimiter: PerMachine[str | None] = None  # of CSV files; None: as the header shows
    source: str | None = None  # a column, or a template such as "question: {question} context: {context}"
    target: str | None = None  # a column: text, a list of right answers, or SQuAD's {"text": [...]}; or a template
    label: PerMachine[str | None] = None  # a column that partitions by label go by, such as the class
    label_names: list[str] | None = None  # all texts that a target may be; numbers are matched with them
    train_split: PerMachine[str] = "train"
    test_split: PerMachine[str] = "test"
    max_source_length: int = 512  # tokens; longer sources are cut
    max_target_length: int = 64  # tokens; longer targets are an error
    max_new_tokens: int = 32  # of a generated answer
    drop_unlearnable: bool = False  # leave out rows without source or target, or with one too long; False: an error
    train_rows: int | None = None  # a seeded draw of so many rows
    test_rows: int | None = None
    metric: str = "exact_match"  # or "answer_f1", or "nll" without generating anything
    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    brings_head: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("exact_match", "answer_f1", "nll")

    def __post_init__(self):
        super().__post_init__()
        source.text_format(self)
        for key in ("max_source_length", "max_target_length", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"task.{key} is {getattr(self, key)}; it must be at least 1 token.")
        if (self.source is None) != (self.target is None):
            given, lacks = ("target", "source") if self.source is None else ("source", "target")
            raise ValueError(f"task.{given} is set without task.{lacks}; set both, or neither for the usual columns.")
        for key, template in (("task.source", self.source), ("task.target", self.target)):
            checked(template or "", key)
        check_names(self.label_names)
        if self.label_names and "{" in (self.target or ""):
            raise ValueError(
                "task.label_names names what a target column holds, and task.target is a template; keep one."
            )

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Reads, checks and tokenises both splits once."""
        splits = source.splits(
            self.data, self.data_config, self.train_split, [self.test_split], seed, source.text_format(self)
        )
        wanted = ((self.train_rows, "training"), (self.test_rows, "test"))
        both = [source.subset(x, rows, None, "", seed, what) for x, (rows, what) in zip(splits, wanted)]
        found, notes = [], []
        if self.drop_unlearnable:
            both, notes = map(list, zip(*(self._learnable(x, model, what) for x, (_, what) in zip(both, wanted))))
        for split, kinds, what in zip(both, strata(*both, self.label), ("training", "test")):
            groups = source.groups(split, client_column, what)
            examples, more = self._encoded(split, model, kinds, groups, what)
            found.append(examples)
            notes += more
        return Data(*found, (), tuple(note for note in notes if note))

    def _learnable(self, split: Any, model: str, what: str) -> tuple[Any, str]:
        """The rows with a source, and a target within the limit; and a note on the others."""
        sources, golds, _ = texts(split, self.source, self.target, self.label_names, what, blank=True)
        own = tokenizer(model)
        ids = own(text_target=[right[0] if right else "" for right in golds])["input_ids"]
        fits = [len(_ended(one, own.eos_token_id)) <= self.max_target_length for one in ids]
        kept = [bool(text.strip() and right and fit) for text, right, fit in zip(sources, golds, fits)]
        (some,) = selected(kept, split)
        return some, left_out(len(kept), sum(kept), what, "; raise task.max_target_length, or give the rows texts")

    def _encoded(self, split: Any, model: str, kinds: Any, groups: Any, what: str) -> tuple[Examples, list[str]]:
        """The rows, encoded, and what has to be said of them."""
        sources, golds, notes = texts(split, self.source, self.target, self.label_names, what)
        empty = sum(not text.strip() for text in sources)
        if empty:
            raise ValueError(f"{empty} {what} rows have an empty source (task.source); {DROP}.")
        own, most = tokenizer(model), _most(model)
        asked = own(sources, return_attention_mask=False, verbose=False)["input_ids"]
        cut = sum(len(ids) > self.max_source_length for ids in asked)
        if cut:  # anew, so that the end token stays
            short = own(sources, truncation=True, max_length=self.max_source_length, return_attention_mask=False)
            asked = short["input_ids"]
        learnt = [_ended(ids, own.eos_token_id) for ids in own(text_target=[g[0] for g in golds])["input_ids"]]
        self._check(asked, learnt, most, what)
        features = {"pad": torch.tensor(own.pad_token_id), **_flat("source", asked), **_flat("target", learnt)}
        lengths = torch.tensor([len(ids) for ids in asked])
        rows = tuple({"source": text, "golds": tuple(right)} for text, right in zip(sources, golds))
        if cut:
            notes.append(f"{cut} of {len(asked)} {what} sources were cut to {self.max_source_length} tokens.")
        return Examples(features, torch.zeros(len(asked), dtype=torch.int64), lengths, groups, kinds, rows), notes

    def _check(self, asked: list, learnt: list, most: int, what: str) -> None:
        longer = sum(len(ids) > self.max_target_length for ids in learnt)
        if longer:
            raise ValueError(
                f"{longer} {what} rows have a target of more than task.max_target_length = {self.max_target_length} "
                f"tokens, the longest {max(map(len, learnt))}; raise it, drop these rows, or set "
                "task.drop_unlearnable = true."
            )
        if max(map(len, asked)) > most or max(map(len, learnt)) > most:
            raise ValueError(
                f"some {what} rows have more than the {most} tokens that the model reads at most; "
                f"set task.max_source_length to {most}, and drop rows whose target is longer."
            )

    def agreed(self) -> tuple[str, ...] | None:
        """A row has no label that a network would need to know."""
        return ()

    def network(self, model: str, labels: int, seed: int) -> nn.Module:
        """The pretrained network as it is: its head is pretrained, so nothing is trained in full unless named."""
        from transformers import AutoModelForSeq2SeqLM

        return whole(AutoModelForSeq2SeqLM, model)

    def probe(self, network: nn.Module) -> Batch:
        """Some tokens, to compare two networks on."""
        draws = torch.Generator().manual_seed(0)
        ids, said = (torch.randint(network.config.vocab_size, (4, size), generator=draws) for size in (12, 5))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": said}

    def preprocessor(self, model: str) -> Any:
        """The tokenizer."""
        return tokenizer(model)

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """A batch padded to its longest source and its longest target; padding is labelled -100."""
        ids, mask = _padded(examples, "source", rows, int(examples.features["pad"]))
        labels, _ = _padded(examples, "target", rows, IGNORED)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch's target tokens, in float32 whatever the network runs in."""
        return functional.cross_entropy(_logits(network, batch).mT, batch["labels"], ignore_index=IGNORED)

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Each row's mean cross-entropy over its own target tokens (b,)."""
        nll, tokens = self.outputs(network, batch).unbind(1)
        return nll / tokens.clamp_min(1)

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Each row's negative log-likelihood and number of target tokens."""
        logits, labels = _logits(network, batch), batch["labels"]
        each = functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
        return torch.stack([each.sum(1), (labels != IGNORED).sum(1).float()], 1)

    def graded(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """What ``outputs`` has of each row, and how right the answer is that is generated."""
        batch = {name: x.to(device) for name, x in self.collate(examples, rows).items()}
        found = self.outputs(network, batch).cpu()
        if self.metric == "nll":
            return found
        assert examples.texts is not None, "the rows say what is right"
        said = self.answers(network, batch)
        golds = [examples.texts[row]["golds"] for row in rows.tolist()]
        pairs = [(float(exact_match(text, right)), answer_f1(text, right)) for text, right in zip(said, golds)]
        return torch.cat([found, torch.tensor(pairs)], 1)

    @torch.no_grad()
    def answers(self, network: nn.Module, batch: Batch) -> list[str]:
        """What the network says to each source: greedy, in one batch, without special tokens."""
        own = tokenizer(network.config.name_or_path)
        before = network.generation_config
        # Swapped, since transformers fills in whatever a checkpoint sets (beams, penalties) and we leave out.
        network.generation_config = _greedy(network, own, self.max_new_tokens)
        try:
            found = network.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        finally:
            network.generation_config = before
        return [text.strip() for text in own.batch_decode(found, skip_special_tokens=True)]

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Sums over target tokens, and over rows where answers were generated."""
        nll, tokens, *right = outputs.double().sum(0).tolist()
        names = ("exact_match", "answer_f1")
        return Scores({"nll": (nll, int(tokens)), **{n: (x, len(outputs)) for n, x in zip(names, right)}})


def _logits(network: nn.Module, batch: Batch) -> Tensor:
    """Rows by target tokens by vocabulary, float32; the decoder sees the targets shifted by one."""
    before = network.prepare_decoder_input_ids_from_labels(batch["labels"])
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    found: Tensor = network(**inputs, decoder_input_ids=before, use_cache=False).logits.float()
    return found


def _greedy(network: nn.Module, own: Any, tokens: int) -> Any:
    from transformers import GenerationConfig

    config, first = network.config, network.generation_config.decoder_start_token_id
    return GenerationConfig(
        max_new_tokens=tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=own.pad_token_id,
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id,
        decoder_start_token_id=first if first is not None else config.decoder_start_token_id,
    )  # fmt: skip


def _flat(name: str, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Without padding, in 32 bits: long texts in little memory."""
    lengths = torch.tensor([len(ids) for ids in rows])
    return {
        name: torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32),
        f"{name}_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
    }


def _padded(examples: Examples, name: str, rows: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    """Rows by their longest, padded on the right, and where they are no padding."""
    offsets = examples.features[f"{name}_offsets"]
    lengths = offsets[rows + 1] - offsets[rows]
    places = torch.arange(int(lengths.max()))
    mask = places < lengths[:, None]
    at = torch.where(mask, offsets[rows, None] + places, 0)
    return torch.where(mask, examples.features[name][at].long(), fill), mask


def _ended(ids: list[int], end: int | None) -> list[int]:
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _most(model: str) -> int:
    """How many tokens the model reads at most; T5's positions are relative and have no end."""
    from transformers import AutoConfig

    found: int = getattr(quietly(AutoConfig, model), "max_position_embeddings", None) or 10**9
    return found
