"""What a node keeps between rounds, in Flower's ``context.state``: its private leaves, and the folds it has had."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.flower.strategy.order import Order
from fedlora.flower.strategy.peft_state import fold_arrays, folds_of
from fedlora.flower.wire import pack, unpack
from fedlora.linalg.factors import compacted, total
from fedlora.types import Factors, Tree

STATE, KEPT, SETTLED, RECENT = "fedlora", "fedlora.kept", "fedlora.settled", "fedlora.recent"


@dataclass
class Node:
    """One node's memory of one run. It ends with the run, or with the SuperNode."""

    state: RecordDict

    @classmethod
    def of(cls, state: RecordDict, order: Order) -> "Node":
        """The node's memory; empty where what it holds belongs to another run of the strategy."""
        if STATE not in state or state[STATE]["series"] != order.series:
            for name in (KEPT, SETTLED, RECENT):
                state[name] = ArrayRecord()
            state[STATE] = ConfigRecord({"series": order.series, "settled": 0, "seen": 0, "message": ""})
        return cls(state)

    @property
    def seen(self) -> int:
        """How many folds the node has had."""
        return self._count("seen")

    @property
    def message(self) -> str:
        """The id of the message that ``receive`` has seen last."""
        return cast(str, self.state[STATE]["message"])

    def _count(self, name: str) -> int:
        return cast(int, self.state[STATE][name])

    def kept(self) -> Tree:
        """The leaves that stay here."""
        record = cast(ArrayRecord, self.state[KEPT])
        return unpack(record) if record else {}

    def keep(self, tree: Tree) -> None:
        """Leaves for this client's next turn; those it kept before and did not touch now stay, too."""
        before = self.kept()
        self.state[KEPT] = pack({part: {**before.get(part, {}), **tree.get(part, {})} for part in {**before, **tree}})

    def folds(self, order: Order, message: str, sent: ArrayRecord | None) -> dict[str, Factors]:
        """Everything folded so far: part -> ``U (m p)`` and ``V (p n)``. The same message again changes nothing.

        The folds of the last message stay apart from those before: the server only counts a fold as had when a reply
        tells of it, so the next message may begin where the last one did.
        """
        settled, recent = (folds_of(cast(ArrayRecord, self.state[name])) for name in (SETTLED, RECENT))
        had = {0: {}, self._count("settled"): settled, self.seen: summed(settled, recent)}
        if order.first == 0:
            had[0] = {}
        if order.first not in had:
            raise ValueError(
                f"this node holds {self.seen} folds, and the message begins after {order.first}; it has lost what it "
                "kept, and the server will send all of them next time."
            )
        settled, recent = had[order.first], folds_of(sent or {})
        self.state[SETTLED], self.state[RECENT] = (ArrayRecord(fold_arrays(x)) for x in (settled, recent))
        self.state[STATE] = ConfigRecord(
            {"series": order.series, "settled": order.first, "seen": order.last, "message": message}
        )
        return summed(settled, recent)


def summed(*several: Mapping[str, Factors]) -> dict[str, Factors]:
    """The sum of folds, part by part."""
    parts: dict[str, list[Factors]] = {}
    for folds in several:
        for part, factors in folds.items():
            parts.setdefault(part, []).append(factors)
    return {part: compacted(total(factors)) for part, factors in parts.items()}
