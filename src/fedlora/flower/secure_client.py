"""The client's side of secure aggregation: it sends its upload masked, and only the sum of all uploads can be read.

The upload is one vector. It has the values of every leaf that any client may send in this round (zeros where this
client has none), and for each leaf a 1 if this client has it. So the server can compute each leaf's mean over the
clients that trained it, without learning which clients did.
"""

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedlora.files import write
from fedlora.flower.client import Node
from fedlora.flower.wire import ORDER, decode_layout, decode_order, encode_answer, to_vector
from fedlora.security.secure_aggregation import PHASES, Message, SecureClient, SessionTerms, default_threshold

PHASE, SESSION, REQUEST, RESPONSE, LAYOUT = "phase", "session", "request", "response", "layout"  # names of records


def answer_phase(node: Node, content: RecordDict) -> RecordDict:
    """Answer one of the four messages of a session. Between them, the client's keys are on its disk."""
    phase, reply, secret = content[PHASE][PHASE], RecordDict(), node.store.path(node.client, "secret")
    if phase not in PHASES:
        raise ValueError(f"there is no step {phase!r} of secure aggregation; they are {', '.join(PHASES)}.")
    if phase == "advertise":
        client = SecureClient(check_session(node, SessionTerms.of(content[SESSION]), content[ORDER]), node.client)
        response = client.advertise()
    else:
        client = SecureClient.from_bytes(secret.read_bytes())
        request: list[Any] = [Message(**content[REQUEST])]
        if phase == "mask":
            answer = node.train(*decode_order(content), client.session.threshold)
            reply = encode_answer(answer.metrics, answer.holds)
            request.append(to_vector(decode_layout(content[LAYOUT]), answer.sent or {}))
        elif phase == "unmask":
            _check_single_sum(node, client, *request)
        response = getattr(client, str(phase))(*request)
    write(secret, client.to_bytes())  # before the message is sent: an older state would allow a second answer
    if phase == "unmask":
        secret.unlink()
    reply[RESPONSE] = ConfigRecord(response.record())
    return reply


def check_session(node: Node, session: SessionTerms, order: Mapping[str, object]) -> SessionTerms:
    """Return the session. Raises ``ValueError`` if it violates the client's own configuration."""
    threshold = node.network.secure_threshold or default_threshold(len(session.numbers))
    if session.threshold < threshold or session.range != node.network.secure_range:
        raise ValueError(
            f"the session has a threshold of {session.threshold} and a range of {session.range}; this client's "
            f"configuration requires {threshold} and {node.network.secure_range}."
        )
    if (session.run, session.round) != (order["run"], order["round"]):
        raise ValueError(f"the session is of round {session.round} of run {session.run!r}, not of the order's.")
    return session


def _check_single_sum(node: Node, client: SecureClient, request: Message) -> None:
    """Refuse to unmask a second sum of one round over other clients: their difference would reveal uploads."""
    path = node.store.path(node.client, "sums")
    now = [client.session.round, *sorted(client.survivors(request))]
    before = json.loads(path.read_text()) if path.exists() else None
    if before is not None and before[0] == now[0] and before != now:
        raise ValueError(
            f"round {now[0]} was unmasked already, as the sum of clients {before[1:]}; another sum, of {now[1:]}, "
            "would show single uploads. Go on when the same clients are there, or begin a new run."
        )
    write(path, json.dumps(now).encode())
