"""A node's memory between rounds, in Flower's ``context.state``: its private leaves, and its base updates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.flower.strategy.arrays import encode_base_updates, read_base_updates
from fedlora.flower.strategy.instructions import Instructions
from fedlora.flower.wire import overlay, record_to_tree, tree_to_record
from fedlora.linalg.factors import compact, total
from fedlora.types import Factors, Tree

STATE, KEPT, SETTLED, RECENT = "fedlora", "fedlora.kept", "fedlora.settled", "fedlora.recent"


@dataclass
class NodeMemory:
    """One node's memory of one run. It ends with the run, or with the SuperNode."""

    state: RecordDict

    @classmethod
    def of(cls, state: RecordDict, instructions: Instructions) -> "NodeMemory":
        """Return the node's memory, emptied if it belongs to another run of the strategy."""
        if STATE not in state or state[STATE]["series"] != instructions.series:
            for name in (KEPT, SETTLED, RECENT):
                state[name] = ArrayRecord()
            state[STATE] = ConfigRecord({"series": instructions.series, "settled": 0, "seen": 0, "message": ""})
        return cls(state)

    @property
    def message(self) -> str:
        """The id of the message that ``receive`` has processed last."""
        return cast(str, self.state[STATE]["message"])

    def load(self) -> Tree:
        """Return the private leaves."""
        record = cast(ArrayRecord, self.state[KEPT])
        return record_to_tree(record) if record else {}

    def save(self, tree: Tree) -> None:
        """Save private leaves for this client's next turn. Leaves that were saved before and are not in it stay."""
        self.state[KEPT] = tree_to_record(overlay(self.load(), tree))

    def receive_base_updates(
        self, instructions: Instructions, message: str, record: ArrayRecord | None
    ) -> dict[str, Factors]:
        """Add a message's base updates, and return the sum of all so far: part -> ``U (m p)`` and ``V (p n)``.

        The same message again changes nothing. The base updates of the last message are separate from those before it:
        the server counts them as received only after a reply, so the next message may begin where the last one did.
        """
        settled, recent = (read_base_updates(cast(ArrayRecord, self.state[name])) for name in (SETTLED, RECENT))
        numbers: Any = self.state[STATE]
        sums = {0: {}, numbers["settled"]: settled, numbers["seen"]: add_base_updates(settled, recent)}
        if instructions.first == 0:
            sums[0] = {}
        if instructions.first not in sums:
            raise ValueError(
                f"this node holds {numbers['seen']} base updates, and the message begins after {instructions.first}; "
                "it has lost what it kept, and the server will send all of them next time."
            )
        settled, recent = sums[instructions.first], read_base_updates(record or {})
        self.state[SETTLED], self.state[RECENT] = (ArrayRecord(encode_base_updates(x)) for x in (settled, recent))
        values = {"settled": instructions.first, "seen": instructions.last, "message": message}
        self.state[STATE] = ConfigRecord({"series": instructions.series, **values})
        return add_base_updates(settled, recent)


def add_base_updates(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the sum of two base updates, part by part."""
    parts = {**first, **second}
    return {part: compact(total([x[part] for x in (first, second) if part in x])) for part in parts}
