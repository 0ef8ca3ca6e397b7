"""A client's side of secure aggregation: its upload leaves masked, and only the sum of all can be read.

It sends one vector: every leaf that any client sends this round, zeros where it has none, and for each leaf a one
where it has it. So the server can take each leaf's mean over the clients that trained it, and cannot tell which did.
"""

import json
from collections.abc import Mapping

from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlora.files import write
from fedlora.flower.client import Node
from fedlora.flower.wire import HOLDS, METRICS, ORDER, decode_layout, decode_order, to_vector
from fedlora.security.secure_aggregation import PHASES, Client, Message, SessionTerms, default_threshold

PHASE, SESSION, REQUEST, RESPONSE, LAYOUT = "phase", "session", "told", "said", "layout"  # names of records


def answer_phase(node: Node, content: RecordDict) -> RecordDict:
    """Answers one of the four messages of a session. The client's keys are on its disk between them, and no longer."""
    if content[ORDER]["client"] != node.client:
        raise ValueError(f"a message for client {content[ORDER]['client']} came to client {node.client}.")
    phase, reply, place = content[PHASE][PHASE], RecordDict(), node.store.secret_path(node.client)
    if phase not in PHASES:
        raise ValueError(f"there is no step {phase!r} of secure aggregation; they are {', '.join(PHASES)}.")
    request = Message(**content[REQUEST]) if REQUEST in content else None
    if phase == "advertise":
        client = Client(check_session(node, SessionTerms.of(content[SESSION]), content[ORDER]), node.client)
        response = client.advertise()
    else:
        client = Client.from_bytes(place.read_bytes())
        if phase == "unmask":
            _check_one_sum(node, client, request)
        vector = (_train(node, content, reply, client.session.threshold),) if phase == "mask" else ()
        response = getattr(client, str(phase))(request, *vector)
    write(place, client.to_bytes())  # before the message leaves: a client set back could be made to answer twice
    if phase == "unmask":
        place.unlink()
    reply[RESPONSE] = ConfigRecord(response.record())
    return reply


def check_session(node: Node, session: SessionTerms, order: Mapping[str, object]) -> SessionTerms:
    """Returns the session. ``ValueError`` where its terms are not those of this client's own configuration."""
    threshold = node.network.secure_threshold or default_threshold(len(session.numbers))
    if session.threshold < threshold or session.range != node.network.secure_range:
        raise ValueError(
            f"the session has a threshold of {session.threshold} and a range of {session.range}; this party's "
            f"configuration says {threshold} and {node.network.secure_range}."
        )
    if (session.run, session.round) != (order["run"], order["round"]):
        raise ValueError(f"the session is of round {session.round} of run {session.run!r}, not of the order's.")
    return session


def _check_one_sum(node: Node, client: Client, request: Message) -> None:
    """Refuses to unmask a second sum of one round over other clients: the difference of the two would be uploads."""
    place = node.store.secret_path(node.client).with_suffix(".sums")
    now = [client.session.round, *sorted(client.survivors(request))]
    before = json.loads(place.read_text()) if place.exists() else None
    if before is not None and before[0] == now[0] and before != now:
        raise ValueError(
            f"round {now[0]} was unmasked already, as the sum of clients {before[1:]}; another sum, of {now[1:]}, "
            "would show single uploads. Go on when the same clients are there, or begin a new run."
        )
    write(place, json.dumps(now).encode())


def _train(node: Node, content: RecordDict, reply: RecordDict, threshold: int) -> Tensor:
    """Trains, puts the metrics into the reply, and returns the vector to be masked."""
    order, leaves, base_updates = decode_order(content)
    done = node.train(order, leaves, base_updates, threshold)
    reply[METRICS], reply[HOLDS] = MetricRecord(done.metrics), ConfigRecord({HOLDS: done.holds})
    return to_vector(decode_layout(content[LAYOUT]), done.sent or {})
