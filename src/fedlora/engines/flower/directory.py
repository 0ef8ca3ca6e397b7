"""Which node is which client: asked of every node that appears, before it is sent anything else."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, sleep

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.engines.flower.records import HOLDS, METRICS, ORDER

HELLO = "query"
REST = 10.0  # seconds until a node that could not answer is asked again


@dataclass
class Directory:
    """Client number -> node id, as the nodes say, each checked against what this server makes from the seed."""

    grid: Grid
    count: int  # clients of the federation
    run: str
    made: str  # what every party must make from the seed
    tell: Callable[[int | None, str], None]  # client, what happened
    nodes: dict[int, int] = field(default_factory=dict)
    folded: dict[int, int] = field(default_factory=dict)  # how many of this run's folds a client said that it holds
    rows: dict[int, int] = field(default_factory=dict)  # how many training rows it said that it has
    asked: dict[str, int] = field(default_factory=dict)  # unanswered: message id -> node
    refused: set[int] = field(default_factory=set)
    resting: dict[int, float] = field(default_factory=dict)  # nodes that failed to answer, and until when to let them
    connected: set[int] = field(default_factory=set)

    def refresh(self) -> None:
        """Looks who is there, asks who is new, and takes in what has been answered."""
        self.connected = set(self.grid.get_node_ids())
        resting = {node for node, until in self.resting.items() if monotonic() < until}
        known = set(self.nodes.values()) | set(self.asked.values()) | self.refused | resting
        fresh = sorted(self.connected - known)
        content = RecordDict({ORDER: ConfigRecord({"run": self.run})})
        messages = [Message(content, node, HELLO) for node in fresh]
        pushed = set(self.grid.push_messages(messages))
        ids = ((m.metadata.message_id, m.metadata.dst_node_id) for m in messages)
        self.asked |= {key: node for key, node in ids if key in pushed}
        for reply in self.grid.pull_messages(list(self.asked)) if self.asked else ():
            node = self.asked.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                self._introduced(node, reply)

    def here(self) -> set[int]:
        """The clients whose nodes are connected."""
        return {client for client, node in self.nodes.items() if node in self.connected}

    def wait(self, wanted: int, seconds: float, poll: float) -> None:
        """Until so many clients are here, at most so many seconds."""
        end = monotonic() + seconds
        self.refresh()
        while len(self.here()) < wanted and monotonic() < end:
            sleep(poll)
            self.refresh()

    def _introduced(self, node: int, reply: Message) -> None:
        if reply.has_error():
            self.resting[node] = monotonic() + REST
            return self.tell(None, f"node {node} could not say who it is: {reply.error.reason}")
        client = reply.content[METRICS].get("client") if METRICS in reply.content else None
        why = self._objection(node, client, reply)
        if why is None:
            self.nodes[client] = node
            said = reply.content[METRICS]
            self.folded[client], self.rows[client] = said["folded"], said["examples"]
            self.tell(client, "joined")
        else:
            self.refused.add(node)
            self.tell(None, f"node {node} is left out: {why}")

    def _objection(self, node: int, client: object, reply: Message) -> str | None:
        if not isinstance(client, int) or not 0 <= client < self.count:
            return f"it calls itself client {client!r}, and clients are numbered 0 to {self.count - 1}"
        rows, folded = (reply.content[METRICS].get(key) for key in ("examples", "folded"))
        if not isinstance(rows, int) or rows < 1 or not isinstance(folded, int):
            return f"client {client} says that it has {rows!r} training rows and {folded!r} folds"
        other = self.nodes.get(client)
        if other is not None and other != node and other in self.connected:
            return f"it calls itself client {client}, which node {other} is already"
        if HOLDS not in reply.content or reply.content[HOLDS].get(HOLDS) != self.made:
            return (
                f"client {client} does not make the same start from the configuration; "
                "its pretrained model, its configuration or its version of torch differs from the server's"
            )
        return None
