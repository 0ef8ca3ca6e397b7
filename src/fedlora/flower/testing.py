"""Flower without processes: a ``Grid`` that calls the client app where it stands, message by message."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

App = Callable[[Message, Context], Message]  # a ``ClientApp`` is one
FAILED = 2  # Flower's error code of a client app that raised


def identify(run: int = 1, node: int = 1, task: int = 1) -> None:
    """Lets this process make messages: since Flower 1.38 ``Message`` asks who is speaking."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, node, task


@dataclass
class MemoryGrid(Grid):
    """Nodes with ids from 2 (1 is the server's), each with its configuration and a context of its own.

    ``Strategy.start(grid=...)`` and a fedlora server run on it unmodified. ``post`` sees every message that crosses
    and may replace it; None loses it. Messages cross as bytes, so server and node share no object.
    """

    app: App
    configs: Mapping[int, Mapping[str, bool | float | int | str]]  # node id -> node config
    post: Callable[[Message], Message | None] = lambda message: message
    _contexts: dict[int, Context] = field(default_factory=dict)
    _replies: dict[str, Message | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        identify()
        for node, config in self.configs.items():
            self.join(node, config)

    def join(self, node: int, config: Mapping[str, bool | float | int | str]) -> None:
        """One more node."""
        self._contexts[node] = Context(1, node, dict(config), RecordDict(), {}, series_id=1)

    def leave(self, node: int) -> None:
        """The node is gone, with what its context held."""
        del self._contexts[node]

    def set_run(self, run: Run) -> None:
        """There is one run."""

    @property
    def run(self) -> Run:
        """A run without an app bundle."""
        return Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As ``Message``'s constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there."""
        return sorted(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Delivers each message and lets its node answer."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            self._replies[ids[-1]] = self._answered(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages, each once."""
        return [reply for key in message_ids if (reply := self._replies.pop(key, None)) is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Delivers, and returns the replies that came within ``timeout`` seconds."""
        end = None if timeout is None else monotonic() + timeout
        found = []
        for key in self.push_messages(messages):
            reply = self.pull_messages([key])
            found += reply if end is None or monotonic() <= end else []
        return found

    def _answered(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        arrived = self.post(message)
        if arrived is None or node not in self._contexts:
            return None
        arrived = _carried(arrived)
        identify(node=node)
        try:
            reply = self.app(arrived, self._contexts[node])
        except Exception as error:
            reply = Message(Error(FAILED, f"{type(error).__name__}: {error}"), reply_to=arrived)
        finally:
            identify()
        sent = self.post(reply)
        return None if sent is None else _carried(sent)


def _carried(message: Message) -> Message:
    """The message as its receiver reads it."""
    from flwr.common.serde import message_from_proto, message_to_proto

    return message_from_proto(message_to_proto(message))
