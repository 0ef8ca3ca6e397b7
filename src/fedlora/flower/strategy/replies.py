"""Checks of a round's replies, one by one and in comparison. A reply that fails is left out and reported."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from logging import getLogger
from math import isfinite
from typing import TypeVar

from flwr.app import Array, Message, MetricRecord, RecordDict

from fedlora.engines.peft_round import PeftRound
from fedlora.flower.replies import MALFORMED, describe_refusal
from fedlora.flower.strategy.arrays import MARK, read_mark, read_tensor
from fedlora.rounds import Received

LOG = getLogger("flwr")
Reading = TypeVar("Reading")


@dataclass(frozen=True)
class ReplyChecks:
    """The checks of each single reply of a round."""

    round: PeftRound
    asked: frozenset[int]  # nodes
    weight: str  # the metric with a reply's number of examples
    needs_mark: bool  # must replies come from `send`?
    base_updates: int  # the number of base updates that the nodes were sent

    def select_good(self, replies: Sequence[Message]) -> dict[int, tuple[Received, RecordDict]]:
        """Return the good replies by node; the log has the others with the reasons."""
        good = read_replies(replies, self._read, f"round {self.round.number + 1}")
        uploads = self.round.align_turns({node: upload for node, (upload, _) in good.items()})
        return {node: (uploads[node], content) for node, (_, content) in good.items()}

    def _read(self, reply: Message) -> tuple[Received, RecordDict]:
        node = reply.metadata.src_node_id
        if node not in self.asked:
            raise ValueError("it was not asked")
        records = list(reply.content.array_records.values())
        if len(records) != 1:
            raise ValueError(f"it sent {len(records)} records of arrays where 1 is needed")
        examples = read_weight(reply.content, self.weight)
        arrays = dict(records[0])
        self._check_mark(arrays.pop(MARK, None))
        return self.round.read_upload(node, examples, arrays, read_tensor), reply.content

    def _check_mark(self, mark: Array | None) -> None:
        if mark is None:
            if self.needs_mark:
                title = next(iter(self.round.rules.values())).title
                raise ValueError(f"{title} works at the client, too, and its app does not use fedlora.flower.send")
            return
        round, held = read_mark(mark)
        if (round, held) != (self.round.number, self.base_updates):
            raise ValueError(
                f"it answers for round {round + 1} with {held} base updates, where round {self.round.number + 1} with "
                f"{self.base_updates} was asked for"
            )


def read_replies(replies: Iterable[Message], read: Callable[[Message], Reading], occasion: str) -> dict[int, Reading]:
    """Read each node's reply. The log has the nodes that are left out, with the reasons."""
    good: dict[int, Reading] = {}
    for reply in replies:
        node = reply.metadata.src_node_id
        try:
            if node in good:
                raise ValueError("it has replied already")
            if reply.has_error():
                raise ValueError(f"it reports {reply.error.reason!r}")
            good[node] = read(reply)
        except MALFORMED as error:
            LOG.warning("%s: node %s is left out: %s.", occasion, node, describe_refusal(error, ValueError))
    return good


def read_weight(content: RecordDict, key: str) -> int | float:
    """Return a reply's number of examples. Raises ``ValueError`` if it is missing or not positive."""
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise ValueError(f"it sent {len(records)} records of metrics where 1 is needed")
    weight = records[0].get(key)
    if not isinstance(weight, int | float) or not isfinite(weight) or weight <= 0:
        raise ValueError(f"its metric {key!r} is {weight!r}, where a number above 0 is needed")
    return weight


def select_alike(contents: Iterable[RecordDict]) -> list[RecordDict]:
    """Return the replies whose metrics can be averaged: those with the most frequent names and lengths."""
    groups: dict[tuple, list[RecordDict]] = {}
    for content in contents:
        record: MetricRecord = next(iter(content.metric_records.values()))
        form = tuple(sorted((key, len(x) if isinstance(x, list) else -1) for key, x in record.items()))
        groups.setdefault(form, []).append(content)
    largest = max(groups.values(), key=len, default=[])
    if len(groups) > 1:
        others = sum(map(len, groups.values())) - len(largest)
        LOG.warning("%s replies have metrics unlike the others'; their metrics are left out.", others)
    return largest
