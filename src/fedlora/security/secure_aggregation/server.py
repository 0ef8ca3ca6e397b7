"""The server of secure aggregation: relays keys and shares, adds up masked vectors, and unmasks only the sum.

Bonawitz et al. 2017, figure 4, rounds 0 to 2 and 4.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
from torch import Tensor

from fedlora.security.secure_aggregation import masks, messages, session
from fedlora.security.secure_aggregation.fixed_point import Ring
from fedlora.security.secure_aggregation.keys import SEAL, Address, KeyPair, party_name, seal, unseal
from fedlora.security.secure_aggregation.messages import PHASES, REPLIES, Message
from fedlora.security.secure_aggregation.session import KEY, SERVER, ProtocolError, SessionTerms, TooFewClientsError
from fedlora.security.secure_aggregation.shamir import SHARE, combine

TABLES = ("keys", "commitments", "received")


class Aggregate(NamedTuple):
    """The result of a session."""

    mean: Tensor  # float32 (d,): the weighted mean of the clients that sent their vectors
    weight: float  # the sum of their shares of the cohort
    numbers: tuple[int, ...]  # their numbers
    bound: float  # of the error of each number of the mean


@dataclass
class SecureServer:
    """One session's server: :meth:`receive` a phase's messages, :meth:`close` it, and after four :meth:`outcome`.

    A refused message (:class:`ProtocolError`) does not change the server; its sender counts as dropped out.
    """

    session: SessionTerms
    key: KeyPair
    phase: str = PHASES[0]  # of the messages that it receives now, or "done"
    keys: dict[int, bytes] = field(default_factory=dict)  # client that advertised -> both public keys
    commitments: dict[int, bytes] = field(default_factory=dict)  # client that shared -> commitment to its seed
    summed: list[int] = field(default_factory=list)  # clients that sent their vectors
    received: dict[int, bytes] = field(default_factory=dict, repr=False)  # of this phase, without vectors
    total: Ring = field(default_factory=lambda: np.zeros(0, np.uint32), repr=False)

    @classmethod
    def open(
        cls, weights: Mapping[int, float], size: int, threshold: int | None = None, range: float = 16.0,
        run: str = "", round: int = 0,
    ) -> Self:  # fmt: skip
        """Open a session for the clients of ``weights`` (number -> share of the cohort), of ``size`` numbers each.

        The default threshold is ``floor(2K/3) + 1``. ``ValueError`` if the terms do not fit together.
        """
        key, t = KeyPair.new(), session.default_threshold(len(weights)) if threshold is None else threshold
        shares = tuple(map(float, weights.values()))
        terms = SessionTerms(tuple(weights), shares, size, t, key.public, os.urandom(16), run, round, float(range))
        return cls(terms, key)

    def receive(self, message: Message) -> None:
        """Receive one client's message of the open phase.

        Refuses a message of another phase or session, of a client that is not, or no longer, in the round, a second one
        of the same client, and one that was altered.
        """
        n, sender = message.sender, party_name(message.sender).capitalize()
        self._check(message, sender)
        payload = self._open(message)
        match self.phase:
            case "advertise":
                self._check_length(sender, payload, 2 * KEY)
                known = {keys[i : i + KEY] for keys in self.received.values() for i in (0, KEY)}
                if known & {payload[:KEY], payload[KEY:]} or payload[:KEY] == payload[KEY:]:
                    raise ProtocolError(f"{sender} sent a public key that is there already; it was left out.")
            case "share":
                self._check_shares(n, messages.unpack_table(payload[KEY:], 2 * SHARE + SEAL), self.keys.keys() - {n})
            case "mask":
                self._check_length(sender, payload, 4 * self.session.size)
                vector = np.frombuffer(payload, "<u4")
                self.total = self.total + vector if self.summed else vector.astype(np.uint32)
                self.summed.append(n)
                return
            case "unmask":
                self._check_shares(n, messages.unpack_table(payload, SHARE), self.commitments.keys())
        self.received[n] = payload

    def close(self) -> dict[int, Message]:
        """Close the phase; return the message to each remaining client, and none after the last phase.

        :class:`TooFewClientsError` if fewer clients than the threshold remain; the session is then over.
        """
        if self.phase == "done":
            raise ProtocolError("All four phases are closed already; outcome() has the result.")
        senders = self._senders()
        if len(senders) < self.session.threshold:
            raise TooFewClientsError(
                f"{len(senders)} of {len(self.session.numbers)} clients sent their {self.phase!r} message; the session "
                f"needs {self.session.threshold} of them to the end. Run the round again."
            )
        payloads = self._payloads(senders)
        after = (*PHASES, "done")[PHASES.index(self.phase) + 1]
        replies = {}
        for n, payload in payloads.items():
            address = Address(self.session.id, REPLIES[after], SERVER, n)
            replies[n] = Message(address.phase, SERVER, n, seal(payload, self.key, self.keys[n][:KEY], address))
        self.phase, self.received = after, {}
        return replies

    def outcome(self) -> Aggregate:
        """Return the weighted mean of the vectors; :class:`ProtocolError` before the last phase is closed."""
        if self.phase != "done":
            raise ProtocolError(f"The sum is still masked: the phase {self.phase!r} is open. Close all four first.")
        numbers, fixed = tuple(sorted(self.summed)), self.session.encoding
        weight = math.fsum(self.session.weight(n) for n in numbers)
        return Aggregate(fixed.decode(self.total, weight), weight, numbers, fixed.error_bound(weight))

    def to_bytes(self) -> bytes:
        """Save the state, with the session's private key: for the server's own store."""
        tables = {name: list(getattr(self, name).items()) for name in TABLES}
        plain = {"session": self.session.record(), "phase": self.phase, "summed": self.summed}
        rest = self.total.astype("<u4", copy=False).tobytes()
        return messages.save_state("server", plain | tables | {"key": self.key.private}, rest)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Load a server that :meth:`to_bytes` saved; ``ValueError`` if ``data`` is no saved server."""
        fields, rest = messages.load_state("server", data)
        tables = {name: dict(map(tuple, fields[name])) for name in TABLES}
        terms = {"session": SessionTerms.of(fields["session"]), "key": KeyPair(fields["key"])}
        return cls(**fields | tables | terms, total=np.frombuffer(rest, "<u4").astype(np.uint32))

    def _senders(self) -> list[int]:
        return sorted(self.summed if self.phase == "mask" else self.received)

    def _check(self, message: Message, sender: str) -> None:
        if (message.phase, message.receiver) != (self.phase, SERVER):
            raise ProtocolError(
                f"{sender} sent {party_name(message.receiver)} a {message.phase!r} message; the server is at "
                f"{self.phase!r}. It was left out."
            )
        remaining = {"share": self.keys, "mask": self.commitments, "unmask": self.summed}
        if message.sender not in remaining.get(self.phase, self.session.numbers):
            raise ProtocolError(f"{sender} is not, or no longer, part of this round; its message was left out.")
        if message.sender in self._senders():
            raise ProtocolError(f"{sender} sent its {self.phase!r} message already; the second was left out.")

    def _open(self, message: Message) -> bytes:
        n, body, start = message.sender, message.body, b""
        if self.phase == "advertise":  # its key precedes the sealed body and is part of the sealed address
            start, body = body[:KEY], body[KEY:]
        public = start or self.keys.get(n, b"")[:KEY]
        return start + unseal(body, self.key, public, Address(self.session.id, self.phase, n, SERVER))

    def _check_length(self, sender: str, payload: bytes, needed: int) -> None:
        if len(payload) != needed:
            raise ProtocolError(f"{sender} sent {len(payload)} bytes; {needed} were due. They were left out.")

    def _check_shares(self, n: int, table: list[tuple[int, bytes]], needed: object) -> None:
        if messages.as_mapping(table, f"message of client {n}").keys() != needed:
            raise ProtocolError(f"Client {n} did not send a share for each client that is due one; left out.")

    def _payloads(self, senders: list[int]) -> dict[int, bytes]:
        """Return the reply to each client at the end of the phase; after the last phase, unmask the sum instead."""
        match self.phase:
            case "advertise":
                self.keys = {n: self.received[n] for n in senders}
                return dict.fromkeys(senders, messages.pack_table(self.keys))
            case "share":
                self.commitments = {n: self.received[n][:KEY] for n in senders}
                tables = {n: dict(messages.unpack_table(self.received[n][KEY:], 2 * SHARE + SEAL)) for n in senders}
                return {n: messages.pack_table({v: tables[v][n] for v in senders if v != n}) for n in senders}
            case "mask":
                flags = {n: b"\1" if n in self.summed else b"\0" for n in self.commitments}
                return dict.fromkeys(senders, messages.pack_table(flags))
        self._unmask(senders[: self.session.threshold])
        return {}

    def _unmask(self, answering: list[int]) -> None:
        answers = {n: dict(messages.unpack_table(self.received[n], SHARE)) for n in answering}
        secrets = {v: combine({n: a[v] for n, a in answers.items()}, len(answering)) for v in self.commitments}
        for v, secret in secrets.items():
            self._check_secret(v, secret)
        added = [masks.own(self.session.id, v, secrets[v]) for v in self.summed]
        for v in self.commitments.keys() - set(self.summed):
            key = KeyPair(secrets[v])  # the others added masks for this client, which sent no vector
            added += masks.opposite(masks.pairwise(self.session.id, v, key, n, self.keys[n][KEY:]) for n in self.summed)
        self.total = self.total.copy()
        masks.add(self.total, masks.opposite(added))

    def _check_secret(self, v: int, secret: bytes) -> None:
        if v in self.summed:
            name, fits = "self mask", masks.commitment(self.session.id, v, secret) == self.commitments[v]
        else:
            name, fits = "key", KeyPair(secret).public == self.keys[v][KEY:]
        if not fits:
            raise ProtocolError(
                f"The shares of client {v}'s {name} give a wrong secret: a client sent a wrong share. The sum stays "
                "masked; run the round again."
            )
