"""The client app: Flower's messages in, Flower's messages out, and a node in between."""

import sys
import traceback
from collections.abc import Callable

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedlora.engines.flower.node import Answer, Node, StaleError
from fedlora.engines.flower.records import ORDER, answered, order_of

STALE = "it must be sent everything"
FAILED = 1001  # error codes of ours lie above Flower's


def client_app(node: Callable[[Context, str], Node]) -> ClientApp:
    """A ``ClientApp`` whose node is ``node(context, run)``: the party, with its state for that run."""
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        return handled(message, lambda run: node(context, run))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return handled(message, lambda run: node(context, run))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return handled(message, lambda run: node(context, run))

    return app


def handled(message: Message, node: Callable[[str], Node]) -> Message:
    """The party's reply. What goes wrong is told in full here, and by its kind only to the server.

    A message of an error may hold what a row holds, so it does not leave this machine.
    """
    try:
        answer = _answer(message, node(str(message.content[ORDER]["run"])))
    except StaleError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return Message(Error(FAILED, STALE), reply_to=message)
    except Exception as error:
        traceback.print_exc()
        return Message(
            Error(FAILED, f"its turn failed ({type(error).__name__}); its own log says more"), reply_to=message
        )
    return Message(answered(answer.metrics, answer.holds, answer.sent), reply_to=message)


def _answer(message: Message, node: Node) -> Answer:
    if message.metadata.message_type == "query":
        return node.hello()
    order, leaves, folds = order_of(message.content)
    if order.client != node.client:
        raise ValueError(f"a message for client {order.client} came to client {node.client}.")
    turn = node.train if message.metadata.message_type == "train" else node.evaluate
    return turn(order, leaves, folds)
