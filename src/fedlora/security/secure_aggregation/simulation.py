"""The whole protocol in one process, for experiments and tests."""

from collections.abc import Collection, Mapping

from torch import Tensor

from fedlora.security.secure_aggregation.client import Client
from fedlora.security.secure_aggregation.messages import PHASES, Message
from fedlora.security.secure_aggregation.server import Aggregate, Server
from fedlora.security.secure_aggregation.session import SessionTerms

Dropouts = Mapping[str, Collection[int]]  # phase -> clients that send nothing from then on


def simulate(
    values: Mapping[int, Tensor],
    weights: Mapping[int, float],
    dropouts: Dropouts | None = None,
    threshold: int | None = None,
    range: float = 16.0,
) -> Aggregate:
    """Computes the weighted mean of ``values`` (client -> ``d`` numbers of any shape) by the protocol.

    ``dropouts`` maps a phase (``advertise``, ``share``, ``mask``, ``unmask``) to the clients that send nothing from
    then on. Every party is saved and loaded between its steps. Raises the errors of :class:`Server` and
    :class:`Client`: below the threshold, for a value out of range, ...
    """
    unknown = (dropouts or {}).keys() - set(PHASES)
    if unknown:
        raise ValueError(f"There is no phase {min(unknown)!r} to drop out at; the phases are {', '.join(PHASES)}.")
    server = Server.open(weights, next(iter(values.values())).numel(), threshold, range)
    states = {n: Client(SessionTerms.of(server.session.record()), n).to_bytes() for n in weights}
    inbox: dict[int, Message] = {}
    for phase in PHASES:
        for n in (dropouts or {}).get(phase, ()):
            states.pop(n, None)
        _send(phase, server, states, inbox, values)
        inbox = server.close()
        server = Server.from_bytes(server.to_bytes())
    return server.outcome()


def _send(
    phase: str, server: Server, states: dict[int, bytes], inbox: Mapping[int, Message], values: Mapping[int, Tensor]
) -> None:
    for n, state in states.items():
        client = Client.from_bytes(state)
        given = (values[n],) if phase == "mask" else ()
        received = () if phase == PHASES[0] else (Message(**inbox[n].record()),)
        message = getattr(client, phase)(*received, *given)
        states[n] = client.to_bytes()
        server.receive(Message(**message.record()))
