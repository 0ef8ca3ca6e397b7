"""Client apps: they take Flower's messages to a node of this process, and its answers back.

Flower starts a process for each message of a deployment. That process passes the message on and imports no torch, so
whatever needs a model is imported in the functions that need it.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.flower.deploy.node_config import apply_node_config, read_client, state_folder
from fedlora.schema import Table

if TYPE_CHECKING:
    from fedlora.flower.client import Answer, Node, SharedBase

HELLO = "query"  # the kind of message that asks a node who it is
STALE = "it must be sent everything"
FAILED = 1001  # error codes of ours lie above Flower's
TOKEN = re.compile(r"[0-9A-Za-z-]{1,64}")  # a run's name becomes a folder's

Turns = Callable[[str, RecordDict, Context], "RecordDict | str"]


def build_client_app(turns: Turns) -> ClientApp:
    """A ``ClientApp`` that answers messages by ``turns(kind, content, context)``: records, or why there are none."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        found = turns(message.metadata.message_type, message.content, context)
        return Message(Error(FAILED, found) if isinstance(found, str) else found, reply_to=message)

    for register in (app.query(), app.train(), app.evaluate()):
        register(answer)
    return app


def handle_message(
    kind: str, content: RecordDict, node: Callable[[str], "Node"], log: str = "its own log"
) -> RecordDict | str:
    """Lets a client answer a message; ``node(run)`` is its node with its state for that run.

    An error is printed in full here, in ``log``. The server gets its kind only: the text of an error may hold what a
    row holds, so it does not leave this machine.
    """
    from fedlora.flower.client import ChangedRowsError, DroppedError, StaleError
    from fedlora.flower.wire import ORDER

    what = "it could not load its model and data"
    try:
        run = str(content[ORDER]["run"])
        if not TOKEN.fullmatch(run):
            raise ValueError(f"a run is named {run!r}; the server's version of fedlora differs from this one.")
        own = node(run)
        what = "it could not say who it is" if kind == HELLO else "its turn failed"
        return _answer(kind, content, own)
    except StaleError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return STALE
    except DroppedError as error:
        return str(error)
    except ChangedRowsError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return f"its data are not those that it began this run with; {log} says what changed"
    except Exception as error:
        traceback.print_exc()
        return f"{what} ({type(error).__name__}); {log} says why"


def prepend_client(kind: str, found: RecordDict | str, number: Callable[[], int]) -> RecordDict | str:
    """Returns the answer; an error of the first message gets the client's number, unknown to the server."""
    if kind != HELLO or not isinstance(found, str):
        return found
    try:
        return f"client {number()}: {found}"
    except ValueError as error:  # its node has no number
        return str(error)


def _answer(kind: str, content: RecordDict, node: "Node") -> RecordDict:
    from fedlora.flower import secure_client
    from fedlora.flower.wire import encode_answer

    if secure_client.PHASE in content:
        return secure_client.answer_phase(node, content)
    answer = node.hello() if kind == HELLO else _take_turn(kind, content, node)
    if node.network.secure_aggregation and any((answer.sent or {}).values()):
        raise ValueError("the server asks for an upload in the clear; this party's configuration hides uploads.")
    return encode_answer(answer.metrics, answer.holds, answer.sent)


def _take_turn(kind: str, content: RecordDict, node: "Node") -> "Answer":
    from fedlora.flower.wire import decode_order

    order, leaves, base_updates = decode_order(content)
    if order.client != node.client:
        raise ValueError(f"a message for client {order.client} came to client {node.client}.")
    turn = node.train if kind == "train" else node.evaluate
    return turn(order, leaves, base_updates)


@lru_cache(maxsize=1)
def load_base(table: str, client: int | None = None) -> "SharedBase":
    """The process's one model and data; they are loaded when the first message comes, and stay.

    ``client`` is the one whose own rows are loaded; None loads the rows of all.
    """
    from fedlora.flower.client import SharedBase
    from fedlora.runs.config import build

    federation = build(json.loads(table)).federation(client)
    for note in federation.notes if client is not None else ():  # of a client's own rows; else the run says it
        print(f"fedlora: {note}", file=sys.stderr, flush=True)
    return SharedBase(federation)


def load_node(table: Table, node_config: Mapping[str, Any], run: str) -> "Node":
    """The node of one client with its own data, for a run; model and data are loaded once a process."""
    from fedlora.flower.client import Node
    from fedlora.flower.client_store import ClientStore
    from fedlora.runs.config import build

    client = read_client(node_config)
    own = apply_node_config(table, node_config)
    store = ClientStore(state_folder(node_config) / run)
    return Node(load_base(json.dumps(own), client), client, store, build(own).flower)


def build_simulated_app(table: Table, folder: Path) -> ClientApp:
    """A client app for all clients of a federation, with their state in one folder, whichever process they run in."""
    from fedlora.flower.client import Node
    from fedlora.flower.client_store import ClientStore
    from fedlora.runs.config import build

    text, network = json.dumps(table), build(table).flower

    def turns(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
        config = context.node_config

        def node(run: str) -> Node:
            return Node(load_base(text), read_client(config), ClientStore(folder / run), network)

        return prepend_client(kind, handle_message(kind, content, node), lambda: read_client(config))

    return build_client_app(turns)
