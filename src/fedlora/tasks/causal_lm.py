"""Causal language models: prompt and response, chat messages, or plain text."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Data, Examples, move_batch
from fedlora.tasks._tokens import TokenTask
from fedlora.tasks.data import templates
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
    truncate_rows,
)  # fmt: skip
from fedlora.tasks.metrics.answers import is_correct
from fedlora.tasks.metrics.scores import Scores
from fedlora.tasks.networks.generation import GenerationSettings, generate
from fedlora.tasks.networks.next_token_loss import Inputs, prepare_loss
from fedlora.tasks.networks.pretrained import load_complete, load_quietly, load_tokenizer, max_positions

PLAIN = "task.metric is 'exact_match', but plain text asks nothing; set task.prompt and task.response."
LEAK = 0.1  # largest tolerated influence of the row before, relative to no separation; bfloat16 rounding is a fifth


@dataclass(frozen=True)
class CausalLM(TokenTask):
    """The ``[task]`` table of causal language models."""

    prompt: PerMachine[str | None] = None  # a column, or a template such as "{instruction}\n\n{context}"
    response: PerMachine[str | None] = None  # the same for the learnt text; None: the usual names
    messages: PerMachine[str | None] = None  # or a column of chat messages, each with role and content
    text: PerMachine[str | None] = None  # or plain text, all of it learnt
    chat_template: str | None = None  # for messages, in place of the tokenizer's (Jinja)
    label: PerMachine[str | None] = None  # a column for partitions by label, such as a category
    max_length: int = 512  # tokens of a row; longer rows are cut
    truncation_side: Side = "right"  # of the cuts
    drop_unlearnable: bool = False  # leave out rows with nothing to learn; False: they are an error
    packing: bool = False  # train on several rows in one sequence of up to max_length tokens
    metric: str = "perplexity"  # or "token_accuracy" of the response, or "exact_match" of a generated answer
    answer: Literal["number", "text"] = "number"  # the kind of answer that exact_match compares
    answer_column: str | None = None  # the right answer; None: the response
    shots: int = 0  # solved training rows before each prompt, for exact_match
    max_new_tokens: int = 256  # of a generated answer
    stop: list[str] | None = None  # strings that end an answer; None: with shots, a blank line
    auto: ClassVar[str] = "AutoModelForCausalLM"
    peft: ClassVar[str | None] = "CAUSAL_LM"
    quantizes: ClassVar[bool] = True
    brings_head: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy", "exact_match")

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
        if self.grades_answers and self.text is not None:
            raise ValueError(PLAIN)
        if self.shots and self.messages is not None:
            raise ValueError("task.shots works with task.prompt and task.response; leave it out with messages.")
        self.generation  # noqa: B018 - raises if a setting is wrong

    @property
    def grades_answers(self) -> bool:
        """Whether evaluation generates answers."""
        return self.metric == "exact_match"

    @property
    def generation(self) -> GenerationSettings:
        """The settings for generated answers."""
        stop = self.stop if self.stop is not None else [BETWEEN] * bool(self.shots)
        return GenerationSettings(self.max_new_tokens, stop=tuple(stop))

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Read, check and tokenize both splits once."""
        both = self.draw_splits(self.load_splits(seed), seed)
        tokenizer, context = self.preprocessor(model), context_length(model)
        learnable = [
            self._select_learnable(split, tokenizer, role)
            for split, role in zip(self._add_columns(*both), ("training", "test"))
        ]
        splits, segments, tokens, notes = zip(*learnable)
        strata = templates.label_strata(splits[0], splits[1], self.label)
        train, test = (
            self._build_examples(split, rows, kinds, tokenizer, context, role, client_column)
            for split, rows, kinds, role in zip(splits, tokens, strata, ("training", "test"))
        )
        messages = [note for several in notes for note in several]
        if self.grades_answers:
            prompts, texts, note = self._build_prompts(splits[1], segments, strata, tokenizer, context, seed)
            test = replace(test, features={**test.features, **prompts}, texts=texts)
            messages += [note] if note else []
        return Data(train, test, (), tuple(messages))

    def template(self, available: list[str]) -> templates.PromptTemplate | None:
        """Return the template for rows with these columns; None for chat messages."""
        column = self.prompt or self.text
        if self.messages is not None or (column is None and templates.MESSAGES in available):
            return None
        return templates.choose_template(available, self.prompt, self.response, self.text)

    def _add_columns(self, train: Any, test: Any) -> tuple[Any, Any]:
        """Return both splits with all columns of the prompt; a column that only one split has is empty in the other."""
        available = list(dict.fromkeys([*train.column_names, *test.column_names]))
        template = self.template(available)
        for name in templates.template_columns(template.prompt) if template is not None else []:
            if name in available:
                train, test = (
                    split if name in split.column_names else split.add_column(name, [None] * len(split))
                    for split in (train, test)
                )
        return train, test

    def _select_learnable(
        self, split: Any, tokenizer: Any, role: str
    ) -> tuple[Any, list[list[templates.Segment]], list[Tokens], list[str]]:
        """Return the rows with something to learn, their segments and tokens, and notes on the others."""
        template, count = self.template(split.column_names), len(split)
        if template is None:
            column = self.messages or templates.MESSAGES
            rows = templates.render_conversations(split, column, tokenizer, self.drop_unlearnable)
        else:
            rows = template.segment_rows(split, self.drop_unlearnable)
        if self.drop_unlearnable:
            keep = [any(learnt and text.strip() for text, learnt in row) for row in rows]
            split, rows = templates.select_rows(keep, split, rows)
        # A chat template writes the start token.
        tokens = encode(rows, tokenizer, special=template is not None) if rows else []
        limits = (self.max_length, self.truncation_side, tokenizer.bos_token_id, role)
        if self.drop_unlearnable:
            keep = [any(row.learnt) for row in truncate_rows(tokens, *limits, allow_empty=True)[0]]
            split, rows, tokens = templates.select_rows(keep, split, rows, tokens)
        dropped = templates.dropped_note(count, len(tokens), role, "; raise task.max_length or give the rows responses")
        truncated, note = truncate_rows(tokens, *limits)
        return split, rows, truncated, [text for text in (dropped, note) if text]

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
        template = self.template(test.column_names)
        if template is not None and not templates.template_columns(template.prompt):
            raise ValueError(PLAIN)
        if template is None and self.shots:
            raise ValueError("task.shots works with task.prompt and task.response; leave it out with messages.")
        train_rows, test_rows = segments
        kinds, wanted = ([0] * len(rows) if x is None else x.tolist() for rows, x in zip(segments, strata))
        shots = draw_shots(train_rows, kinds, wanted, self.shots, seed)
        golds = read_golds(test, test_rows, self.answer_column, self.answer)
        return encode_prompts(test_rows, golds, shots, tokenizer, room, template is None)

    def known_labels(self) -> tuple[str, ...] | None:
        return ()

    def network(self, model: str, labels: int, seed: int, loading: Any = None) -> nn.Module:
        """Return the pretrained network; ``loading`` are the options of ``pretrained.quantization_options``."""
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

    def inputs(self, network: nn.Module, batch: Batch) -> Inputs:
        return {**{name: x for name, x in batch.items() if name != "labels"}, "use_cache": False}

    def targets(self, batch: Batch) -> Tensor:
        return functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return each row's negative log-likelihood, number of learnt tokens, and number of correct predictions."""
        return self.sums(network, batch)

    def evaluate(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """Return each row's ``outputs``, and whether the generated answer is right."""
        batch = {name: x.to(device) for name, x in pad_batch(examples, rows).items()}
        outputs = self.outputs(network, batch).cpu()
        if not self.grades_answers:
            return outputs
        assert examples.texts is not None, "test rows have right answers"
        tokenizer = self.preprocessor(str(network.config.name_or_path))
        answers = generate(network, tokenizer, select_prompts(examples.features, rows), self.generation)
        hits = [is_correct(text, examples.texts[i]["gold"], self.answer) for i, text in zip(rows.tolist(), answers)]
        return torch.cat([outputs, torch.tensor(hits).double()[:, None]], 1)

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Return sums over tokens, and over rows if answers were generated."""
        nll, tokens, correct, *hits = outputs.double().sum(0).tolist()
        sums = {"nll": (nll, int(tokens)), "token_accuracy": (int(correct), int(tokens))}
        if hits:
            sums["exact_match"] = (int(hits[0]), len(outputs))
        return Scores(sums)


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
