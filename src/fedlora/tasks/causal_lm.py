"""Causal language models: prompt and response, chat messages, or plain text."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Data, Examples, Supervised
from fedlora.tasks.data import rows as source
from fedlora.tasks.data.few_shot import BETWEEN, Asked, asked, golds, prompts_of, shots
from fedlora.tasks.data.templates import (
    MESSAGES,
    PromptTemplate,
    Segment,
    chosen,
    columns,
    conversations,
    left_out,
    selected,
    strata,
)
from fedlora.tasks.data.tokens import IGNORED, Side, Tokens, cut, encoded, flat, packed, padded
from fedlora.tasks.metrics.answers import right
from fedlora.tasks.metrics.scores import Scores
from fedlora.tasks.networks.generation import Writing, generate
from fedlora.tasks.networks.pretrained import quietly, tokenizer, whole

LEAK = 0.1  # of what a row before changes when nothing keeps it apart; rounding is a fifth of it in bfloat16


@dataclass(frozen=True)
class CausalLM(Supervised):
    """The ``[task]`` table of causal language models."""

    data: PerMachine[str]  # a hub id, a folder, a file
    data_config: PerMachine[str | None] = None  # of a hub id that has several
    encoding: PerMachine[str | None] = None  # of CSV and JSON files; None: as the file shows, else UTF-8
    delimiter: PerMachine[str | None] = None  # of CSV files; None: as the header shows
    prompt: PerMachine[str | None] = None  # a column, or a template such as "{instruction}\n\n{context}"
    response: PerMachine[str | None] = None  # the same for what is learnt; None: the usual names
    messages: PerMachine[str | None] = None  # or a column of chat messages, each with role and content
    text: PerMachine[str | None] = None  # or plain text, all of it learnt
    chat_template: str | None = None  # for messages, in the place of the tokenizer's own (Jinja)
    label: PerMachine[str | None] = None  # a column that partitions by label go by, such as a category
    train_split: PerMachine[str] = "train"
    test_split: PerMachine[str] = "test"
    max_length: int = 512  # tokens of a row; longer rows are cut
    truncation_side: Side = "right"  # where they are cut
    drop_unlearnable: bool = False  # leave out rows in which nothing is left to learn; False: they are an error
    packing: bool = False  # train on several rows in one sequence of up to max_length tokens
    train_rows: int | None = None  # a seeded draw of so many rows
    test_rows: int | None = None
    metric: str = "perplexity"  # or "token_accuracy" of the response, or "exact_match" of a generated answer
    answer: Literal["number", "text"] = "number"  # what exact_match compares
    answer_column: str | None = None  # the right answer; None: the response
    shots: int = 0  # solved training rows before each prompt, for exact_match
    max_new_tokens: int = 256  # of a generated answer
    stop: list[str] | None = None  # strings that end one; None: with shots, a blank line
    auto: ClassVar[str] = "AutoModelForCausalLM"
    peft: ClassVar[str | None] = "CAUSAL_LM"
    quantizes: ClassVar[bool] = True
    brings_head: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy", "exact_match")

    def __post_init__(self):
        super().__post_init__()
        source.text_format(self)
        if self.max_length < 2:
            raise ValueError(f"task.max_length is {self.max_length}; a token is told from one before: at least 2.")
        if self.shots < 0:
            raise ValueError(f"task.shots is {self.shots}; it must be at least 0.")
        if (self.prompt is None) != (self.response is None):
            given, lacks = ("response", "prompt") if self.prompt is None else ("prompt", "response")
            raise ValueError(f"task.{given} is set without task.{lacks}; set both, or task.text for plain text.")
        ways = [key for key in ("prompt", "messages", "text") if getattr(self, key) is not None]
        if len(ways) > 1:
            raise ValueError(f"task.{ways[0]} and task.{ways[1]} are both set; keep one of them.")
        if self.graded_by_answer and self.text is not None:
            raise ValueError("task.metric is 'exact_match', but plain text asks nothing; set prompt and response.")
        if self.shots and self.messages is not None:
            raise ValueError("task.shots works with task.prompt and task.response; leave it out with messages.")
        self.writing  # noqa: B018 - wrong settings are said at once

    @property
    def graded_by_answer(self) -> bool:
        """Whether evaluation generates answers."""
        return self.metric == "exact_match"

    @property
    def writing(self) -> Writing:
        """How answers are generated."""
        stop = self.stop if self.stop is not None else [BETWEEN] * bool(self.shots)
        return Writing(self.max_new_tokens, stop=tuple(stop))

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Reads, checks and tokenises both splits once."""
        splits = source.splits(
            self.data, self.data_config, self.train_split, [self.test_split], seed, source.text_format(self)
        )
        wanted = ((self.train_rows, "training"), (self.test_rows, "test"))
        both = [source.subset(x, rows, None, "", seed, what) for x, (rows, what) in zip(splits, wanted)]
        tokenizer, context = self.preprocessor(model), context_length(model)
        read = [self._learnable(x, tokenizer, what) for x, (_, what) in zip(self._completed(*both), wanted)]
        (train, test), rows, encoded_rows, said = zip(*read)
        notes = tuple(note for some in said for note in some)
        kinds = strata(train, test, self.label)
        first, last = (
            self._examples(split, some, kind, tokenizer, context, what, client_column)
            for split, some, kind, (_, what) in zip((train, test), encoded_rows, kinds, wanted)
        )
        if self.graded_by_answer:
            ask = self._asked(test, rows, kinds, tokenizer, context, seed)
            features = {**last.features, **ask.features()}
            last = Examples(features, last.labels, last.lengths, last.groups, last.strata, ask.texts)
            notes += (ask.note + ".",) if ask.note else ()
        return Data(first, last, (), notes)

    def template(self, there: list[str]) -> PromptTemplate | None:
        """The templates of rows with these columns; None for chat messages."""
        named = self.prompt or self.text
        if self.messages is not None or (named is None and MESSAGES in there):
            return None
        return chosen(there, self.prompt, self.response, self.text)

    def _completed(self, train: Any, test: Any) -> tuple[Any, Any]:
        """Both splits with all columns of the prompt: a key that no row of one of them has is empty there."""
        there = list(dict.fromkeys([*train.column_names, *test.column_names]))
        template = self.template(there)
        named = columns(template.prompt) if template is not None else []
        for name in (name for name in named if name in there):
            train, test = (
                split if name in split.column_names else split.add_column(name, [None] * len(split))
                for split in (train, test)
            )
        return train, test

    def _worded(self, split: Any, tokenizer: Any) -> list[list[Segment]]:
        template = self.template(split.column_names)
        if template is None:
            return conversations(split, self.messages or MESSAGES, tokenizer, self.drop_unlearnable)
        return template.rows(split, self.drop_unlearnable)

    def _learnable(
        self, split: Any, tokenizer: Any, what: str
    ) -> tuple[Any, list[list[Segment]], list[Tokens], list[str]]:
        """The rows with something to learn: as they lie, in words and in tokens; and notes on the others."""
        rows, count = self._worded(split, tokenizer), len(split)
        if self.drop_unlearnable:
            kept = [any(learnt and text.strip() for text, learnt in row) for row in rows]
            split, rows = selected(kept, split, rows)
        special = self.template(split.column_names) is not None  # a chat template writes its own start token
        made = encoded(rows, tokenizer, special) if rows else []
        how = (self.max_length, self.truncation_side, tokenizer.bos_token_id, what)
        if self.drop_unlearnable:
            kept = [any(row.learnt) for row in cut(made, *how, blank=True)[0]]
            split, rows, made = selected(kept, split, rows, made)
        dropped = left_out(count, len(made), what, "; raise task.max_length, or give the rows responses")
        found, note = cut(made, *how)
        return split, rows, found, [text for text in (dropped, note) if text]

    def _examples(
        self, split: Any, found: list[Tokens], kinds: Tensor | None, tokenizer: Any, context: int, what: str,
        client_column: str | None,
    ) -> Examples:  # fmt: skip
        features, lengths = flat(found, tokenizer.pad_token_id)
        longer = int((lengths > context).sum())
        if longer:
            raise ValueError(
                f"the model reads at most {context} tokens, and {longer} of {len(found)} {what} rows would have more; "
                f"set task.max_length to {context} (it is {self.max_length})."
            )
        labels = torch.zeros(len(found), dtype=torch.int64)  # a row has none
        groups = source.groups(split, client_column, what)
        return Examples(features, labels, lengths, groups, kinds)

    def _asked(self, test: Any, rows: Any, kinds: Any, tokenizer: Any, context: int, seed: int) -> Asked:
        room = context - self.max_new_tokens
        if room < 1:
            raise ValueError(
                f"task.max_new_tokens is {self.max_new_tokens}, but the model reads at most {context} tokens, prompt "
                "included; lower it."
            )
        template = self.template(test.column_names)
        if template is not None and not columns(template.prompt):
            raise ValueError(
                "task.metric is 'exact_match', but plain text asks nothing; set task.prompt and task.response."
            )
        if template is None and self.shots:
            raise ValueError("task.shots works with task.prompt and task.response; leave it out with messages.")
        train, test_rows = rows
        both = [[0] * len(part) if of is None else of.tolist() for part, of in zip(rows, kinds)]
        before = shots(train, *both, self.shots, seed) if self.shots else [""] * len(test_rows)
        answers = golds(test, test_rows, self.answer_column, self.answer)
        return asked(test_rows, answers, before, tokenizer, room, template is None)

    def agreed(self) -> tuple[str, ...] | None:
        """A row has no label."""
        return ()

    def network(self, model: str, labels: int, seed: int, loading: Any = None) -> nn.Module:
        """The pretrained network as it is; ``loading`` as ``networks.quantised`` makes it."""
        from transformers import AutoModelForCausalLM

        found = whole(AutoModelForCausalLM, model, loading)
        if self.packing:
            keeps_apart(found)
        return found

    def probe(self, network: nn.Module) -> Batch:
        """Some tokens, to compare two networks on."""
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(network.config.get_text_config().vocab_size, (4, 12), generator=draws)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def preprocessor(self, model: str) -> Any:
        """The tokenizer."""
        return tokenizer(model, self.chat_template)

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """A batch to train on: a row a sequence, or packed."""
        return packed(examples, rows, self.max_length) if self.packing else padded(examples, rows)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch's learnt tokens, in float32 whatever the network runs in."""
        logits, labels = _told(network, batch)
        return functional.cross_entropy(logits, labels)

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Each row's mean cross-entropy over its own learnt tokens (b,)."""
        nll, tokens, _ = self.outputs(network, batch).unbind(1)
        return nll / tokens.clamp_min(1)

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Each row's negative log-likelihood, learnt tokens, and how many of these are the likeliest."""
        logits, labels = _told(network, batch)
        row = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        figures = [functional.cross_entropy(logits, labels, reduction="none"), torch.ones_like(row)]
        figures.append(logits.argmax(-1) == labels)
        zeros = torch.zeros(len(batch["labels"]), dtype=torch.float64, device=row.device)
        return torch.stack([zeros.index_add(0, row, x.double()) for x in figures], 1)

    def graded(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """What ``outputs`` has of each row, and whether the answer that is generated is right."""
        batch = {name: x.to(device) for name, x in padded(examples, rows).items()}
        found = self.outputs(network, batch).cpu()
        if not self.graded_by_answer:
            return found
        assert examples.texts is not None, "the test rows say what is right"
        prompts = prompts_of(examples.features, rows)
        own = self.preprocessor(network.config.name_or_path)
        said = generate(network, own, prompts, self.writing)
        hits = [right(text, examples.texts[i]["gold"], self.answer) for i, text in zip(rows.tolist(), said)]
        return torch.cat([found, torch.tensor(hits).double()[:, None]], 1)

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Sums over tokens, and over rows where answers were generated."""
        nll, tokens, told, *hits = outputs.double().sum(0).tolist()
        sums = {"nll": (nll, int(tokens)), "token_accuracy": (int(told), int(tokens))}
        if hits:
            sums["exact_match"] = (int(hits[0]), len(outputs))
        return Scores(sums)


def _told(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The float32 logits of all learnt tokens of a batch, and these tokens."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    logits, labels = network(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    learnt = labels != IGNORED
    return logits[learnt].float(), labels[learnt]


@torch.no_grad()
def keeps_apart(network: nn.Module) -> None:
    """``ValueError`` where rows in one sequence see each other, whatever their positions say."""
    draws = torch.Generator().manual_seed(0)
    device = next(network.parameters()).device
    ids = torch.randint(network.config.get_text_config().vocab_size, (1, 24), generator=draws).to(device)
    positions = torch.arange(12, device=device).repeat(2)[None]
    training = network.training
    network.eval()
    try:
        apart, mixed = (
            network(input_ids=ids, **x, use_cache=False).logits[:, 12:] for x in ({"position_ids": positions}, {})
        )
        alone = network(input_ids=ids[:, 12:], use_cache=False).logits
        away, most = ((x - alone).abs().max() for x in (apart, mixed))
        leaks = bool(away > most * (LEAK if getattr(network, "is_quantized", False) else LEAK / 100))
    except TypeError:  # it takes no positions
        leaks = True
    finally:
        network.train(training)
    if leaks:
        raise ValueError(
            f"task.packing is set, but rows in one sequence would see each other in {type(network).__name__}; "
            "set task.packing = false."
        )


def context_length(model: str) -> int:
    """How many tokens the model reads at most."""
    from transformers import AutoConfig

    config = quietly(AutoConfig, model).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    return min(most or 10**9, tokenizer(model).model_max_length)
