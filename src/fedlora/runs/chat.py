"""Chat with a run's shared model, or with a client's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedlora.runs.build import attach_adapters, load_network
from fedlora.runs.folder import RunFolder
from fedlora.schema import ConfigError
from fedlora.tasks.causal_lm import CausalLM, context_length
from fedlora.tasks.data.chat_templates import check_chat_template, prepare_messages, render_messages
from fedlora.tasks.data.templates import PromptTemplate
from fedlora.tasks.data.tokens import tokenize
from fedlora.tasks.networks.generation import GenerationSettings, generate
from fedlora.tasks.networks.pretrained import stored_dtype
from fedlora.training.device import Engine
from fedlora.training.local import Training
from fedlora.training.model import Model


@dataclass
class Chat:
    """A conversation. A model that was trained on chat messages sees the earlier turns, others the last prompt."""

    model: Model
    tokenizer: Any
    template: PromptTemplate | None  # of the run's training; None: the tokenizer's chat template
    max_tokens: int  # of prompt and answer
    seed: int = 0
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    note: str = ""  # for the user, about the loaded model

    @classmethod
    def open(cls, run: RunFolder, client: int | None = None, system: str | None = None, seed: int = 0) -> "Chat":
        """Load a run's model. Raises ``ConfigError`` if the run has no such model or generates no text."""
        config, task = run.config, run.config.task
        if not isinstance(task, CausalLM):
            raise ConfigError(
                f"{str(run.path)!r} is a run of {config.table['task']['name']!r}, but only a causal language model can "
                "be talked with; name a run of 'causal-lm'."
            )
        if client is None and config.method.personal:
            raise ConfigError(
                f"{config.method.title} ends with a model for each client and none for all; name one with --client K."
            )
        tree, tokenizer = run.tree(client), task.preprocessor(config.model.name)
        if any(name is not None for name in (task.prompt, task.messages, task.text)):
            template = task.template()
        else:
            template = task.template(task.load_splits(config.seed)[0])
        if template is None:
            check_chat_template(tokenizer)
        elif system is not None:
            raise ConfigError("--system is part of a chat template, and this run has none; leave it out.")
        model, note = _load_model(run)
        model.load(tree)
        model.fold({part: (f,) for part, f in run.base_updates.items()})
        return cls(model, tokenizer, template, context_length(config.model.name), seed, system, note=note)

    def say(self, text: str, writing: GenerationSettings) -> str:
        """Return the answer. Raises ``ValueError`` if prompt and answer are longer than the model can read."""
        turns = [*self.turns, {"role": "user", "content": text}]
        prompt = self.prompt(turns)
        ids = tokenize([prompt], self.tokenizer, self.template is not None)[0]
        if not ids:
            raise ValueError("the prompt is empty; write something.")
        if len(ids) + writing.max_new_tokens > self.max_tokens:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the answer may have {writing.max_new_tokens}, but the model "
                f"reads at most {self.max_tokens}; shorten the prompt, start anew, or lower --max-new-tokens."
            )
        with self.model.running():
            answer = generate(self.model.network, self.tokenizer, [ids], writing, self.seed)[0]
        self.seed += 1  # an equal prompt gets new draws
        if self.template is None:
            self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def prompt(self, turns: Sequence[dict[str, str]]) -> str:
        """Return the text that the model reads."""
        if self.template is not None:
            return self.template.fill_prompt(turns[-1]["content"])
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = prepare_messages([*system, *turns], self.tokenizer)
        return render_messages(messages, self.tokenizer, "this conversation", ask=True)


def _load_model(run: RunFolder) -> tuple[Model, str]:
    """Load the model on this machine's device; a quantised base only on a GPU."""
    engine, config = Engine(), run.config
    device = engine.prepare()
    is_whole = config.model.quantize is None or device.type != "cuda"
    network = run.network("auto") if is_whole else load_network(config, 0, device, "auto")
    precision: Any = engine.resolve_precision(Training(), network).precision
    is_changed = is_whole and config.model.quantize
    notes = ["without a GPU the base is not quantised, as it was in training"] if is_changed else []
    notes += [note] if (note := engine.describe_loading("auto", stored_dtype(config.model.name))) else []
    return attach_adapters(config, network, precision, torch.device(device)), "; ".join(notes)
