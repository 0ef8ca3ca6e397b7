"""What a hostile client does, for tests and research: an attack has three places to act, and leaves the others alone.

``taught``: the rows that it trains on. ``sends``: what leaves it after its turn. ``together``: what it sends if it
knows what the others send; that one is played where the uploads meet, so that it is the same in every engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules, received
from fedlora.seeds import derived
from fedlora.tasks._base import Task
from fedlora.tasks.metrics.scores import Scores
from fedlora.types import Layer, Tree, Turn

SUCCESS = "success"  # the name of a judge's sum


@dataclass(frozen=True)
class Attack:
    """The ``[attack]`` table: one attack, and who takes part in it from which round on.

    An attack of another package is a frozen dataclass that defines one of ``taught``, ``sends`` and ``together``; its
    own fields are further keys of the table and need defaults. ``taught`` and ``sends`` are called for attackers only,
    ``together`` once a round with all uploads.
    """

    share: float = 0.3  # of the clients, drawn from the seed
    clients: list[int] | None = None  # or these
    start: int = 1  # the first round with an attack, from 1

    cite: ClassVar[str] = ""  # BibTeX of its paper
    meets: ClassVar[str] = ""  # of an attack that needs the others' uploads: its name, and what it does with them

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"attack.share is {self.share}; it is a share of the clients, from 0 to 1.")
        if self.clients is not None and any(client < 0 for client in self.clients):
            raise ValueError(f"attack.clients is {self.clients}; clients are numbered from 0.")
        if self.start < 1:
            raise ValueError(f"attack.start is {self.start}; rounds are numbered from 1.")

    def check(self, method: Method, task: Task, hidden: bool) -> None:
        """``ValueError`` where the attack has nothing to act on; ``hidden`` says that the server sees no upload."""
        if hidden and self.meets:
            raise ValueError(
                f"attack.name is {self.meets}, and flower.secure_aggregation hides these; leave one of the two out."
            )

    def ready(self, task: Task, model: str, count: int, seed: int) -> Self:
        """The attack with its clients known, and what it needs of the task's model, such as a word's tokens."""
        if self.clients is None:
            draws = torch.Generator().manual_seed(derived(seed, "attackers"))
            many = int(self.share * count + 1e-9)  # 0.3 of 10 is 3
            return replace(self, clients=sorted(torch.randperm(count, generator=draws)[:many].tolist()))
        if strange := [client for client in self.clients if client >= count]:
            raise ValueError(f"attack.clients names client {strange[0]}, and clients are numbered 0 to {count - 1}.")
        return self

    @property
    def who(self) -> frozenset[int]:
        """The attackers, once the attack is ready."""
        return frozenset(self.clients or ())

    def acts(self, turn: Turn) -> bool:
        """Whether this turn is an attacker's, in a round with an attack."""
        return turn.round + 1 >= self.start and turn.client in self.who

    def taught(self, task: Task) -> Task:
        """The task as an attacker trains on it."""
        return task

    def judge(self, task: Task) -> Task | None:
        """A task whose scores on the test rows, as ``success``, say how far the attack came; None: accuracy says it."""
        return None

    def sends(self, rules: Rules, start: Tree, sent: Tree, turn: Turn) -> Tree:
        """What an attacker sends instead of ``sent``; ``start`` is what it trained from."""
        return sent

    def together(
        self, rules: Rules, shared: Tree, uploads: Mapping[int, Received], overheard: dict[int, Tree]
    ) -> dict[int, Received]:
        """What attackers send instead, knowing all uploads of the round; ``overheard`` they keep for the next one."""
        return {}


def taught(attack: Attack | None, task: Task, turn: Turn) -> Task:
    """What a client trains on in a turn."""
    return task if attack is None or not attack.acts(turn) else attack.taught(task)


def leaving(attack: Attack | None, rules: Rules, shared: Tree, kept: Tree, sent: Tree, turn: Turn) -> Tree:
    """What leaves a client after its turn: what the method sends, or what an attacker sends instead."""
    if attack is None or not attack.acts(turn):
        return sent
    return attack.sends(rules, received(rules, shared, kept, turn), sent, turn)


def moved(start: Layer, sent: Layer, by: float) -> dict[str, Tensor]:
    """Each leaf with ``by`` times its change: to first order, ``by`` times the update."""
    return {leaf: start[leaf] + by * (x - start[leaf]) for leaf, x in sent.items()}


def succeeded(attack: Attack | None, scores: Mapping[int, Scores]) -> dict[str, Any]:
    """How far an attack came with honest clients' own models, mean over clients; nothing where they do not tell."""
    honest = {client: one.sums for client, one in scores.items() if attack is not None and client not in attack.who}
    told = [sums[SUCCESS] for sums in honest.values() if SUCCESS in sums]
    if not told:
        return {}
    shares = [hits / rows for hits, rows in told]
    return {"success": sum(shares) / len(told), "rows": sum(rows for _, rows in told), "clients": len(told)}


class Altered:
    """A task with some of its functions replaced; all others are its own."""

    def __init__(self, task: Task):
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)
