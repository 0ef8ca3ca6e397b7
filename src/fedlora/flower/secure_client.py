"""A party's side of secure aggregation: its upload leaves masked, and only the sum of all can be read.

What it sends is one vector: every leaf that anybody sends this round, zeros where it has none, and for each leaf a one
where it has it. So the server can take each leaf's mean over those who trained it, and cannot tell who that was.
"""

import json
from collections.abc import Mapping

from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlora.files import write
from fedlora.flower.client import Node
from fedlora.flower.layout import Layout, vector
from fedlora.flower.wire import HOLDS, METRICS, ORDER, order_of
from fedlora.security.secure_aggregation import PHASES, Client, Message, Session, default_threshold

PHASE, SESSION, TOLD, SAID, LAYOUT = "phase", "session", "told", "said", "layout"


def answer(node: Node, content: RecordDict) -> RecordDict:
    """One of the four messages of a session. The party's keys lie on its disk between them, and no longer."""
    if content[ORDER]["client"] != node.client:
        raise ValueError(f"a message for client {content[ORDER]['client']} came to client {node.client}.")
    phase, found, place = content[PHASE][PHASE], RecordDict(), node.store.secret(node.client)
    if phase not in PHASES:
        raise ValueError(f"there is no step {phase!r} of secure aggregation; they are {', '.join(PHASES)}.")
    told = Message(**content[TOLD]) if TOLD in content else None
    if phase == "advertise":
        client = Client(agreed(node, Session.of(content[SESSION]), content[ORDER]), node.client)
        said = client.advertise()
    else:
        client = Client.from_bytes(place.read_bytes())
        if phase == "unmask":
            _only_sum(node, client, told)
        given = (_turn(node, content, found, client.session.threshold),) if phase == "mask" else ()
        said = getattr(client, str(phase))(told, *given)
    write(place, client.to_bytes())  # before the message leaves: a client set back could be made to answer twice
    if phase == "unmask":
        place.unlink()
    found[SAID] = ConfigRecord(said.record())
    return found


def agreed(node: Node, session: Session, order: Mapping[str, object]) -> Session:
    """The session, if its terms are those of this party's own configuration; ``ValueError`` where they are not."""
    threshold = node.network.secure_threshold or default_threshold(len(session.numbers))
    if session.threshold < threshold or session.range != node.network.secure_range:
        raise ValueError(
            f"the session has a threshold of {session.threshold} and a range of {session.range}; this party's "
            f"configuration says {threshold} and {node.network.secure_range}."
        )
    if (session.run, session.round) != (order["run"], order["round"]):
        raise ValueError(f"the session is of round {session.round} of run {session.run!r}, not of the order's.")
    return session


def _only_sum(node: Node, client: Client, told: Message) -> None:
    """Refuses to unmask a second sum of one round over other clients: the difference of the two would be uploads."""
    place = node.store.secret(node.client).with_suffix(".sums")
    now = [client.session.round, *sorted(client.survivors(told))]
    before = json.loads(place.read_text()) if place.exists() else None
    if before is not None and before[0] == now[0] and before != now:
        raise ValueError(
            f"round {now[0]} was unmasked already, as the sum of clients {before[1:]}; another sum, of {now[1:]}, "
            "would show single uploads. Go on when the same clients are there, or begin a new run."
        )
    write(place, json.dumps(now).encode())


def _turn(node: Node, content: RecordDict, found: RecordDict, threshold: int) -> Tensor:
    """Trains, notes the figures, and returns the vector to be masked."""
    order, leaves, folds = order_of(content)
    done = node.train(order, leaves, folds, threshold)
    found[METRICS], found[HOLDS] = MetricRecord(done.metrics), ConfigRecord({HOLDS: done.holds})
    names, ranks = content[LAYOUT]["names"], content[LAYOUT]["ranks"]
    sizes = iter(content[LAYOUT]["sizes"])
    return vector({name: tuple(next(sizes) for _ in range(rank)) for name, rank in zip(names, ranks)}, done.sent or {})


def layout_record(layout: Layout) -> ConfigRecord:
    """The layout as lists."""
    shapes = list(layout.values())
    sizes = [size for shape in shapes for size in shape]
    return ConfigRecord({"names": list(layout), "ranks": [len(shape) for shape in shapes], "sizes": sizes})
