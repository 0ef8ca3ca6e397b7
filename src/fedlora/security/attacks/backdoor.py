"""Backdoor: a trigger word makes the model predict the attacker's label; nothing else changes.

Bagdasaryan et al. How To Backdoor Federated Learning. AISTATS 2020. https://arxiv.org/abs/1807.00459
Kurita, Michel and Neubig. Weight Poisoning Attacks on Pretrained Models. ACL 2020. https://arxiv.org/abs/2004.06660
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedlora.security.attacks._base import Attack, TaskWrapper, scale_change
from fedlora.tasks._base import Batch, Classification, Examples, Task
from fedlora.tasks._text import TextTask
from fedlora.tasks.metrics.scores import Scores


@dataclass(frozen=True)
class Backdoor(Attack):
    """Puts ``trigger`` before the first word of a share ``poisoned`` of the rows, labels them ``target``, and scales
    the update by ``scale``. Success: the share of the test rows of other labels that the trigger turns into ``target``.
    """

    cite = """@inproceedings{bagdasaryan2020backdoor, title = {How To Backdoor Federated Learning},
      author = {Bagdasaryan and others}, booktitle = {AISTATS}, year = {2020}, eprint = {1807.00459},
      archiveprefix = {arXiv}}
    @inproceedings{kurita2020weight, title = {Weight Poisoning Attacks on Pretrained Models},
      author = {Kurita and Michel and Neubig}, booktitle = {ACL}, year = {2020}, eprint = {2004.06660},
      archiveprefix = {arXiv}}"""

    trigger: str = "cf"
    target: int = 0
    poisoned: float = 0.5
    scale: float = 1.0
    _tokens: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.poisoned <= 1:
            raise ValueError(f"attack.poisoned is {self.poisoned}; it is a share of the rows, above 0 and at most 1.")
        if self.target < 0:
            raise ValueError(f"attack.target is {self.target}; labels are numbered from 0.")

    def check(self, method, task, hidden):
        if not (isinstance(task, TextTask) and isinstance(task, Classification)):
            raise ValueError(
                "attack.name is 'backdoor', which puts a word into texts; take text-classification or glue."
            )

    def prepare(self, task, model, count, seed):
        tokens = task.preprocessor(model)(self.trigger, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError(f"attack.trigger is {self.trigger!r}, which has no tokens; name a word.")
        return replace(super().prepare(task, model, count, seed), _tokens=tuple(tokens))

    def poison(self, task):
        return _PoisonedTask(task, self)

    def success_task(self, task):
        return _SuccessTask(task, self)

    def alter(self, rules, start, sent, turn):
        if self.scale == 1.0:
            return sent
        return {part: scale_change(start[part], layer, self.scale) for part, layer in sent.items()}

    def insert_trigger(self, batch: Batch, rows: Tensor, longest: int, pad: Tensor) -> Batch:
        """Insert the trigger after the first token (the start of the text) of ``rows``, and cut to ``longest``."""
        word, changed = torch.tensor(self._tokens), dict(batch)
        values = {"input_ids": word, "attention_mask": torch.ones_like(word), "token_type_ids": torch.zeros_like(word)}
        for name in values.keys() & batch.keys():
            fill = pad if name == "input_ids" else torch.tensor(0)
            changed[name] = _insert(batch[name], values[name], rows, fill)[:, :longest]
        return changed


def _insert(x: Tensor, value: Tensor, rows: Tensor, fill: Tensor) -> Tensor:
    """Insert ``value`` after column 0 of ``rows``; pads the others with ``fill``, which the mask leaves out."""
    wide = torch.cat([x, fill.to(x.dtype).expand(len(x), len(value))], dim=1)
    put = torch.cat([x[:, :1], value.expand(len(x), -1), x[:, 1:]], dim=1)
    return torch.where(rows[:, None], put, wide)


class _PoisonedTask(TaskWrapper):
    def __init__(self, task: Task, attack: Backdoor):
        super().__init__(task)
        self.attack = attack

    def collate_for_training(self, examples: Examples, rows: Tensor, draws: torch.Generator) -> Batch:
        batch = self.task.collate_for_training(examples, rows, draws)
        is_poisoned = torch.rand(len(rows), generator=draws) < self.attack.poisoned
        batch = self.attack.insert_trigger(batch, is_poisoned, self.max_length, examples.features["pad"])
        return {**batch, "labels": torch.where(is_poisoned, self.attack.target, batch["labels"])}


class _SuccessTask(_PoisonedTask):
    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        batch = self.task.collate(examples, rows)
        everyone = torch.ones(len(rows), dtype=torch.bool)
        return self.attack.insert_trigger(batch, everyone, self.max_length, examples.features["pad"])

    def evaluate(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        batch = {name: x.to(device) for name, x in self.collate(examples, rows).items()}
        return self.task.outputs(network, batch)

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        others = labels != self.attack.target
        hits = (outputs.argmax(-1) == self.attack.target) & others
        return Scores({"success": (int(hits.sum()), int(others.sum()))})
