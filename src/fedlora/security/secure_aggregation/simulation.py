"""The whole protocol in one process, for experiments and tests."""

from collections.abc import Collection, Mapping

from torch import Tensor

from fedlora.security.secure_aggregation.client import SecureClient
from fedlora.security.secure_aggregation.messages import PHASES, Message
from fedlora.security.secure_aggregation.server import Aggregate, SecureServer
from fedlora.security.secure_aggregation.session import SessionTerms


def simulate(
    values: Mapping[int, Tensor], weights: Mapping[int, float], dropouts: Mapping[str, Collection[int]] | None = None,
    threshold: int | None = None, range: float = 16.0,
) -> Aggregate:  # fmt: skip
    """Compute the weighted mean of ``values`` (client -> ``d`` numbers of any shape) by the protocol.

    ``dropouts`` maps a phase (``advertise``, ``share``, ``mask``, ``unmask``) to the clients that send nothing from
    then on. The server and each client are saved and loaded between their steps. Raises the errors of
    :class:`SecureServer` and :class:`SecureClient`: below the threshold, for a value out of range, ...
    """
    dropouts = dropouts or {}
    if unknown := dropouts.keys() - set(PHASES):
        raise ValueError(f"There is no phase {min(unknown)!r} to drop out at; the phases are {', '.join(PHASES)}.")
    server = SecureServer.open(weights, next(iter(values.values())).numel(), threshold, range)
    states = {n: SecureClient(SessionTerms.of(server.session.record()), n).to_bytes() for n in weights}
    inbox: dict[int, Message] = {}
    for phase in PHASES:
        for n in dropouts.get(phase, ()):
            states.pop(n, None)
        for n, state in states.items():
            client = SecureClient.from_bytes(state)
            request = () if phase == PHASES[0] else (Message(**inbox[n].record()),)
            message = getattr(client, phase)(*request, *((values[n],) if phase == "mask" else ()))
            states[n] = client.to_bytes()
            server.receive(Message(**message.record()))
        inbox = server.close()
        server = SecureServer.from_bytes(server.to_bytes())
    return server.outcome()
