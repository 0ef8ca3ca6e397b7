"""Direct preference optimisation of causal language models: a prompt with a chosen and a rejected answer.

Rafailov et al. Direct Preference Optimization: Your Language Model is Secretly a Reward Model. NeurIPS 2023.
https://arxiv.org/abs/2305.18290
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Data, Examples, TableTask, move_batch
from fedlora.tasks.causal_lm import CausalLM, context_length
from fedlora.tasks.data import templates
from fedlora.tasks.data.rows import client_groups
from fedlora.tasks.data.tokens import Side, Tokens, encode, flatten_tokens, pad_batch, truncate_rows
from fedlora.tasks.metrics.scores import Scores

REJECTED = "rejected_"  # before the names of features and inputs of the rejected answers
INPUTS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class CausalLMDPO(TableTask):
    """The ``[task]`` table of DPO. The reference is the pretrained network, without adapters."""

    prompt: PerMachine[str] = "prompt"  # a column, or a template such as "Q: {question}\nA:"
    chosen: PerMachine[str] = "chosen"  # the same for the better answer
    rejected: PerMachine[str] = "rejected"  # and for the worse one
    label: PerMachine[str | None] = None  # a column for partitions by label, such as a category
    beta: float = 0.1  # weight of the log-ratio to the reference; smaller values let the model move further from it
    max_length: int = 1024  # tokens of a prompt with one answer; longer ones are cut
    truncation_side: Side = "right"  # of the cuts
    drop_unlearnable: bool = False  # leave out rows that teach nothing; False: they are an error
    metric: str = "reward_accuracy"  # or "reward_margin", or "dpo_loss"
    auto: ClassVar[str] = "AutoModelForCausalLM"
    peft: ClassVar[str | None] = "CAUSAL_LM"
    quantizes: ClassVar[bool] = True
    accepts_loading: ClassVar[bool] = True
    brings_head: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("reward_accuracy", "reward_margin", "dpo_loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"task.beta is {self.beta}; it must be a positive number.")
        for key in ("prompt", "chosen", "rejected"):
            templates.check_template(getattr(self, key), f"task.{key}")
        self.token_task  # noqa: B018 - raises if max_length is wrong

    @property
    def token_task(self) -> CausalLM:
        return CausalLM(self.data, max_length=self.max_length)

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Read, check and tokenize both splits once."""
        both, tokenizer = self.draw_splits(self.load_splits(seed), seed), self.preprocessor(model)
        context, examples, notes = context_length(model), [], list[str]()
        encoded = [self._encode(split, tokenizer, role) for split, role in zip(both, ("training", "test"))]
        strata = templates.label_strata(encoded[0][0], encoded[1][0], self.label)
        for (split, chosen, rejected, more), kinds, role in zip(encoded, strata, ("training", "test")):
            features, lengths = flatten_tokens(chosen, tokenizer.pad_token_id)
            worse, others = flatten_tokens(rejected, tokenizer.pad_token_id)
            lengths = torch.maximum(lengths, others)
            if int(lengths.max()) > context:
                raise ValueError(
                    f"the model reads at most {context} tokens, and a row of the {role} split would have "
                    f"{int(lengths.max())}; set task.max_length to {context} (it is {self.max_length})."
                )
            features |= {f"{REJECTED}{name}": x for name, x in worse.items()}
            labels = torch.zeros(len(chosen), dtype=torch.int64)  # rows have no labels
            examples.append(Examples(features, labels, lengths, client_groups(split, client_column, role), kinds))
            notes += more
        return Data(examples[0], examples[1], (), tuple(notes))

    def _encode(self, split: Any, tokenizer: Any, role: str) -> tuple[Any, list[Tokens], list[Tokens], list[str]]:
        """Return the rows that teach something, the tokens of both answers after the prompt, and notes."""
        limits = (self.max_length, self.truncation_side, tokenizer.bos_token_id, role)
        tokens, notes = [], []
        for key in ("chosen", "rejected"):
            keys = ("task.prompt", f"task.{key}")
            prompt, answer = templates.to_template(self.prompt), templates.to_template(getattr(self, key))
            self._check_texts(split, templates.template_columns(prompt + answer))
            rows = templates.PromptTemplate(prompt, answer, keys).segment_rows(split, self.drop_unlearnable)
            cut, note = truncate_rows(encode(rows, tokenizer, True), *limits, allow_empty=self.drop_unlearnable)
            tokens.append(cut)
            notes += [f"{key}: {note}"] if note else []
        chosen, rejected = tokens
        keep = [a.ids != b.ids and any(a.learnt) and any(b.learnt) for a, b in zip(chosen, rejected)]
        if not all(keep) and not self.drop_unlearnable:
            raise ValueError(
                f"chosen and rejected are the same in {keep.count(False)} of {len(keep)} {role} rows within "
                f"task.max_length = {self.max_length} tokens, which teaches nothing; raise it, drop these rows, or set "
                "task.drop_unlearnable = true."
            )
        dropped = templates.dropped_note(len(keep), sum(keep), role, "; raise task.max_length, or give other answers")
        split, chosen, rejected = templates.select_rows(keep, split, chosen, rejected)
        return split, chosen, rejected, [dropped, *notes] if dropped else notes

    def _check_texts(self, split: Any, columns: Sequence[str]) -> None:
        """Raise ``ValueError`` if there is no prompt column, or if a column has messages instead of text."""
        for name in columns:
            if name not in split.column_names and name == "prompt":
                raise ValueError(
                    f"the data has no column 'prompt' (task.prompt) among {', '.join(split.column_names)}; if the "
                    "prompt is the common beginning of both answers, split it off, or name the column in task.prompt."
                )
            if name in split.column_names and len(split) and isinstance(split[0][name], list):
                raise ValueError(
                    f"column {name!r} has chat messages, and DPO here reads text; write prompt and answers as text, "
                    "with the tokenizer's chat template (trl.apply_chat_template)."
                )

    def known_labels(self) -> tuple[str, ...] | None:
        return ()

    def network(self, model: str, labels: int, seed: int, loading: Any = None) -> nn.Module:
        """Return the pretrained network; ``loading`` are further options of ``from_pretrained``."""
        return self.token_task.network(model, labels, seed, loading)

    def probe(self, network: nn.Module) -> Batch:
        return self.token_task.probe(network)

    def preprocessor(self, model: str) -> Any:
        return self.token_task.preprocessor(model)

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Return both answers of each row, the rejected ones under names with a prefix, and ``reference`` (b, 2).

        Rows without a reference, as in a plan, have nan: a loss of them stops training.
        """
        known = examples.reference
        reference = torch.full((len(rows), 2), torch.nan, dtype=torch.float64) if known is None else known[rows]
        names = {name.removeprefix(REJECTED): x for name, x in examples.features.items() if name.startswith(REJECTED)}
        worse = pad_batch(replace(examples, features=names), rows)
        return {
            **pad_batch(examples, rows), **{f"{REJECTED}{name}": x for name, x in worse.items()},
            "reference": reference,
        }  # fmt: skip

    def padded_lengths(self, examples: Examples, rows: Tensor) -> Tensor:
        """Return the length of the longer answer's sequence, for both sequences of a row (b, 2)."""
        return examples.lengths[rows][:, None].expand(-1, 2)

    def forward_batches(self, batch: Batch) -> list[Batch]:
        """Return the batch of the chosen answers and that of the rejected ones, so that each has a sequence a row.

        A batch without rejected answers, as in a plan without rows, stands for both.
        """
        if f"{REJECTED}labels" not in batch:
            return [batch, batch]
        return [{name: batch[f"{prefix}{name}"] for name in INPUTS} for prefix in ("", REJECTED)]

    def reference(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """Return the log-probabilities of the chosen and the rejected answers (b, 2), float64."""
        return self._log_probabilities(network, move_batch(self.collate(examples, rows), device))

    def _log_probabilities(self, network: nn.Module, batch: Batch) -> Tensor:
        parts = self.forward_batches(batch)
        return torch.stack([-self.token_task.outputs(network, part)[:, 0] for part in parts], 1)

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return each row's rewards, of the chosen and the rejected answer (b, 2): ``beta`` times the log-ratio."""
        return self.beta * (self._log_probabilities(network, batch) - batch["reference"])

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return each row's loss (b,): ``-log sigmoid(reward of chosen - reward of rejected)``."""
        chosen, rejected = self.outputs(network, batch).unbind(1)
        return functional.softplus(rejected - chosen).float()

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        return self.losses(network, batch).mean()

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Return sums over rows of the loss, of the margins, and of the rows with the higher reward for the chosen."""
        chosen, rejected = outputs.double().unbind(1)
        margins, rows = chosen - rejected, len(outputs)
        return Scores({
            "reward_accuracy": (int((margins > 0).sum()), rows),
            "reward_margin": (float(margins.sum()), rows),
            "dpo_loss": (float(functional.softplus(-margins).sum()), rows),
        })  # fmt: skip
