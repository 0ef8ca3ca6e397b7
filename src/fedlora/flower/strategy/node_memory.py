"""A node's memory between rounds, in Flower's ``context.state``: its private leaves, and its base updates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.flower.strategy.instructions import Instructions
from fedlora.flower.strategy.peft_state import encode_base_updates, read_base_updates
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
        """The node's memory; empty where what it holds belongs to another run of the strategy."""
        if STATE not in state or state[STATE]["series"] != instructions.series:
            for name in (KEPT, SETTLED, RECENT):
                state[name] = ArrayRecord()
            state[STATE] = ConfigRecord({"series": instructions.series, "settled": 0, "seen": 0, "message": ""})
        return cls(state)

    @property
    def seen(self) -> int:
        """The number of base updates that the node has received."""
        return self._count("seen")

    @property
    def message(self) -> str:
        """The id of the message that ``receive`` has seen last."""
        return cast(str, self.state[STATE]["message"])

    def _count(self, name: str) -> int:
        return cast(int, self.state[STATE][name])

    def load(self) -> Tree:
        """The private leaves."""
        record = cast(ArrayRecord, self.state[KEPT])
        return record_to_tree(record) if record else {}

    def save(self, tree: Tree) -> None:
        """Saves private leaves for this client's next turn; those saved before and not touched now stay."""
        self.state[KEPT] = tree_to_record(overlay(self.load(), tree))

    def receive_base_updates(
        self, instructions: Instructions, message: str, sent: ArrayRecord | None
    ) -> dict[str, Factors]:
        """Takes in a message's base updates. Returns the sum of all so far: part -> ``U (m p)`` and ``V (p n)``.

        The same message again changes nothing. The base updates of the last message stay apart from those before: the
        server counts a fold as received only when a reply says so, so the next message may begin where the last one
        did.
        """
        settled, recent = (read_base_updates(cast(ArrayRecord, self.state[name])) for name in (SETTLED, RECENT))
        received = {0: {}, self._count("settled"): settled, self.seen: add_base_update(settled, recent)}
        if instructions.first == 0:
            received[0] = {}
        if instructions.first not in received:
            raise ValueError(
                f"this node holds {self.seen} base updates, and the message begins after {instructions.first}; it has "
                "lost what it kept, and the server will send all of them next time."
            )
        settled, recent = received[instructions.first], read_base_updates(sent or {})
        self.state[SETTLED], self.state[RECENT] = (ArrayRecord(encode_base_updates(x)) for x in (settled, recent))
        self.state[STATE] = ConfigRecord(
            {
                "series": instructions.series,
                "settled": instructions.first,
                "seen": instructions.last,
                "message": message,
            }
        )
        return add_base_update(settled, recent)


def add_base_update(*several: Mapping[str, Factors]) -> dict[str, Factors]:
    """The sum of base updates, part by part."""
    parts: dict[str, list[Factors]] = {}
    for base_updates in several:
        for part, factors in base_updates.items():
            parts.setdefault(part, []).append(factors)
    return {part: compact(total(factors)) for part, factors in parts.items()}
