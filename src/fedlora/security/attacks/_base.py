"""The interface of attacks by hostile clients, for tests and research.

An attack overrides one or more of three hooks. ``poison`` changes the rows that the attackers train on, ``alter``
changes their uploads after a turn, and ``alter_together`` changes them with knowledge of the others'. The last one runs
at the server, so it is the same in every engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules, client_start
from fedlora.seeds import derive_seed
from fedlora.tasks._base import Task
from fedlora.tasks.metrics.scores import Scores
from fedlora.types import Layer, Tree, Turn

SUCCESS = "success"  # the sum in the scores of a success task


@dataclass(frozen=True)
class Attack:
    """The ``[attack]`` table: one attack, its attackers and its first round.

    An attack of another package is a frozen dataclass that defines one of ``poison``, ``alter`` and ``alter_together``;
    its own fields are further keys of the table and need defaults. ``poison`` and ``alter`` are called for attackers
    only, ``alter_together`` once a round with all uploads.
    """

    share: float = 0.3  # of the clients, drawn from the seed
    clients: list[int] | None = None  # or these clients
    start: int = 1  # the first round with an attack, from 1

    cite: ClassVar[str] = ""  # BibTeX of its paper
    meets: ClassVar[str] = ""  # its name and use of the others' uploads, if it needs them; for an error message

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"attack.share is {self.share}; it is a share of the clients, from 0 to 1.")
        if self.clients is not None and any(client < 0 for client in self.clients):
            raise ValueError(f"attack.clients is {self.clients}; clients are numbered from 0.")
        if self.start < 1:
            raise ValueError(f"attack.start is {self.start}; rounds are numbered from 1.")

    def check(self, method: Method, task: Task, hidden: bool) -> None:
        """``ValueError`` if the attack cannot work; ``hidden``: the server sees no single upload."""
        if hidden and self.meets:
            raise ValueError(
                f"attack.name is {self.meets}, and flower.secure_aggregation hides these; leave one of the two out."
            )

    def prepare(self, task: Task, model: str, count: int, seed: int) -> Self:
        """Draw the attackers, and read from the task's model what the attack needs, such as the tokens of a word."""
        if self.clients is None:
            draws = torch.Generator().manual_seed(derive_seed(seed, "attackers"))
            many = int(self.share * count + 1e-9)  # 0.3 of 10 is 3
            return replace(self, clients=sorted(torch.randperm(count, generator=draws)[:many].tolist()))
        if unknown := [client for client in self.clients if client >= count]:
            raise ValueError(f"attack.clients names client {unknown[0]}, and clients are numbered 0 to {count - 1}.")
        return self

    @property
    def attackers(self) -> frozenset[int]:
        """The attackers, after ``prepare``."""
        return frozenset(self.clients or ())

    def is_attack(self, turn: Turn) -> bool:
        """Whether this turn is an attacker's, in a round with the attack."""
        return turn.round + 1 >= self.start and turn.client in self.attackers

    def poison(self, task: Task) -> Task:
        """Return the task that an attacker trains on."""
        return task

    def success_task(self, task: Task) -> Task | None:
        """Return a task with the attack's ``success`` as its score on test rows; None if accuracy shows it."""
        return None

    def alter(self, rules: Rules, start: Tree, sent: Tree, turn: Turn) -> Tree:
        """Return an attacker's upload instead of ``sent``; ``start`` is the tree that it trained from."""
        return sent

    def alter_together(
        self, rules: Rules, shared: Tree, uploads: Mapping[int, Received], overheard: dict[int, Tree]
    ) -> dict[int, Received]:
        """Return the attackers' uploads, given all uploads of the round; ``overheard`` is kept for the next round."""
        return {}


def poison_task(attack: Attack | None, task: Task, turn: Turn) -> Task:
    """Return the task that a client trains on in a turn."""
    return task if attack is None or not attack.is_attack(turn) else attack.poison(task)


def alter_upload(attack: Attack | None, rules: Rules, shared: Tree, kept: Tree, sent: Tree, turn: Turn) -> Tree:
    """Return a client's upload after its turn: the method's own, or an attacker's."""
    if attack is None or not attack.is_attack(turn):
        return sent
    return attack.alter(rules, client_start(rules, shared, kept, turn), sent, turn)


def scale_change(start: Layer, sent: Layer, by: float) -> dict[str, Tensor]:
    """Scale the change of each leaf by ``by``: to first order, ``by`` times the update."""
    return {leaf: start[leaf] + by * (x - start[leaf]) for leaf, x in sent.items()}


def success_rate(attack: Attack | None, scores: Mapping[int, Scores]) -> dict[str, Any]:
    """Return the attack's success on honest clients' own models, mean over clients; empty without such a score."""
    attackers = attack.attackers if attack is not None else scores.keys()
    known = [s.sums[SUCCESS] for client, s in scores.items() if client not in attackers and SUCCESS in s.sums]
    if not known:
        return {}
    shares = [hits / rows for hits, rows in known]
    return {"success": sum(shares) / len(known), "rows": sum(rows for _, rows in known), "clients": len(known)}


class TaskWrapper:
    """A task with some of its methods replaced; all others are the wrapped task's."""

    def __init__(self, task: Task):
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)
