"""Estimate the bytes that a run sends: the round loop, the channel and the hooks run on stand-ins for trained leaves.

One part stands for all parts of equal shape. The leaves of adapted weights have values, since methods compute with
them. Parts that are trained in full are averaged only, so theirs are meta tensors.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from fedlora.adapters import Dense
from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.engines.client_turn import ClientState, ClientUpdate
from fedlora.engines.comm.channel import Transfer
from fedlora.engines.federation import Federation
from fedlora.engines.in_process import InProcess
from fedlora.engines.loop import ServerState
from fedlora.rounds import SMALL, Rules, client_turn, server_turn
from fedlora.runs.plan.memory import MemoryTracker
from fedlora.runs.table import group_by
from fedlora.seeds import derive_seed
from fedlora.training.model import Model
from fedlora.training.parts import weight_shape
from fedlora.types import Factors, Layer, Tree, Turn

PROBED = 3  # rounds that are repeated with other stand-ins, to find out whether bytes depend on values
STEP = 0.01


@dataclass(frozen=True)
class PartGroup:
    """Parts of equal shape, and the one that stands for all."""

    part: str
    layer: Layer
    count: int


@dataclass
class Traffic:
    """The transfers of a run, and the memory that goes with them."""

    rows: list[Transfer] = field(default_factory=list)
    varies: bool = False  # whether the bytes depend on the values of trained leaves
    kept: int = 0  # bytes of the leaves that all clients keep
    base_updates: int = 0  # bytes of the base-update log
    fold_round: int = 0  # bytes by which a round's base update lets the sum of all grow
    fold_bound: int = 0  # bytes of that sum at the rank min(m, n), beyond which it does not grow
    fold_sum: int = 0  # bytes of that sum after the run
    combining: int = 0  # bytes that combining a round takes at most, beside the uploads

    def kinds(self, direction: str) -> dict[str, int]:
        """Return the bytes of the run by kind, as the summary has them."""
        sums: Counter[str] = Counter()
        for row in (row for row in self.rows if row.direction == direction):
            sums[row.kind] += row.bytes
        return dict(sums)

    def by_client(self, direction: str, first: bool, turns: int) -> dict[str, float]:
        """Return the bytes of a client in a round: by kind, as mean over ``turns`` turns, and the most of one turn."""
        rows = [row for row in self.rows if row.direction == direction and (row.round == 0) == first]
        sums: Counter[Any] = Counter()
        most: Counter[Any] = Counter()
        for row in rows:
            sums[row.kind] += row.bytes
            most[row.round, row.client] += row.bytes
        means = {kind: total / turns for kind, total in sums.items()} if turns else {}
        return {**means, "mean": sum(means.values()), "most": max(most.values(), default=0)}


def estimate_traffic(f: Federation, groups: Iterable[PartGroup]) -> Traffic:
    """Simulate the rounds of a federation for each group of parts, without its model, data and training."""
    total = Traffic()
    for group in groups:
        traffic = simulate_group(f, group)
        if not isinstance(f.rules[group.part].adapter, Dense):
            short = replace(f, rounds=min(f.rounds, PROBED))
            first = [row for row in traffic.rows if row.round < short.rounds]
            for other in (_StandInTrainer(seed=1), _StandInTrainer(shrinks=True)):
                total.varies |= simulate_group(short, group, other).rows != first
        total.rows += traffic.rows
        total.kept += traffic.kept
        total.base_updates += traffic.base_updates
        total.combining += traffic.combining
        total.fold_round += traffic.fold_round
        total.fold_bound += traffic.fold_bound
        total.fold_sum += traffic.fold_sum
    return total


def group_parts(model: Model, rules: Rules) -> tuple[list[PartGroup], Tree]:
    """Return the model's parts in groups of equal shape, and the layer that stands for each part."""
    groups = group_by(model.parts, lambda part: _group_key(model, rules, part)).values()
    layers = [_layer(model, parts[0]) for parts in groups]
    tree = {part: layer for parts, layer in zip(groups, layers) for part in parts}
    return [PartGroup(parts[0], layer, len(parts)) for parts, layer in zip(groups, layers)], tree


def _group_key(model: Model, rules: Rules, path: str) -> Any:
    part = model.parts[path]
    if isinstance(part.adapter, Dense):
        return rules[path], tuple(sorted((leaf, tuple(x.shape)) for leaf, x in part.leaves.items()))
    return weight_shape(cast(Any, part.module).base)


def _layer(model: Model, path: str) -> Layer:
    part = model.parts[path]
    if isinstance(part.adapter, Dense):
        return {leaf: torch.empty(x.shape, device="meta") for leaf, x in part.leaves.items()}
    return part.adapter.init(*weight_shape(cast(Any, part.module).base), 0)


def simulate_group(f: Federation, group: PartGroup, trainer: "_StandInTrainer | None" = None) -> Traffic:
    """Simulate all rounds for one group of parts."""
    initial: Tree = {group.part: group.layer}
    model = cast(Model, _StandInModel(initial))
    alone = replace(f, rules={group.part: f.rules[group.part]}, model=model, data=None, attack=None)
    engine = Rehearsal(trainer=trainer or _StandInTrainer())
    last = deque(engine.run(alone), maxlen=1)[0]
    log = last.base_updates
    factors = [x for f in log.prefix.values() for x in f]
    factors += [x for entry in log.entries for several in entry.values() for f in several for x in f]
    kept = [x for tree in last.kept.values() for layer in tree.values() for x in layer.values()]
    numbers = sum(x.numel() for x in group.layer.values())
    each, bound = _sizes_of_update(log)
    return Traffic(
        [row._replace(numbers=row.numbers * group.count, bytes=row.bytes * group.count) for row in last.ledger],
        kept=group.count * sum(x.nbytes for x in kept),
        base_updates=group.count * sum(x.nbytes for x in factors),
        fold_round=group.count * min(each, bound),
        fold_bound=group.count * bound,
        fold_sum=group.count * min(each * len(log), bound),
        combining=engine.peak * min(group.count, max(1, SMALL // max(1, numbers))),
    )


def _sizes_of_update(log: BaseUpdateLog) -> tuple[int, int]:
    """Return the bytes of the last round's update of one weight, and of an update of full rank; zero without one."""
    terms = [f for several in (log.entries[-1].values() if log.entries else ()) for f in several]
    if not terms:
        return 0, 0
    m, n = terms[0].U.shape[-2], terms[0].V.shape[-1]
    return sum(x.nbytes for f in terms for x in f), min(m, n) * (m + n) * terms[0].U.element_size()


@dataclass(frozen=True)
class _StandInModel:
    """The part of a model that a round needs: its initial leaves."""

    tree: Tree

    def initial(self, seed: int) -> Tree:
        return self.tree

    def fold(self, base_updates: Mapping[str, Any]) -> None:
        """Do nothing, as there is no base."""


@dataclass(frozen=True)
class _StandInTrainer:
    """Returns every trained leaf as a new tensor, whose values are larger or smaller than before."""

    shrinks: bool = False
    seed: int = 0
    turn: Turn | None = None

    def gradient(self, start: Tree) -> Tree:
        return start

    def fit(self, start: Tree, trained: Mapping[str, frozenset[str]], rules: Rules) -> Tree:
        return {
            path: {leaf: self._perturb(x) if leaf in trained[path] else x for leaf, x in layer.items()}
            for path, layer in start.items()
        }

    def _perturb(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return torch.empty_like(x)
        assert self.turn is not None
        draws = torch.Generator().manual_seed(derive_seed(self.turn.seed, "stand-in", self.seed))
        step = STEP * torch.rand(x.shape, generator=draws)
        return torch.where(x == 0, step, x / 2) if self.shrinks else x + torch.where(x < 0, -step, step)


@dataclass
class Rehearsal(InProcess):
    """The in-process engine with a stand-in for training, without evaluation and error measures."""

    trainer: _StandInTrainer = field(default_factory=_StandInTrainer)
    peak: int = field(default=0, init=False)

    def is_measured(self, f):
        return False

    def receive_upload(self, upload):
        return upload  # meta tensors have no values to check

    def _screen(self, f, at, replies):
        return replies

    def aggregate(self, f, at, uploads):
        return server_turn(f.rules, at.shared, uploads)  # noise does not change the bytes

    def score_clients(self, f, at, number, evaluator):
        return {}

    def train(self, own, shared, state):
        trainer = replace(self.trainer, turn=own.turn)
        sent, kept = client_turn(own.federation.rules, shared, state.kept, own.turn, trainer)
        return ClientUpdate(sent, sent, ClientState(kept), 0.0)

    def _combine(self, f: Federation, at: ServerState, uploads: list) -> Any:
        count = len(at.base_updates)
        with MemoryTracker() as memory:
            served = super()._combine(f, at, uploads)
        self.peak = max(self.peak, memory.peak)
        if len(at.base_updates) > count:  # large updates lose their values, so that adding them up costs nothing
            at.base_updates.entries[-1] = {
                part: tuple(
                    f if max(f.U.numel(), f.V.numel()) <= SMALL else Factors(*(x.to("meta") for x in f))
                    for f in several
                )
                for part, several in at.base_updates.entries[-1].items()
            }
        return served
