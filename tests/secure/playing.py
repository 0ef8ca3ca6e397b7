"""A round of secure aggregation that a test can stop at any step and look into."""

import torch

from fedlora.security.secure_aggregation import PHASES, Client, Message, Server, Session


class Round:
    """All parties of one session; ``step`` plays one phase, ``sent`` and ``told`` keep its messages."""

    def __init__(self, K=4, size=8, threshold=None, weights=None, values=None, **terms):
        weights = weights or dict.fromkeys(range(K), 1 / K)
        self.server = Server.open(weights, size, threshold, **terms)
        self.clients = {n: Client(Session.of(self.server.session.record()), n) for n in weights}
        self.values = values or {n: torch.full((size,), n / 10) for n in weights}
        self.sent, self.told = {}, {}

    @property
    def id(self):
        return self.server.session.id

    def make(self, n, told=None):
        """Client ``n``'s next message, made but not delivered."""
        client = self.clients[n]
        phase = client.phase
        given = [] if phase == "advertise" else [told or self.told[phase][n]]
        message = getattr(client, phase)(*given, *([self.values[n]] if phase == "masked" else []))
        self.sent.setdefault(phase, {})[n] = message
        return message

    def send(self, silent=(), late=()):
        """The open phase's messages; the ``silent`` are gone, the ``late`` make theirs and keep it back."""
        for n in list(self.clients):
            if n in silent or (self.server.phase in self.told and n not in self.told[self.server.phase]):
                del self.clients[n]
                continue
            message = self.make(n)
            if n not in late:
                self.server.receive(Message(**message.record()))

    def step(self, silent=(), late=()):
        self.send(silent, late)
        replies = self.server.close()
        if self.server.phase != "done":
            self.told[self.server.phase] = replies
        return self

    def until(self, phase):
        """Every phase before ``phase``."""
        for _ in range(PHASES.index(phase)):
            self.step()
        return self
