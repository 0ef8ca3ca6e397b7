"""The queries before a run of clients with their own trainers: for the clients' numbers, and for their model.

The server has no model. It takes the description and the first leaves of client 0, as a run in one process does; if
that client does not come in time, those of the lowest number that does.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import uuid4

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora.engines.loop import Event, Watch
from fedlora.engines.model_spec import ModelSpec, RemoteModel
from fedlora.engines.network_settings import Network
from fedlora.flower.client_messages import HELLO
from fedlora.flower.node_registry import PATIENCE
from fedlora.flower.replies import MALFORMED, describe_refusal
from fedlora.flower.terms import LONGEST, START
from fedlora.flower.trainer_client import MODEL
from fedlora.flower.wire import METRICS, ORDER, QUERY, record_to_tree
from fedlora.schema import Table
from fedlora.security.validation.expected import RefusedError
from fedlora.text import display_safe


@dataclass
class ModelQuery:
    """Queries the nodes of a grid. ``table`` has the settings that clients need to build their trainers."""

    grid: Grid
    table: Table
    count: int  # of clients
    network: Network
    watch: Watch = lambda event: None
    pause: Callable[[float], None] = time.sleep
    run: str = field(default_factory=lambda: uuid4().hex)  # the run's token
    _numbers: dict[int, int] = field(default_factory=dict)  # node -> client
    _rests: dict[int, float] = field(default_factory=dict)  # node that failed -> time until which it is not asked
    _reasons: dict[int, str] = field(default_factory=dict)

    def fetch_model(self) -> RemoteModel:
        """Return the model of the first client that describes it. Raises ``ValueError`` if none does in time."""
        end = time.monotonic() + self.network.join_timeout
        while True:
            late = time.monotonic() >= end
            self._ask_numbers()
            for client, node in self._candidates(late):
                if (model := self._ask_model(client, node)) is not None:
                    return model
            if late and time.monotonic() >= end + self.network.repair_timeout:
                why = "; ".join(f"node {node} ({reason})" for node, reason in self._reasons.items())
                raise ValueError(
                    f"no client described its model within {self.network.join_timeout + self.network.repair_timeout:g} "
                    f"seconds: {why or 'none is connected'}; mend this, and start the run again."
                )
            self.pause(self.network.poll)

    def _candidates(self, late: bool) -> list[tuple[int, int]]:
        """Return the clients to ask for their model, with their nodes: client 0, and the others if it is late."""
        here, now = set(self.grid.get_node_ids()), time.monotonic()
        known = sorted((client, node) for node, client in self._numbers.items() if node in here)
        return [(k, node) for k, node in known if (k == 0 or late) and now >= self._rests.get(node, 0.0)]

    def _ask_numbers(self) -> None:
        now = time.monotonic()
        new = [node for node in sorted(self.grid.get_node_ids()) if node not in self._numbers]
        new = [node for node in new if now >= self._rests.get(node, 0.0)]
        for node, content in self._ask(new, {"ask": "number"}, self.network.join_timeout).items():
            metrics = content.get(METRICS)
            client = metrics.get("client") if isinstance(metrics, MetricRecord) else None
            if type(client) is int and 0 <= client < self.count:
                self._numbers[node] = client
            else:
                self._leave_out(node, f"it calls itself client {client!r}, and clients are 0 to {self.count - 1}")

    def _ask_model(self, client: int, node: int) -> RemoteModel | None:
        question = {"ask": "model", "table": json.dumps(self.table)}
        content = self._ask([node], question, PATIENCE).get(node)
        if content is None:
            return None
        try:
            return read_model(content)
        except MALFORMED as error:
            self._leave_out(node, f"client {client}: {describe_refusal(error)}")
            return None

    def _ask(self, nodes: list[int], question: dict[str, str], seconds: float) -> dict[int, RecordDict]:
        """Return the replies of nodes within some seconds. A node that fails is asked again later."""
        content = RecordDict({ORDER: ConfigRecord({"run": self.run}), QUERY: ConfigRecord(dict(question))})
        messages = [Message(content, node, HELLO) for node in nodes]
        pushed = set(self.grid.push_messages(messages)) if messages else set()
        waiting = {m.metadata.message_id: m.metadata.dst_node_id for m in messages if m.metadata.message_id in pushed}
        end, replies = time.monotonic() + seconds, dict[int, RecordDict]()
        while waiting and time.monotonic() < end:
            for reply in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None and reply.has_error():
                    self._leave_out(node, display_safe(reply.error.reason))
                elif node is not None:
                    replies[node] = reply.content
            here = set(self.grid.get_node_ids())
            waiting = {key: node for key, node in waiting.items() if node in here}
            if waiting:
                self.pause(self.network.poll)
        for node in waiting.values():
            self._leave_out(node, f"it did not answer within {seconds:g} seconds")
        return replies

    def _leave_out(self, node: int, why: str) -> None:
        if self._reasons.get(node) != why:
            self.watch(Event("node", 0, text=f"node {node} is left out: {why}"))
        self._reasons[node], self._rests[node] = why, time.monotonic() + self.network.retry


def read_model(content: RecordDict) -> RemoteModel:
    """Return the model of a client's answer. Raises ``RefusedError`` if it makes no sense."""
    record = content.get(MODEL)
    text = record.get(MODEL) if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str) or len(text) > LONGEST:
        raise RefusedError("it did not describe its model")
    start = content.get(START)
    leaves = record_to_tree(start) if isinstance(start, ArrayRecord) else {}
    return RemoteModel(ModelSpec.from_json(text), leaves)
