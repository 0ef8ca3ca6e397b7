"""Which node is which client: asked of every node that appears, before it is sent anything else."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, sleep

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora.flower.client_messages import HELLO
from fedlora.flower.wire import HOLDS, METRICS, ORDER
from fedlora.tasks.data.labels import READINGS
from fedlora.text import shown

PATIENCE = 600.0  # seconds that a node may take to load its model and say who it is
GONE = "its node is not connected"
LOADING = "is connected and still loading its model and data"


@dataclass
class Directory:
    """Client number -> node id, as the nodes say, each checked against what this server makes from the seed."""

    grid: Grid
    count: int  # clients of the federation
    run: str
    made: str  # what every party must make from the seed
    tell: Callable[[int | None, str], None]  # client, what happened
    describe: Callable[[str], str] = lambda reading: ""  # what to say of how a party reads its labels
    retry: float = 10.0  # seconds until a node that could not say who it is, or was refused, is asked again
    pause: Callable[[], None] = lambda: sleep(0.1)  # between two looks
    nodes: dict[int, int] = field(default_factory=dict)
    folded: dict[int, tuple[int, str]] = field(default_factory=dict)  # client -> its folds, and its base's name
    rows: dict[int, int] = field(default_factory=dict)  # how many training rows it said that it has
    readings: dict[int, str] = field(default_factory=dict)  # client -> how it reads its labels, where it has any
    asked: dict[str, int] = field(default_factory=dict)  # unanswered: message id -> node
    since: dict[str, float] = field(default_factory=dict)  # message id -> when it was asked
    told: dict[int, str] = field(default_factory=dict)  # node -> why it was left out last
    resting: dict[int, float] = field(default_factory=dict)  # nodes that failed to answer, and until when to let them
    connected: set[int] = field(default_factory=set)

    def refresh(self) -> None:
        """Looks who is there, asks who is new, and takes in what has been answered."""
        self.connected = set(self.grid.get_node_ids())
        now = monotonic()
        for key in [key for key, then in self.since.items() if now - then > PATIENCE]:
            self.asked.pop(key, None)
            del self.since[key]
        resting = {node for node, until in self.resting.items() if now < until}
        known = set(self.nodes.values()) | set(self.asked.values()) | resting
        fresh = sorted(self.connected - known)
        content = RecordDict({ORDER: ConfigRecord({"run": self.run})})
        messages = [Message(content, node, HELLO) for node in fresh]
        pushed = set(self.grid.push_messages(messages))
        ids = ((m.metadata.message_id, m.metadata.dst_node_id) for m in messages)
        self.asked |= {key: node for key, node in ids if key in pushed}
        self.since |= {key: now for key in self.asked if key not in self.since}
        for reply in self.grid.pull_messages(list(self.asked)) if self.asked else ():
            node = self.asked.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                self._introduced(node, reply)

    def here(self) -> set[int]:
        """The clients whose nodes are connected."""
        return {client for client, node in self.nodes.items() if node in self.connected}

    def unable(self) -> dict[int, str]:
        """The connected nodes that are left out, and why."""
        left = self.connected - set(self.nodes.values())
        return {node: why for node in sorted(left) if (why := self.told.get(node, LOADING)) != LOADING}

    def wait(self, seconds: float) -> None:
        """Until all clients are here: at most so many seconds, and ``PATIENCE`` more for those that still load.

        Where every client that is missing is left out, it lasts until they have been asked once more.
        """
        end, last = monotonic() + seconds, math.inf
        self.refresh()
        while len(self.here()) < self.count and (now := monotonic()) <= last:
            if now >= end and not (now < end + PATIENCE and self._loading()):
                return
            hopeless = len(self.here()) + len(self.unable()) >= self.count
            last = min(last, now + 2 * self.retry) if hopeless else math.inf
            self.pause()
            self.refresh()

    def _loading(self) -> bool:
        """Whether a connected node was asked and has never answered, a large model on a slow disk; it is told once."""
        asked = self.connected & set(self.asked.values())
        found = sorted(node for node in asked if self.told.get(node, LOADING) == LOADING)
        for node in found:
            if node not in self.told:
                self.tell(None, f"node {node} {LOADING}; the first round waits {PATIENCE:g} seconds more at most")
            self.told[node] = LOADING
        return bool(found)

    def _introduced(self, node: int, reply: Message) -> None:
        if reply.has_error():
            return self._left_out(node, shown(reply.error.reason))
        said, held = (reply.content.get(key) for key in (METRICS, HOLDS))
        if not isinstance(said, MetricRecord) or not isinstance(held, ConfigRecord):
            return self._left_out(node, "it did not say who it is")
        made, _, base = str(held.get(HOLDS)).partition(" ")
        client, why = said.get("client"), self._objection(node, said, made)
        if why is not None or type(client) is not int:
            return self._left_out(node, str(why))
        self.told.pop(node, None)
        self.nodes[client], self.rows[client] = node, said["examples"]
        self.folded[client] = said["folded"], base
        if reading := READINGS[said["labels"]]:
            self.readings[client] = reading
        self.tell(client, f"joined{self.describe(reading)}")

    def _left_out(self, node: int, why: str) -> None:
        """Told once, and asked again after a while: its number may be free then, or its machine in order."""
        if self.told.get(node) != why:
            self.tell(None, f"node {node} is left out: {why}")
        self.told[node], self.resting[node] = why, monotonic() + self.retry

    def _objection(self, node: int, said: MetricRecord, made: str) -> str | None:
        client, rows, folded = (said.get(key) for key in ("client", "examples", "folded"))
        if type(client) is not int or not 0 <= client < self.count:
            return f"it calls itself client {client!r}, and clients are numbered 0 to {self.count - 1}"
        if type(rows) is not int or rows < 1 or type(folded) is not int:
            return f"client {client} says that it has {rows!r} training rows and {folded!r} folds"
        reading = said.get("labels")
        if type(reading) is not int or not 0 <= reading < len(READINGS):
            return f"client {client} does not say how it reads its labels; its version of fedlora differs"
        other = self.nodes.get(client)
        if other is not None and other != node and other in self.connected:
            return f"it calls itself client {client}, which node {other} is already"
        if made != self.made:
            return (
                f"client {client} does not make the same start; its configuration, its pretrained model or its version "
                "of torch differs from the server's"
            )
        return None
