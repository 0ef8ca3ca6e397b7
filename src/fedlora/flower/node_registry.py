"""Which node is which client: every node that appears is asked before it is sent anything else."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, sleep

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora.flower.client_messages import HELLO
from fedlora.flower.wire import HOLDS, METRICS, ORDER
from fedlora.tasks.data.labels import READINGS
from fedlora.text import display_safe

PATIENCE = 600.0  # seconds that a node may take to load its model and say who it is
GONE = "its node is not connected"
LOADING = "is connected and still loading its model and data"


@dataclass
class NodeRegistry:
    """Client number -> node id, as the nodes say, each checked against what this server makes from the seed."""

    grid: Grid
    count: int  # clients of the federation
    run: str
    start: str  # the digest of all that every client must have alike
    report: Callable[[int | None, str], None]  # client, what happened
    describe: Callable[[str], str] = lambda reading: ""  # how a client reads its labels, in words
    retry: float = 10.0  # seconds until a node that could not say who it is, or was refused, is asked again
    pause: Callable[[], None] = lambda: sleep(0.1)  # between two looks
    nodes: dict[int, int] = field(default_factory=dict)
    base_updates_held: dict[int, tuple[int, str]] = field(
        default_factory=dict
    )  # client -> its base updates, and its base's name
    rows: dict[int, int] = field(default_factory=dict)  # how many training rows it said that it has
    readings: dict[int, str] = field(default_factory=dict)  # client -> how it reads its labels, where it has any
    asked: dict[str, int] = field(default_factory=dict)  # unanswered: message id -> node
    since: dict[str, float] = field(default_factory=dict)  # message id -> when it was asked
    reasons: dict[int, str] = field(default_factory=dict)  # node -> why it was left out last
    resting: dict[int, float] = field(default_factory=dict)  # nodes that failed to answer, and until when to let them
    connected: set[int] = field(default_factory=set)

    def refresh(self) -> None:
        """Looks which nodes are connected, asks the new ones, and takes in their answers."""
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
                self._register(node, reply)

    def connected_clients(self) -> set[int]:
        """The clients whose nodes are connected."""
        return {client for client, node in self.nodes.items() if node in self.connected}

    def left_out(self) -> dict[int, str]:
        """The connected nodes that are left out, and why."""
        left = self.connected - set(self.nodes.values())
        return {node: why for node in sorted(left) if (why := self.reasons.get(node, LOADING)) != LOADING}

    def wait(self, seconds: float) -> None:
        """Waits until all clients are connected: at most ``seconds``, and ``PATIENCE`` more for those that still load.

        Where every client that is missing is left out, it lasts until they have been asked once more.
        """
        end, last = monotonic() + seconds, math.inf
        self.refresh()
        while len(self.connected_clients()) < self.count and (now := monotonic()) <= last:
            if now >= end and not (now < end + PATIENCE and self._is_loading()):
                return
            hopeless = len(self.connected_clients()) + len(self.left_out()) >= self.count
            last = min(last, now + 2 * self.retry) if hopeless else math.inf
            self.pause()
            self.refresh()

    def _is_loading(self) -> bool:
        """Whether a connected node was asked and has never answered. Each such node is reported once."""
        asked = self.connected & set(self.asked.values())
        found = sorted(node for node in asked if self.reasons.get(node, LOADING) == LOADING)
        for node in found:
            if node not in self.reasons:
                self.report(None, f"node {node} {LOADING}; the first round waits {PATIENCE:g} seconds more at most")
            self.reasons[node] = LOADING
        return bool(found)

    def _register(self, node: int, reply: Message) -> None:
        if reply.has_error():
            return self._leave_out(node, display_safe(reply.error.reason))
        said, held = (reply.content.get(key) for key in (METRICS, HOLDS))
        if not isinstance(said, MetricRecord) or not isinstance(held, ConfigRecord):
            return self._leave_out(node, "it did not say who it is")
        start, _, base = str(held.get(HOLDS)).partition(" ")
        client, why = said.get("client"), self._find_objection(node, said, start)
        if why is not None or type(client) is not int:
            return self._leave_out(node, str(why))
        self.reasons.pop(node, None)
        self.nodes[client], self.rows[client] = node, said["examples"]
        self.base_updates_held[client] = said["base_updates_held"], base
        if reading := READINGS[said["labels"]]:
            self.readings[client] = reading
        self.report(client, f"joined{self.describe(reading)}")

    def _leave_out(self, node: int, why: str) -> None:
        """Reports it once, and asks again after a while: its number may be free then, or its machine in order."""
        if self.reasons.get(node) != why:
            self.report(None, f"node {node} is left out: {why}")
        self.reasons[node], self.resting[node] = why, monotonic() + self.retry

    def _find_objection(self, node: int, said: MetricRecord, start: str) -> str | None:
        client, rows, base_updates_held = (said.get(key) for key in ("client", "examples", "base_updates_held"))
        if type(client) is not int or not 0 <= client < self.count:
            return f"it calls itself client {client!r}, and clients are numbered 0 to {self.count - 1}"
        if type(rows) is not int or rows < 1 or type(base_updates_held) is not int:
            return f"client {client} says that it has {rows!r} training rows and {base_updates_held!r} base updates"
        reading = said.get("labels")
        if type(reading) is not int or not 0 <= reading < len(READINGS):
            return f"client {client} does not say how it reads its labels; its version of fedlora differs"
        other = self.nodes.get(client)
        if other is not None and other != node and other in self.connected:
            return f"it calls itself client {client}, which node {other} is already"
        if start != self.start:
            return (
                f"client {client} does not make the same start; its configuration, its pretrained model or its version "
                "of torch differs from the server's"
            )
        return None
