"""Talking with what a run has trained: the shared model, or a client's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedlora.runs.build import attach_adapters, load_network
from fedlora.runs.config import Config, ConfigError
from fedlora.runs.folder import RunFolder
from fedlora.tasks.causal_lm import CausalLM, context_length
from fedlora.tasks.data import rows as source
from fedlora.tasks.data.templates import PromptTemplate, check_chat_template, render_messages
from fedlora.tasks.data.tokens import tokenize
from fedlora.tasks.networks.generation import GenerationSettings, generate
from fedlora.training.device import Engine
from fedlora.training.local import Training
from fedlora.training.model import Model


@dataclass
class Chat:
    """A conversation. Where the run learnt chat messages it has a memory; else every prompt stands for itself."""

    model: Model
    tokenizer: Any
    template: PromptTemplate | None  # the templates that the run was trained on; None: the tokenizer's chat template
    room: int  # tokens that the model reads at most
    seed: int = 0
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    note: str = ""  # what a user should be told of how the model was loaded

    @classmethod
    def open(cls, run: RunFolder, client: int | None = None, system: str | None = None, seed: int = 0) -> "Chat":
        """``ConfigError`` where the run writes no texts, or has no such model."""
        config = run.config
        task = config.task
        if not isinstance(task, CausalLM):
            raise ConfigError(
                f"{str(run.path)!r} is a run of {config.table['task']['name']!r}, but only a causal language model can "
                "be talked with; name a run of 'causal-lm'."
            )
        if client is None and config.method.personal:
            raise ConfigError(
                f"{config.method.title} ends with a model for each client and none for all; name one with --client K."
            )
        tree, template, tokenizer = run.tree(client), _wording(config, task), task.preprocessor(config.model.name)
        if template is None:
            check_chat_template(tokenizer)
        elif system is not None:
            raise ConfigError(
                "--system is part of a chat template, and this run was trained without one; leave it out."
            )
        model, note = _loaded(run)
        model.load(tree)
        model.fold({part: (f,) for part, f in run.base_updates.items()})
        return cls(model, tokenizer, template, context_length(config.model.name), seed, system, note=note)

    def say(self, text: str, writing: GenerationSettings) -> str:
        """The answer. ``ValueError`` where there is no room for it within what the model reads."""
        turns = [*self.turns, {"role": "user", "content": text}]
        prompt = self.prompt(turns)
        ids = tokenize([prompt], self.tokenizer, self.template is not None)[0]
        if not ids:
            raise ValueError("the prompt is empty; write something.")
        if len(ids) + writing.max_new_tokens > self.room:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the answer may have {writing.max_new_tokens}, but the model "
                f"reads at most {self.room}; shorten the prompt, start anew, or lower --max-new-tokens."
            )
        with self.model.running():
            answer = generate(self.model.network, self.tokenizer, [ids], writing, self.seed)[0]
        self.seed += 1  # the same words are not drawn twice
        if self.template is None:
            self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def prompt(self, turns: Sequence[dict[str, str]]) -> str:
        """What the model is given, as text."""
        if self.template is not None:
            return self.template.fill_prompt(turns[-1]["content"])
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return render_messages([*system, *turns], self.tokenizer, "this conversation", ask=True)


def _wording(config: Config, task: CausalLM) -> PromptTemplate | None:
    """As the configuration names it, or else as the data's columns do."""
    named = (task.prompt, task.messages, task.text)
    if any(name is not None for name in named):
        return task.template([])
    where = (task.data, task.data_config, task.train_split, [task.test_split])
    train, _ = source.load_splits(*where, config.seed, source.text_format(task))
    return task.template(train.column_names)


def _loaded(run: RunFolder) -> tuple[Model, str]:
    """On this machine's device, quantised as in the run where that is a GPU."""
    here, config = Engine(), run.config
    device = here.prepare()
    whole = config.model.quantize is None or device.type != "cuda"
    network = run.network() if whole else load_network(config, 0, device)
    precision: Any = here.resolve_precision(Training(), network).precision
    note = "without a GPU the base is not quantised, as it was in training" if whole and config.model.quantize else ""
    return attach_adapters(config, network, precision, torch.device(device)), note
