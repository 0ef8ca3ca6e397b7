"""Bytes of a run before it is run: the real round loop, channel and hooks, on stand-ins for what training finds.

Leaves of one shape are played by one of them. Adapted weights get real numbers, since methods compute with them;
parts trained in full are only averaged, so theirs are shapes without numbers.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from fedlora.adapters import Dense
from fedlora.engines.client_turn import ClientState, ClientUpdate
from fedlora.engines.comm.channel import Transfer
from fedlora.engines.federation import Federation
from fedlora.engines.in_process import InProcess
from fedlora.engines.loop import ServerState
from fedlora.rounds import SMALL, Rules, client_turn, server_turn
from fedlora.runs.plan.memory import Live
from fedlora.seeds import derive_seed
from fedlora.training.model import Model, weight_shape
from fedlora.types import Factors, Layer, Tree, Turn

PROBED = 3  # rounds in which other stand-ins are tried, to see whether bytes depend on what training finds
STEP = 0.01


@dataclass(frozen=True)
class Group:
    """Parts that are alike, and the one of them that stands for all."""

    part: str
    layer: Layer
    many: int


@dataclass
class Traffic:
    """What crosses the wire in a run, and what of it is held where at its end."""

    rows: list[Transfer] = field(default_factory=list)
    varies: bool = False  # whether the figures depend on what training finds; they are then the most that was seen
    kept: int = 0  # bytes that all clients keep for themselves at the end
    base_updates: int = 0  # bytes of the updates that were folded, as they are kept for those who missed them
    combining: int = 0  # bytes that combining a round takes beside the uploads, at most

    def bytes(self, direction: str, kind: str | None = None, first: bool | None = None) -> int:
        """Bytes that cross, over all clients; ``first`` picks the first round or the later ones."""
        return sum(
            row.bytes
            for row in self.rows
            if row.direction == direction and kind in (None, row.kind) and first in (None, row.round == 0)
        )

    def kinds(self, direction: str) -> dict[str, int]:
        """The whole run's bytes by kind, as a run's summary has them."""
        return {
            kind: self.bytes(direction, kind)
            for kind in dict.fromkeys(r.kind for r in self.rows if r.direction == direction)
        }

    def a_client(self, direction: str, first: bool, turns: int) -> dict[str, float]:
        """Bytes a client and round by kind: the mean over ``turns`` turns, and the most that one client's turn has."""
        rows = [row for row in self.rows if row.direction == direction and (row.round == 0) == first]
        sums: Counter[Any] = Counter()
        most: Counter[Any] = Counter()
        for row in rows:
            sums[row.kind] += row.bytes
            most[row.round, row.client] += row.bytes
        means = {kind: total / turns for kind, total in sums.items()} if turns else {}
        return {**means, "mean": sum(means.values()), "most": max(most.values(), default=0)}


def traffic(f: Federation, groups: Iterable[Group]) -> Traffic:
    """Plays the rounds of a federation for each group of parts; its model, data and training are not looked at."""
    found = Traffic()
    for group in groups:
        played = play(f, group)
        if not isinstance(f.rules[group.part].adapter, Dense):
            short = replace(f, rounds=min(f.rounds, PROBED))
            first = [row for row in played.rows if row.round < short.rounds]
            for other in (_Moves(seed=1), _Moves(shrinks=True)):
                played.varies |= play(short, group, other).rows != first
        found.rows += played.rows
        found.varies |= played.varies
        found.kept += played.kept
        found.base_updates += played.base_updates
        found.combining += played.combining
    return found


def grouped(model: Model, rules: Rules) -> list[Group]:
    """The model's parts in groups of equal shapes."""
    known: dict[Any, list[str]] = {}
    for path in model.parts:
        known.setdefault(group_key(model, rules, path), []).append(path)
    return [Group(paths[0], _layer(model, paths[0]), len(paths)) for paths in known.values()]


def group_key(model: Model, rules: Rules, path: str) -> Any:
    """What parts of one group have in common."""
    part = model.parts[path]
    if isinstance(part.adapter, Dense):
        return rules[path], tuple(sorted((leaf, tuple(x.shape)) for leaf, x in part.leaves.items()))
    return weight_shape(cast(Any, part.module).base)


def _layer(model: Model, path: str) -> Layer:
    part = model.parts[path]
    if isinstance(part.adapter, Dense):
        return {leaf: torch.empty(x.shape, device="meta") for leaf, x in part.leaves.items()}
    return part.adapter.init(*weight_shape(cast(Any, part.module).base), 0)


def play(f: Federation, group: Group, trainer: "_Moves | None" = None) -> Traffic:
    """Play all rounds for one group of parts, with stand-ins for what training finds."""
    initial: Tree = {group.part: group.layer}
    own = replace(
        f, rules={group.part: f.rules[group.part]}, model=cast(Model, _Stand(initial)), data=None,
        attack=None,
    )  # fmt: skip
    engine = Rehearsal(trainer=trainer or _Moves())
    last = deque(engine.run(own), maxlen=1)[0]
    log = last.base_updates
    factors = [x for f in log.prefix.values() for x in f]
    factors += [x for entry in log.entries for several in entry.values() for f in several for x in f]
    numbers = sum(x.numel() for x in group.layer.values())
    return Traffic(
        [row._replace(numbers=row.numbers * group.many, bytes=row.bytes * group.many) for row in last.ledger],
        kept=group.many * sum(_size(layer.values()) for tree in last.kept.values() for layer in tree.values()),
        base_updates=group.many * _size(factors),
        combining=engine.most * min(group.many, max(1, SMALL // max(1, numbers))),
    )


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@dataclass(frozen=True)
class _Stand:
    """What a round needs of a model: where it begins."""

    tree: Tree

    def initial(self, seed: int) -> Tree:
        return self.tree

    def fold(self, base_updates: Mapping[str, Any]) -> None:
        """There is no base to fold into."""


@dataclass(frozen=True)
class _Moves:
    """Trains nothing but pretends to: every trained leaf comes back as a new tensor, larger or smaller than before."""

    shrinks: bool = False
    seed: int = 0
    turn: Turn | None = None

    def gradient(self, start: Tree) -> Tree:
        return start

    def fit(self, start: Tree, trained: Mapping[str, frozenset[str]], rules: Rules) -> Tree:
        return {
            path: {leaf: self._moved(x) if leaf in trained[path] else x for leaf, x in layer.items()}
            for path, layer in start.items()
        }

    def _moved(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return torch.empty_like(x)
        assert self.turn is not None
        draws = torch.Generator().manual_seed(derive_seed(self.turn.seed, "stand-in", self.seed))
        away = STEP * torch.rand(x.shape, generator=draws)
        return torch.where(x == 0, away, x / 2) if self.shrinks else x + torch.where(x < 0, -away, away)


@dataclass
class Rehearsal(InProcess):
    """The engine of one process with stand-ins for training; nothing is evaluated or measured."""

    trainer: _Moves = field(default_factory=_Moves)
    most: int = field(default=0, init=False)

    def is_measured(self, f):
        return False

    def receive_upload(self, upload):
        return upload  # there are no values to judge

    def _screen(self, f, at, replies):
        return replies

    def aggregate(self, f, at, uploads):
        return server_turn(f.rules, at.shared, uploads)  # noise has no bytes

    def score_clients(self, f, at, number, evaluator):
        return {}

    def train(self, own, shared, state):
        sent, kept = client_turn(
            own.federation.rules, shared, state.kept, own.turn, replace(self.trainer, turn=own.turn)
        )
        return ClientUpdate(sent, sent, ClientState(kept), 0.0)

    def _combine(self, f: Federation, at: ServerState, uploads: list) -> Any:
        count = len(at.base_updates)
        with Live() as live:
            served = super()._combine(f, at, uploads)
        self.most = max(self.most, live.peak)
        if (
            len(at.base_updates) > count
        ):  # large ones without numbers: adding up what a client missed costs nothing then
            at.base_updates.entries[-1] = {
                part: tuple(
                    f if max(f.U.numel(), f.V.numel()) <= SMALL else Factors(*(x.to("meta") for x in f))
                    for f in several
                )
                for part, several in at.base_updates.entries[-1].items()
            }
        return served
