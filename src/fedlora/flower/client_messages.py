"""The client app: Flower's messages in, Flower's messages out, and a node in between."""

import re
import sys
import traceback
from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

HELLO = "query"  # the kind of message that asks a node who it is
STALE = "it must be sent everything"
FAILED = 1001  # error codes of ours lie above Flower's
TOKEN = re.compile(r"[0-9A-Za-z-]{1,64}")  # a run's name becomes a folder's

Turns = Callable[[str, RecordDict, Context], "RecordDict | str"]


def client_app(turns: Turns) -> ClientApp:
    """A ``ClientApp`` whose every message is answered by ``turns(kind, content, context)``: records, or why not."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        found = turns(message.metadata.message_type, message.content, context)
        return Message(Error(FAILED, found) if isinstance(found, str) else found, reply_to=message)

    for register in (app.query(), app.train(), app.evaluate()):
        register(answer)
    return app


def handled(kind: str, content: RecordDict, node: Callable, log: str = "its own log") -> RecordDict | str:
    """What a party answers; ``node(run)`` is the party with its state for that run.

    What goes wrong is told in full here, in ``log``, and by its kind only to the server: the text of an error may hold
    what a row holds, so it does not leave this machine.
    """
    from fedlora.flower.client import ChangedRowsError, DroppedError, StaleError
    from fedlora.flower.wire import ORDER

    what = "it could not load its model and data"
    try:
        run = str(content[ORDER]["run"])
        if not TOKEN.fullmatch(run):
            raise ValueError(f"a run is named {run!r}; the server's version of fedlora differs from this one.")
        party = node(run)
        what = "it could not say who it is" if kind == HELLO else "its turn failed"
        return _answered(kind, content, party)
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


def _answered(kind: str, content: RecordDict, node) -> RecordDict:
    from fedlora.flower import secure_client as hidden
    from fedlora.flower.wire import answered

    if hidden.PHASE in content:
        return hidden.answer(node, content)
    answer = _answer(kind, content, node)
    if node.network.secure_aggregation and any((answer.sent or {}).values()):
        raise ValueError("the server asks for an upload in the clear; this party's configuration hides uploads.")
    return answered(answer.metrics, answer.holds, answer.sent)


def _answer(kind: str, content: RecordDict, node):
    from fedlora.flower.wire import order_of

    if kind == HELLO:
        return node.hello()
    order, leaves, folds = order_of(content)
    if order.client != node.client:
        raise ValueError(f"a message for client {order.client} came to client {node.client}.")
    turn = node.train if kind == "train" else node.evaluate
    return turn(order, leaves, folds)
