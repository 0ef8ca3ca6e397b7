"""Client apps: they pass Flower's messages to a node of this process, and return its answers.

Imports that need a model are inside functions: in a deployment, the process of one message does not import torch.
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
from fedlora.flower.requirements import RefusedTermsError
from fedlora.schema import Table

if TYPE_CHECKING:
    from fedlora.flower.client import Node, SharedBase
    from fedlora.flower.trainer_client import TrainerClient

HELLO = "query"  # the type of the message that asks a node for its client
STALE = "it must be sent everything"
FAILED = 1001  # our error code; Flower's are smaller
TOKEN = re.compile(r"[0-9A-Za-z-]{1,64}")  # a run's token, which becomes the name of a folder


def build_client_app(turns: Callable[[str, RecordDict, Context], RecordDict | str]) -> ClientApp:
    """Return a ``ClientApp`` that answers messages by ``turns(kind, content, context)``: a record, or an error text.

    An error text for the first message gets the client's number, which the server does not know yet.
    """
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        outcome = turns(kind, message.content, context)
        if kind == HELLO and isinstance(outcome, str):
            try:
                outcome = f"client {read_client(context.node_config)}: {outcome}"
            except ValueError as error:  # the node has no number
                outcome = str(error)
        return Message(Error(FAILED, outcome) if isinstance(outcome, str) else outcome, reply_to=message)

    for register in (app.query(), app.train(), app.evaluate()):
        register(answer)
    return app


def handle_message(
    kind: str,
    content: RecordDict,
    load: Callable[[str], "Node"],
    log: str = "its own log",
    describe: Callable[[], RecordDict] | None = None,
) -> RecordDict | str:
    """Let a client answer a message; ``load(run)`` returns its node with its state for that run.

    ``describe()`` answers the questions before a run of clients with their own trainers.

    An error is printed in full here, in ``log``. Only its type is sent to the server: the text may hold the content of
    a row, so it stays on this machine.
    """
    from fedlora.flower.client import ChangedRowsError, DroppedError, StaleError
    from fedlora.flower.wire import ORDER, QUERY

    failure = "it could not load its model and data"
    try:
        run = str(content[ORDER]["run"])
        if not TOKEN.fullmatch(run):
            raise ValueError(f"a run is named {run!r}; the server's version of fedlora differs from this one.")
        if kind == HELLO and QUERY in content:
            if describe is None:
                raise RefusedTermsError(
                    "this client's app has a configuration and no trainer; make it by client_app(trainer)"
                )
            return describe()
        node = load(run)
        failure = "it could not say who it is" if kind == HELLO else "its turn failed"
        return _answer(kind, content, node)
    except DroppedError as error:
        return str(error)
    except RefusedTermsError as error:
        print(f"fedlora: {error}", file=sys.stderr, flush=True)
        return str(error)
    except (StaleError, ChangedRowsError) as error:
        print(f"fedlora: {error}", file=sys.stderr)
        if isinstance(error, StaleError):
            return STALE
        return f"its data are not those that it began this run with; {log} says what changed"
    except Exception as error:
        traceback.print_exc()
        return f"{failure} ({type(error).__name__}); {log} says why"


def _answer(kind: str, content: RecordDict, node: "Node") -> RecordDict:
    from fedlora.flower import secure_client
    from fedlora.flower.wire import ORDER, decode_order, encode_answer

    if kind == HELLO and secure_client.PHASE not in content:
        answer = node.hello()
    elif content[ORDER]["client"] != node.client:
        raise ValueError(f"a message for client {content[ORDER]['client']} came to client {node.client}.")
    elif secure_client.PHASE in content:
        return secure_client.answer_phase(node, content)
    else:
        answer = (node.train if kind == "train" else node.evaluate)(*decode_order(content))
    if node.network.secure_aggregation and any((answer.sent or {}).values()):
        raise ValueError("the server asks for an upload in the clear; this client's configuration hides uploads.")
    return encode_answer(answer.metrics, answer.holds, answer.sent)


@lru_cache(maxsize=1)
def load_base(table: str, client: int | None = None) -> "SharedBase":
    """Return the model and the data of this process. They are loaded for the first message, and stay in memory.

    ``client`` is the client whose own rows are loaded; None loads the rows of all clients.
    """
    from fedlora.flower.client import SharedBase
    from fedlora.runs.config import build

    federation = build(json.loads(table)).federation(client)
    for note in federation.notes if client is not None else ():  # notes on all rows are printed by the run
        print(f"fedlora: {note}", file=sys.stderr, flush=True)
    return SharedBase(federation)


def load_node(table: Table, node_config: Mapping[str, Any], run: str) -> "Node":
    """Return the node of one client with its own data, for a run."""
    from fedlora.flower.client import Node
    from fedlora.flower.client_store import ClientStore
    from fedlora.runs.config import build

    client = read_client(node_config)
    own_table = apply_node_config(table, node_config)
    store = ClientStore(state_folder(node_config) / run)
    return Node(load_base(json.dumps(own_table), client), client, store, build(own_table).flower)


def handle_trainer_message(
    client: Callable[[], "TrainerClient"], kind: str, content: RecordDict, node_config: Mapping[str, Any],
    folder: Path | None = None, log: str = "its own log",
) -> RecordDict | str:  # fmt: skip
    """Let a client with its own trainer answer a message; ``folder`` has its state, if its node does not say where."""

    def place() -> tuple[int, Path, Mapping[str, Any]]:
        return read_client(node_config), folder or state_folder(node_config), node_config

    def load(run: str) -> "Node":
        return client().load(run, content, *place())

    return handle_message(kind, content, load, log, lambda: client().describe(content, *place()))


def build_trainers_app(own: "TrainerClient", folder: Path) -> ClientApp:
    """Return a client app for all clients of a simulation with trainers of their own."""
    return build_client_app(
        lambda kind, content, context: handle_trainer_message(lambda: own, kind, content, context.node_config, folder)
    )


def build_simulated_app(table: Table, folder: Path) -> ClientApp:
    """Return a client app for all clients of a federation. Their states are in one folder, shared by all processes."""
    from fedlora.flower.client import Node
    from fedlora.flower.client_store import ClientStore
    from fedlora.runs.config import build

    text, network = json.dumps(table), build(table).flower

    def turns(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
        def load(run: str) -> Node:
            return Node(load_base(text), read_client(context.node_config), ClientStore(folder / run), network)

        return handle_message(kind, content, load)

    return build_client_app(turns)
