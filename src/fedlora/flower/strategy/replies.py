"""Replies of a round, judged one by one: what cannot be used is left out by name, and nothing else happens."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from math import isfinite

import torch
from flwr.app import Array, Message, MetricRecord, RecordDict
from torch import Tensor

from fedlora.flower.strategy.order import sends
from fedlora.flower.strategy.peft_state import MARK, UNREADABLE, Adapter, placed, tensor
from fedlora.rounds import Received, Rules
from fedlora.types import Turn

LOG = getLogger("flwr")


@dataclass(frozen=True)
class Desk:
    """What the replies of one round must satisfy."""

    rules: Rules
    shared: Adapter
    round: int  # from 0
    asked: frozenset[int]  # nodes
    weight: str  # the metric that holds a reply's number of examples
    any_rank: bool
    marked: bool  # must `send` have made the reply?
    folds: int  # how many folds the nodes were told of

    def judged(self, replies: Sequence[Message]) -> dict[int, tuple[Received, RecordDict]]:
        """The good replies by node; each other one is named in the log with what is wrong."""
        good: dict[int, tuple[Received, RecordDict]] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if node in good:
                    raise ValueError("it has replied already")
                good[node] = self._read(node, reply), reply.content
            except ValueError as error:
                LOG.warning("round %s: node %s is left out: %s.", self.round + 1, node, error)
        return self._one_rank(good)

    def _read(self, node: int, reply: Message) -> Received:
        if reply.has_error():
            raise ValueError(f"it reports {reply.error.reason!r}")
        if node not in self.asked:
            raise ValueError("it was not asked")
        records = list(reply.content.array_records.values())
        if len(records) != 1:
            raise ValueError(f"it sent {len(records)} records of arrays where 1 is needed")
        examples = weight(reply.content, self.weight)
        arrays = dict(records[0])
        self._check_mark(arrays.pop(MARK, None))
        tree = self._tree(arrays)
        ranks = [layer["A"].shape[0] for part, layer in tree.items() if part in self.shared.adapted and "A" in layer]
        return Received(Turn(self.round, node, max(ranks, default=0)), examples, tree)  # type: ignore[arg-type]

    def _check_mark(self, mark: Array | None) -> None:
        if mark is None:
            if self.marked:
                title = next(iter(self.rules.values())).title
                raise ValueError(f"{title} works at the client, too, and its app does not use fedlora.flower.send")
            return
        found = marked(mark)
        if found != (self.round, self.folds):
            raise ValueError(
                f"it answers for round {found[0] + 1} with {found[1]} folds, where round {self.round + 1} with "
                f"{self.folds} was asked for"
            )

    def _tree(self, arrays: Mapping[str, Array]) -> dict[str, dict[str, Tensor]]:
        keys = placed(arrays)
        wanted = {(part, leaf) for part, rule in self.rules.items() for leaf in sends(rule, self.round)}
        for what, odd in (("lacks", wanted - keys.keys()), ("sent", keys.keys() - wanted)):
            if odd:
                first = sorted(self.shared.keys.get(x, keys.get(x)) for x in odd)
                more = f" and {len(first) - 1} more" if len(first) > 1 else ""
                needed = "" if what == "lacks" else ", which the method does not send in this round"
                raise ValueError(f"it {what} {first[0]!r}{more}{needed}")
        tree: dict[str, dict[str, Tensor]] = {part: {} for part in self.rules}
        for (part, leaf), key in sorted(keys.items()):
            tree[part][leaf] = tensor(key, arrays[key])
        for part, layer in tree.items():
            self._check_shapes(part, layer)
        return tree

    def _check_shapes(self, part: str, layer: Mapping[str, Tensor]) -> None:
        own = self.shared.tree[part]
        needed = {leaf: tuple(own[leaf].shape) for leaf in layer}
        if self.any_rank and part in self.shared.adapted and layer.keys() == {"A", "B"}:
            rank = layer["A"].shape[0] if layer["A"].dim() == 2 else 0
            if 1 <= rank <= needed["A"][0]:
                needed = {"A": (rank, needed["A"][1]), "B": (needed["B"][0], rank)}
        found = {leaf: tuple(x.shape) for leaf, x in layer.items()}
        if found != needed:
            raise ValueError(f"it sent {found} for {part!r} where {needed} is needed")

    def _one_rank(self, good: dict[int, tuple[Received, RecordDict]]) -> dict[int, tuple[Received, RecordDict]]:
        """Methods ask a turn's rank whether all clients are alike: then it is the server's own, part by part."""
        forms = {
            tuple(tuple(x.shape) for layer in received.tree.values() for x in layer.values())
            for received, _ in good.values()
        }
        if len(forms) > 1 or not good:
            return good
        rank = max(self.shared.ranks().values())
        return {
            node: (received._replace(turn=Turn(self.round, node, rank)), content)
            for node, (received, content) in good.items()
        }


def marked(mark: Array) -> tuple[int, int]:
    """The round (from 0) and the number of folds of which a reply's mark tells."""
    try:
        round, folds = (int(x) for x in mark.numpy())
    except UNREADABLE as error:
        raise ValueError(f"its {MARK!r} cannot be read") from error
    return round, folds


def mark(round: int, folds: int) -> Array:
    """What ``send`` puts beside the leaves."""
    return Array(torch.tensor([round, folds]).numpy())


def weight(content: RecordDict, key: str) -> int | float:
    """A reply's number of examples. ``ValueError`` where it is missing or no weight."""
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise ValueError(f"it sent {len(records)} records of metrics where 1 is needed")
    found = records[0].get(key)
    if not isinstance(found, int | float) or not isfinite(found) or found <= 0:
        raise ValueError(f"its metric {key!r} is {found!r}, where a number above 0 is needed")
    return found


def alike(contents: Iterable[RecordDict]) -> list[RecordDict]:
    """The replies whose metrics can be averaged: those of the form that most of them have."""
    found = list(contents)
    forms = Counter(_form(content) for content in found)
    most = max(forms, key=lambda form: forms[form], default=None)
    if len(forms) > 1:
        LOG.warning("%s replies have metrics unlike the others'; their metrics are left out.", len(found) - forms[most])
    return [content for content in found if _form(content) == most]


def _form(content: RecordDict) -> tuple[tuple[str, int], ...]:
    record: MetricRecord = next(iter(content.metric_records.values()))
    return tuple(sorted((key, len(x) if isinstance(x, list) else -1) for key, x in record.items()))
