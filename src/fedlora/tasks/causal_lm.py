"""Causal language models: prompt and response, chat messages, or plain text."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Data, Examples, move_batch
from fedlora.tasks._tokens import TokenTask
from fedlora.tasks.data import templates
from fedlora.tasks.data.chat_templates import ChatRenderer, Turns
from fedlora.tasks.data.choices import (
    Style,
    check_style,
    cover_choices,
    encode_choices,
    grade_choices,
    log_likelihoods,
    write_choices,
)
from fedlora.tasks.data.conversations import Conversation, find_columns, read_conversations, remove_thinking
from fedlora.tasks.data.few_shot import BETWEEN, draw_shots, encode_prompts, read_golds, select_prompts
from fedlora.tasks.data.rows import client_groups
from fedlora.tasks.data.tokens import (
    IGNORED,
    Side,
    Tokens,
    encode,
    flatten_tokens,
    pack_batch,
    pad_batch,
    random_batch,
    split_sequences,
    truncate_rows,
)  # fmt: skip
from fedlora.tasks.metrics.answers import Kind, grade_answers
from fedlora.tasks.metrics.scores import CHOICE, Scores
from fedlora.tasks.networks.generation import GenerationSettings, generate
from fedlora.tasks.networks.next_token_loss import Inputs, loss_of, prepare_loss
from fedlora.tasks.networks.pretrained import load_complete, load_quietly, load_tokenizer, max_positions

PLAIN = "task.metric is 'exact_match', but plain text asks nothing; set task.prompt and task.response."
LEAK = 0.1  # largest tolerated influence of the row before, relative to no separation; bfloat16 rounding is a fifth


@dataclass(frozen=True)
class CausalLM(TokenTask):
    """The ``[task]`` table of causal language models."""

    prompt: PerMachine[str | None] = None  # a column, or a template such as "{instruction}\n\n{context}"
    response: PerMachine[str | None] = None  # the same for the learnt text; None: the usual names
    messages: PerMachine[str | list[str] | None] = None  # or a column of chat messages; or two, prompt and completion
    tools: PerMachine[str | None] = None  # a column of tools for the chat template; None: "tools"; "": no tools
    text: PerMachine[str | None] = None  # or plain text, all of it learnt
    chat_template: str | None = None  # for messages, in place of the tokenizer's (Jinja)
    turns: Turns = "all"  # learn every answer of a chat, or only the "last"
    label: PerMachine[str | None] = None  # a column for partitions by label, such as a category
    max_length: int = 512  # tokens of a row; longer rows are cut
    truncation_side: Side = "right"  # of the cuts
    drop_unlearnable: bool | None = None  # leave out rows with nothing to learn, or stop; None: only chats are left out
    packing: bool = False  # train on several rows in one sequence of up to max_length tokens
    # or "token_accuracy" of the response, "exact_match" of a generated answer, "choice_accuracy" of the likeliest
    metric: str = "perplexity"  # choice, or "choice_accuracy_norm" of the choice that is likeliest per character
    answer: Kind = "number"  # the kind of answer that exact_match compares: "number", "text" or "math" (LaTeX)
    answer_column: str | None = None  # the right answer; None: the response
    choices: PerMachine[str | list[str] | None] = None  # a column of lists, or the choices of all rows
    choice_style: Style = "text"  # the response is a choice's text, or its "label" such as B
    shots: int = 0  # solved training rows before each prompt, for exact_match and choice_accuracy
    max_new_tokens: int = 256  # of a generated answer
    stop: list[str] | None = None  # strings that end an answer; None: with shots, a blank line
    auto: ClassVar[str] = "AutoModelForCausalLM"
    peft: ClassVar[str | None] = "CAUSAL_LM"
    quantizes: ClassVar[bool] = True
    accepts_loading: ClassVar[bool] = True
    brings_head: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy", "exact_match", *CHOICE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(
                f"task.max_length is {self.max_length}; each token is predicted from the previous one, so a row needs "
                "at least 2."
            )
        if self.shots < 0:
            raise ValueError(f"task.shots is {self.shots}; it must be at least 0.")
        if (self.prompt is None) != (self.response is None):
            given, lacks = ("response", "prompt") if self.prompt is None else ("prompt", "response")
            raise ValueError(f"task.{given} is set without task.{lacks}; set both, or task.text for plain text.")
        ways = [key for key in ("prompt", "messages", "text") if getattr(self, key) is not None]
        if len(ways) > 1:
            raise ValueError(f"task.{ways[0]} and task.{ways[1]} are both set; keep one of them.")
        if isinstance(self.messages, list) and len(self.messages) != 2:
            raise ValueError(
                f"task.messages names {len(self.messages)} columns; it is one column, or two: the messages of a prompt "
                "and of its completion."
            )
        if self.grades_answers and self.text is not None:
            raise ValueError(PLAIN)
        if self.shots and self.messages is not None:
            raise ValueError("task.shots works with task.prompt and task.response; leave it out with messages.")
        if self.grades_choices and self.choices is None:
            raise ValueError(f"task.metric is {self.metric!r}, which needs task.choices: a column of lists, or a list.")
        if self.choices is not None and (self.messages is not None or self.text is not None):
            raise ValueError(
                "task.choices works with task.prompt and task.response; leave it out with messages or text."
            )
        self.generation  # noqa: B018 - raises if a setting is wrong

    @property
    def grades_answers(self) -> bool:
        """Whether evaluation generates answers."""
        return self.metric == "exact_match"

    @property
    def grades_choices(self) -> bool:
        """Whether evaluation compares the likelihoods of choices."""
        return self.metric in CHOICE

    @property
    def generation(self) -> GenerationSettings:
        """The settings for generated answers."""
        stop = self.stop if self.stop is not None else [BETWEEN] * bool(self.shots)
        return GenerationSettings(self.max_new_tokens, stop=tuple(stop))

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Read, check and tokenize both splits once."""
        both = self.draw_splits(self.load_splits(seed), seed)
        tokenizer, context = self.preprocessor(model), context_length(model)
        roles = ("training", "test")
        both = [self._write_choices(split, role) for split, role in zip(self._add_columns(*both), roles)]
        learnable = [self._select_learnable(split, tokenizer, role) for split, role in zip(both, roles)]
        splits, segments, tokens, notes = zip(*learnable)
        strata = templates.label_strata(splits[0], splits[1], self.label)
        train, test = (
            self._build_examples(split, rows, kinds, tokenizer, context, role, client_column)
            for split, rows, kinds, role in zip(splits, tokens, strata, roles)
        )
        messages = [note for several in notes for note in several]
        if self.grades_answers:
            prompts, texts, note = self._build_prompts(splits[1], segments, strata, tokenizer, context, seed)
            test = replace(test, features={**test.features, **prompts}, texts=texts)
            messages += [note] if note else []
        elif self.grades_choices:
            template = self._prompt_template(splits[1])
            shots, answer = self._draw_shots(segments, strata, seed), self._answer_of(template)
            choices, note = encode_choices(splits[1], template, answer, shots, tokenizer, context)
            test = replace(test, features={**test.features, **choices})
            messages += [note] if note else []
        return Data(train, test, (), tuple(messages))

    def chat_columns(self, *splits: Any) -> tuple[str, ...]:
        """Return the columns of chat messages: of the settings, or the usual ones of these splits; empty: no chat."""
        if self.messages is not None:
            return (self.messages,) if isinstance(self.messages, str) else tuple(self.messages)
        return find_columns(splits) if self.prompt is None and self.text is None else ()

    def template(self, *splits: Any) -> templates.PromptTemplate | None:
        """Return the template for the rows of these splits, of which settings need none; None for chat messages."""
        if self.chat_columns(*splits):
            return None
        available = list(dict.fromkeys(name for split in splits for name in split.column_names))
        return templates.choose_template(available, self.prompt, self.response, self.text)

    def _add_columns(self, train: Any, test: Any) -> tuple[Any, Any]:
        """Return both splits with all columns of the prompt; a column that only one split has is empty in the other."""
        template = self.template(train, test)
        for name in templates.template_columns(template.prompt) if template is not None else []:
            if name in {*train.column_names, *test.column_names}:
                train, test = (
                    split if name in split.column_names else split.add_column(name, [None] * len(split))
                    for split in (train, test)
                )
        return train, test

    def _prompt_template(self, split: Any) -> templates.PromptTemplate:
        """Return the template of rows with a prompt. Raises ``ValueError`` for messages and plain text."""
        template = self.template(split)
        if template is None or not templates.template_columns(template.prompt):
            raise ValueError("task.choices needs rows with a prompt and a response; set task.prompt and task.response.")
        return template

    def _answer_of(self, template: templates.PromptTemplate) -> str:
        """Return the column of the right choice."""
        names = templates.template_columns(template.response)
        if self.answer_column is None and len(names) > 1:
            raise ValueError(
                f"task.response has the columns {', '.join(names)}; set task.answer_column to one of them."
            )
        return self.answer_column or names[0]

    def _write_choices(self, split: Any, role: str) -> Any:
        """Return the split with the right choice as its answer, if rows have choices."""
        if self.choices is None:
            return split
        template = self._prompt_template(split)
        answer = self._answer_of(template)
        check_style(self.choice_style, self.choices, template, answer)
        return write_choices(split, self.choices, answer, self.choice_style, role)

    def _draw_shots(self, segments: Any, strata: Any, seed: int) -> list[str]:
        kinds, wanted = ([0] * len(rows) if x is None else x.tolist() for rows, x in zip(segments, strata))
        return draw_shots(segments[0], kinds, wanted, self.shots, seed)

    def _select_learnable(
        self, split: Any, tokenizer: Any, role: str
    ) -> tuple[Any, list[list[templates.Segment]], list[Tokens], list[str]]:
        """Return the rows with something to learn, their segments and tokens, and notes on the others."""
        template, notes = self.template(split), list[str]()
        drop = template is None if self.drop_unlearnable is None else self.drop_unlearnable
        if template is None:
            split, rows, notes = self._render_chats(split, tokenizer, role, drop)
        else:
            rows = template.segment_rows(split, drop)
        count = len(rows)
        if drop:
            keep = [any(learnt and text.strip() for text, learnt in row) for row in rows]
            split, rows = templates.select_rows(keep, split, rows)
        # A chat template writes the start token.
        tokens = encode(rows, tokenizer, special=template is not None) if rows else []
        limits = (self.max_length, self.truncation_side, tokenizer.bos_token_id, role)
        if drop:
            keep = [any(row.learnt) for row in truncate_rows(tokens, *limits, allow_empty=True)[0]]
            split, rows, tokens = templates.select_rows(keep, split, rows, tokens)
        lacking = "responses" if template is not None else "answers by 'assistant'"
        advice = f"; raise task.max_length or give the rows {lacking}"
        dropped = templates.dropped_note(count, len(tokens), role, advice)
        truncated, note = truncate_rows(tokens, *limits)
        return split, rows, truncated, [*notes, *(text for text in (dropped, note) if text)]

    def _read_chats(self, split: Any) -> list[Conversation]:
        return read_conversations(split, self.chat_columns(split), self.tools)

    def _render_chats(
        self, split: Any, tokenizer: Any, role: str, allow_empty: bool
    ) -> tuple[Any, list[list[templates.Segment]], list[str]]:
        """Return the rows' samples as segments, the split with each row as often as it has samples, and notes."""
        renderer = ChatRenderer(tokenizer, self.turns, allow_empty)
        samples = [renderer.render(conversation) for conversation in self._read_chats(split)]
        if self.grades_answers and role == "test" and renderer.split:
            raise ValueError(
                f"task.metric is 'exact_match', which grades one answer a row, but {renderer.split} of {len(split)} "
                "test rows have several answers and a chat template that writes earlier turns otherwise when later "
                "ones follow; set task.turns = 'last'."
            )
        rows = [sample for several in samples for sample in several]
        notes = renderer.notes(len(split), len(rows), role)
        if renderer.split:
            split = split.select([i for i, several in enumerate(samples) for _ in several])
        return split, rows, notes

    def _build_examples(
        self, split: Any, rows: list[Tokens], strata: Tensor | None, tokenizer: Any, context: int, role: str,
        client_column: str | None,
    ) -> Examples:  # fmt: skip
        features, lengths = flatten_tokens(rows, tokenizer.pad_token_id)
        longer = int((lengths > context).sum())
        if longer:
            raise ValueError(
                f"the model reads at most {context} tokens, and {longer} of {len(rows)} {role} rows would have more; "
                f"set task.max_length to {context} (it is {self.max_length})."
            )
        labels = torch.zeros(len(rows), dtype=torch.int64)  # rows have no labels
        return Examples(features, labels, lengths, client_groups(split, client_column, role), strata)

    def _build_prompts(self, test: Any, segments: Any, strata: Any, tokenizer: Any, context: int, seed: int) -> Any:
        room = context - self.max_new_tokens
        if room < 1:
            raise ValueError(
                f"task.max_new_tokens is {self.max_new_tokens}, but the model reads at most {context} tokens, prompt "
                "included; lower it."
            )
        template = self.template(test)
        if template is not None and not templates.template_columns(template.prompt):
            raise ValueError(PLAIN)
        if template is None and self.shots:
            raise ValueError("task.shots works with task.prompt and task.response; leave it out with messages.")
        shots, test_rows = self._draw_shots(segments, strata, seed), segments[1]
        if template is None:  # the answers as they were written, without the template's marks
            responses = [conversation.last_answer for conversation in self._read_chats(test)]
        else:
            responses = [row[-1][0] for row in test_rows]
        golds = read_golds(test, responses, self.answer_column, self.answer)
        return encode_prompts(test_rows, golds, shots, tokenizer, room, template is None)

    def known_labels(self) -> tuple[str, ...] | None:
        return ()

    def network(self, model: str, labels: int, seed: int, loading: Any = None) -> nn.Module:
        """Return the pretrained network; ``loading`` are further options of ``from_pretrained``."""
        from transformers import AutoModelForCausalLM

        network = load_complete(AutoModelForCausalLM, model, loading)
        prepare_loss(network, move_batch(self.probe(network), next(network.parameters()).device))
        if self.packing:
            check_packing(network)
        return network

    def probe(self, network: nn.Module) -> Batch:
        return random_batch(network.config.get_text_config().vocab_size)

    def preprocessor(self, model: str) -> Any:
        return load_tokenizer(model, self.chat_template)

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Return one row in each sequence, or packed rows."""
        return pack_batch(examples, rows, self.max_length) if self.packing else pad_batch(examples, rows)

    def padded_lengths(self, examples: Examples, rows: Tensor) -> Tensor:
        """Return the lengths (b, 1) of rows in sequences of their own, at least of the prompt with its answer."""
        lengths = examples.lengths[rows]
        if "prompt_offsets" in examples.features:
            offsets = examples.features["prompt_offsets"]
            lengths = torch.maximum(lengths, offsets[rows + 1] - offsets[rows] + self.max_new_tokens)
        return lengths[:, None]

    def split_by_tokens(self, examples: Examples, rows: Tensor, max_tokens: int) -> list[Tensor]:
        if not self.packing:
            return super().split_by_tokens(examples, rows, max_tokens)
        return [
            rows[places] for places in split_sequences(examples.lengths[rows].tolist(), self.max_length, max_tokens)
        ]

    def inputs(self, network: nn.Module, batch: Batch) -> Inputs:
        return {**{name: x for name, x in batch.items() if name != "labels"}, "use_cache": False}

    def targets(self, batch: Batch) -> Tensor:
        return functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return each row's negative log-likelihood, number of learnt tokens, and number of correct predictions."""
        return self.sums(network, batch)

    def evaluate(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """Return each row's ``outputs``, and whether the generated answer, or the likeliest choice, is right."""
        batch = {name: x.to(device) for name, x in pad_batch(examples, rows).items()}
        outputs = self.outputs(network, batch).cpu()
        if self.grades_choices:
            return torch.cat([outputs, _grade_rows(network, examples, rows, device)], 1)
        if not self.grades_answers:
            return outputs
        assert examples.texts is not None, "test rows have right answers"
        tokenizer = self.preprocessor(str(network.config.name_or_path))
        answers = generate(network, tokenizer, select_prompts(examples.features, rows), self.generation)
        golds = [remove_thinking(examples.texts[i]["gold"]) for i in rows.tolist()]
        hits = grade_answers([remove_thinking(text) for text in answers], golds, self.answer)
        return torch.cat([outputs, torch.tensor(hits).double()[:, None]], 1)

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Return sums over tokens, and over rows if answers or choices were graded."""
        nll, tokens, correct, *hits = outputs.double().sum(0).tolist()
        sums = {"nll": (nll, int(tokens)), "token_accuracy": (int(correct), int(tokens))}
        names = CHOICE if self.grades_choices else ("exact_match",)
        return Scores(sums | {name: (int(total), len(outputs)) for name, total in zip(names, hits)})


@torch.no_grad()  # positions may repeat, which only a computation without gradients allows
def _grade_rows(network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
    """Return ``grade_choices`` of some rows, from as many sequences at a time as there are rows."""

    def score(ids: Tensor, mask: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        return loss_of(network).each(network, inputs, positions.to(device), tokens.to(device))[0]

    sequences = cover_choices(examples.features, rows)
    values = log_likelihoods(score, sequences, int(examples.features["pad"]), len(rows))
    return grade_choices(values, examples.features, rows)


@torch.no_grad()
def check_packing(network: nn.Module) -> None:
    """Raise ``ValueError`` if packed rows attend to each other in this network."""
    draws = torch.Generator().manual_seed(0)
    device = next(network.parameters()).device
    ids = torch.randint(network.config.get_text_config().vocab_size, (1, 24), generator=draws).to(device)
    positions = torch.arange(12, device=device).repeat(2)[None]
    training = network.training
    network.eval()
    try:
        packed, mixed = (
            network(input_ids=ids, **x, use_cache=False).logits[:, 12:] for x in ({"position_ids": positions}, {})
        )
        alone = network(input_ids=ids[:, 12:], use_cache=False).logits
        error, most = ((x - alone).abs().max() for x in (packed, mixed))
        leaks = bool(error > most * (LEAK if getattr(network, "is_quantized", False) else LEAK / 100))
    except TypeError:  # the network has no argument for positions
        leaks = True
    finally:
        network.train(training)
    if leaks:
        raise ValueError(
            f"task.packing is set, but rows in one sequence would see each other in {type(network).__name__}; "
            "set task.packing = false."
        )


def context_length(model: str) -> int:
    """Return the number of tokens that the model reads at most."""
    from transformers import AutoConfig

    config = load_quietly(AutoConfig, model).get_text_config()
    return min(max_positions(config), load_tokenizer(model).model_max_length)
