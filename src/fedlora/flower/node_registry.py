"""The mapping of nodes to clients, and the check that enough clients can take part in a round.

Every node that connects is first asked which client it is.
"""

import math
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from time import monotonic, sleep

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora.engines.loop import Event, Watch
from fedlora.flower.client_messages import HELLO
from fedlora.flower.wire import HOLDS, METRICS, ORDER
from fedlora.tasks.data.labels import READINGS
from fedlora.text import display_safe

PATIENCE = 600.0  # seconds for a node to load its model and answer
Record = ConfigRecord | ArrayRecord
GONE = "its node is not connected"
LOADING = "is connected and still loading its model and data"


@dataclass
class NodeRegistry:
    """Client number -> node id. Each node's answer is checked against the server's own initial state."""

    grid: Grid
    count: int  # clients of the federation
    run: str
    start: str  # digest of everything that all clients must share
    report: Callable[[int | None, str], None]  # client, event
    describe: Callable[[str], str] = lambda reading: ""  # describes how a client reads its labels
    terms: Mapping[str, Record] = field(default_factory=dict)  # further records of the first message to a node
    retry: float = 10.0  # seconds until a node that failed or was refused is asked again
    pause: Callable[[], None] = lambda: sleep(0.1)  # between two refreshes
    nodes: dict[int, int] = field(default_factory=dict)
    base_updates_held: dict[int, tuple[int, str]] = field(default_factory=dict)  # client -> number, name of its base
    rows: dict[int, int] = field(default_factory=dict)  # client -> number of its training rows
    readings: dict[int, str] = field(default_factory=dict)  # client -> how it reads its labels, if it has labels
    asked: dict[str, tuple[int, float]] = field(default_factory=dict)  # unanswered: message id -> node, sending time
    reasons: dict[int, str] = field(default_factory=dict)  # node -> why it was left out last
    resting: dict[int, float] = field(default_factory=dict)  # node that failed -> time until which it is not asked
    connected: set[int] = field(default_factory=set)

    def refresh(self) -> None:
        """Update the connected nodes, ask the new ones, and process their answers."""
        self.connected = set(self.grid.get_node_ids())
        now = monotonic()
        self.asked = {key: (node, then) for key, (node, then) in self.asked.items() if now - then <= PATIENCE}
        resting = {node for node, until in self.resting.items() if now < until}
        new = sorted(self.connected - {*self.nodes.values(), *(node for node, _ in self.asked.values()), *resting})
        content = RecordDict({ORDER: ConfigRecord({"run": self.run}), **self.terms})
        messages = [Message(content, node, HELLO) for node in new]
        pushed = set(self.grid.push_messages(messages))  # a message has its id from here on
        ids = ((m.metadata.message_id, m.metadata.dst_node_id) for m in messages)
        self.asked |= {key: (node, now) for key, node in ids if key in pushed}
        for reply in self.grid.pull_messages(list(self.asked)) if self.asked else ():
            node, _ = self.asked.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node is not None:
                self._register(node, reply)

    def connected_clients(self) -> set[int]:
        """Return the clients whose nodes are connected."""
        return {client for client, node in self.nodes.items() if node in self.connected}

    def left_out(self) -> dict[int, str]:
        """Return the connected nodes that are left out, with the reasons."""
        unknown = self.connected - set(self.nodes.values())
        return {node: why for node in sorted(unknown) if (why := self.reasons.get(node, LOADING)) != LOADING}

    def wait(self, seconds: float) -> None:
        """Wait until all clients are connected: at most ``seconds``, and ``PATIENCE`` more for nodes that still load.

        If every missing client is left out, wait only until they have been asked once more.
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
        asked = {node for node, _ in self.asked.values()}
        loading = sorted(node for node in asked & self.connected if self.reasons.get(node, LOADING) == LOADING)
        for node in loading:
            if node not in self.reasons:
                self.report(None, f"node {node} {LOADING}; the first round waits {PATIENCE:g} seconds more at most")
            self.reasons[node] = LOADING
        return bool(loading)

    def _register(self, node: int, reply: Message) -> None:
        """Register the client of a node, or leave the node out. It is reported once, and asked again later."""
        if reply.has_error():
            why: str | None = display_safe(reply.error.reason)
        else:
            metrics, holds = (reply.content.get(key) for key in (METRICS, HOLDS))
            readable = isinstance(metrics, MetricRecord) and isinstance(holds, ConfigRecord)
            start, _, base = str(holds.get(HOLDS)).partition(" ") if readable else ("", "", "")
            why = self._find_objection(node, metrics, start) if readable else "it did not say who it is"
        if why is not None:
            if self.reasons.get(node) != why:
                self.report(None, f"node {node} is left out: {why}")
            self.reasons[node], self.resting[node] = why, monotonic() + self.retry
            return
        client = metrics["client"]
        self.reasons.pop(node, None)
        self.nodes[client], self.rows[client] = node, metrics["examples"]
        self.base_updates_held[client] = metrics["base_updates_held"], base
        if reading := READINGS[metrics["labels"]]:
            self.readings[client] = reading
        self.report(client, f"joined{self.describe(reading)}")

    def _find_objection(self, node: int, metrics: MetricRecord, start: str) -> str | None:
        """Return the reason why a node cannot be a client; None if there is no reason."""
        client, rows, held, reading = map(metrics.get, ("client", "examples", "base_updates_held", "labels"))
        if type(client) is not int or not 0 <= client < self.count:
            return f"it calls itself client {client!r}, and clients are numbered 0 to {self.count - 1}"
        if type(rows) is not int or rows < 1 or type(held) is not int:
            return f"client {client} says that it has {rows!r} training rows and {held!r} base updates"
        if type(reading) is not int or not 0 <= reading < len(READINGS):
            return f"client {client} does not say how it reads its labels; its version of fedlora differs"
        if (other := self.nodes.get(client)) not in (None, node) and other in self.connected:
            return f"it calls itself client {client}, which node {other} is already"
        if start != self.start:
            return (
                f"client {client} does not make the same start; its configuration, its pretrained model or its version "
                "of torch differs from the server's"
            )
        return None


class TooFewError(ValueError):
    """Fewer clients than a round needs can take part, and none was repaired in time."""


@dataclass
class Quorum:
    """Checks in one round whether enough clients can still take part.

    A client that is not connected may still connect. A node that is left out must be repaired first, and so must a
    connected client that failed when it was last asked.
    """

    registry: NodeRegistry
    number: int  # of the round, from 0
    seconds: float  # time to repair clients
    watch: Watch
    reasons: Mapping[int, str]  # client -> why it failed in this round
    failed: set[int] = field(default_factory=set)  # clients that failed when they were last asked
    since: float | None = None  # time since which too few clients can take part

    def check(self, least: int, able: AbstractSet[int], answered: AbstractSet[int] = frozenset()) -> None:
        """Report if fewer than ``least`` of the ``able`` clients can take part.

        Raises ``TooFewError`` after ``seconds`` of this.
        """
        self.failed -= answered
        here = self.registry.connected_clients() & able
        ready = answered | (here - self.failed)
        possible = len(ready) + max(0, len(able - here - ready) - len(self.registry.left_out()))
        if possible >= least:
            self.since = None
            return
        why = f"{possible} of {len(able)} clients can take part, and it needs {least}"
        if self.since is None:
            self.since = monotonic()
            text = f"{why}; the run ends if this lasts for {self.seconds:g} seconds (flower.repair_timeout)"
            self.watch(Event("waiting", self.number, text=text))
        elif monotonic() - self.since > self.seconds:
            failed = sorted(self.failed & self.registry.connected_clients())
            left = [f"node {node} ({reason})" for node, reason in self.registry.left_out().items()]
            left += [f"client {client} ({self.reasons.get(client, 'its upload was refused')})" for client in failed]
            raise TooFewError(
                f"round {self.number + 1} cannot be finished: {why}; left out: {', '.join(left) or 'nobody'}. The "
                "rounds before it are kept; mend this, and start the run again in the same folder."
            )
