"""The server of secure aggregation: relays keys and shares, adds up masked vectors, and unmasks only the sum.

Bonawitz et al. 2017, figure 4, rounds 0 to 2 and 4.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
from torch import Tensor

from fedlora.security.secure_aggregation import masks
from fedlora.security.secure_aggregation.fixed_point import Ring
from fedlora.security.secure_aggregation.keys import SEAL, Address, KeyPair, party_name, seal, unseal
from fedlora.security.secure_aggregation.messages import (
    PHASES,
    REPLIES,
    Message,
    as_list,
    as_mapping,
    load_state,
    pack_table,
    save_state,
    unpack_table,
)
from fedlora.security.secure_aggregation.session import (
    KEY,
    SERVER,
    ProtocolError,
    SessionTerms,
    TooFewClientsError,
    default_threshold,
)
from fedlora.security.secure_aggregation.shamir import SHARE, combine


class Aggregate(NamedTuple):
    """The result of a session."""

    mean: Tensor  # float32 (d,): the weighted mean of the clients that sent their vectors
    weight: float  # the sum of their shares of the cohort
    numbers: tuple[int, ...]  # their numbers
    bound: float  # of the error of each number of the mean


@dataclass
class Server:
    """One session's server: :meth:`receive` a phase's messages, :meth:`close` it, and after four :meth:`outcome`.

    A refused message (:class:`ProtocolError`) does not change the server; its sender counts as dropped out.
    """

    session: SessionTerms
    key: KeyPair
    phase: str = PHASES[0]  # of the messages that it receives now, or "done"
    keys: dict[int, bytes] = field(default_factory=dict)  # client that advertised -> both public keys
    commitments: dict[int, bytes] = field(default_factory=dict)  # client that shared -> commitment to its seed
    summed: list[int] = field(default_factory=list)  # clients that sent their vectors
    received: dict[int, bytes] = field(
        default_factory=dict, repr=False
    )  # in this phase; vectors are added up immediately
    total: Ring = field(default_factory=lambda: np.zeros(0, np.uint32), repr=False)

    @classmethod
    def open(
        cls,
        weights: Mapping[int, float],
        size: int,
        threshold: int | None = None,
        range: float = 16.0,
        run: str = "",
        round: int = 0,
    ) -> Self:
        """Opens a session for the clients of ``weights`` (number -> share of the cohort), of ``size`` numbers each.

        The default threshold is ``floor(2K/3) + 1``. ``ValueError`` if the terms do not fit together.
        """
        key, t = KeyPair.new(), default_threshold(len(weights)) if threshold is None else threshold
        shares = tuple(map(float, weights.values()))
        terms = SessionTerms(tuple(weights), shares, size, t, key.public, os.urandom(16), run, round, float(range))
        return cls(terms, key)

    def receive(self, message: Message) -> None:
        """Takes one client's message of the open phase.

        Refuses a message of another phase or session, of a client that is not, or no longer, in the round, a second one
        of the same client, and one that was altered.
        """
        self._check(message)
        payload = self._open(message)
        self._take(message.sender, payload)

    def close(self) -> dict[int, Message]:
        """Closes the phase; returns the message to each remaining client, and none after the last phase.

        :class:`TooFewClientsError` if fewer clients than the threshold remain; the session is then over.
        """
        if self.phase == "done":
            raise ProtocolError("All four phases are closed already; outcome() tells what they came to.")
        there = self._there()
        if len(there) < self.session.threshold:
            raise TooFewClientsError(
                f"{len(there)} of {len(self.session.numbers)} clients sent their {self.phase!r} message; the session "
                f"needs {self.session.threshold} of them to the end. Run the round again."
            )
        after = (*PHASES, "done")[PHASES.index(self.phase) + 1]
        replies = dict(self._replies(there))
        self.phase, self.received = after, {}
        return replies

    def outcome(self) -> Aggregate:
        """The weighted mean of the vectors; :class:`ProtocolError` before the last phase is closed."""
        if self.phase != "done":
            raise ProtocolError(f"The sum is still masked: the phase {self.phase!r} is open. Close all four first.")
        numbers, fixed = tuple(sorted(self.summed)), self.session.fixed
        weight = math.fsum(self.session.weight(n) for n in numbers)
        return Aggregate(fixed.decode(self.total, weight), weight, numbers, fixed.error_bound(weight))

    def to_bytes(self) -> bytes:
        """The state for :meth:`from_bytes`, with the session's private key: for the server's own store."""
        tables = {name: as_list(getattr(self, name)) for name in ("keys", "commitments", "received")}
        plain = {"session": self.session.record(), "phase": self.phase, "summed": self.summed}
        rest = self.total.astype("<u4", copy=False).tobytes()
        return save_state("server", plain | tables | {"key": self.key.private}, rest)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Loads a server that :meth:`to_bytes` saved; ``ValueError`` if ``data`` is no saved server."""
        fields, rest = load_state("server", data)
        tables = {name: dict(map(tuple, fields[name])) for name in ("keys", "commitments", "received")}
        revived = {"session": SessionTerms.of(fields["session"]), "key": KeyPair(fields["key"])}
        return cls(**fields | tables | revived, total=np.frombuffer(rest, "<u4").astype(np.uint32))

    def _awaited(self) -> set[int]:
        so_far = {"share": self.keys, "mask": self.commitments, "unmask": self.summed}
        return set(so_far.get(self.phase, self.session.numbers))

    def _there(self) -> list[int]:
        return sorted(self.summed if self.phase == "mask" else self.received)

    def _check(self, message: Message) -> None:
        who = party_name(message.sender)
        if (message.phase, message.receiver) != (self.phase, SERVER):
            raise ProtocolError(
                f"{who.capitalize()} sent {party_name(message.receiver)} a {message.phase!r} message; the server is at "
                f"{self.phase!r}. It was left out."
            )
        if message.sender not in self._awaited():
            raise ProtocolError(
                f"{who.capitalize()} is not, or no longer, part of this round; its message was left out."
            )
        if message.sender in self._there():
            raise ProtocolError(f"{who.capitalize()} sent its {self.phase!r} message already; the second was left out.")

    def _open(self, message: Message) -> bytes:
        n, body, start = message.sender, message.body, b""
        if self.phase == "advertise":  # its key precedes the sealed body and is part of the sealed address
            start, body = body[:KEY], body[KEY:]
        public = start or self.keys.get(n, b"")[:KEY]
        address = Address(self.session.id, self.phase, n, SERVER)
        return start + unseal(body, self.key, public, address)

    def _take(self, n: int, payload: bytes) -> None:
        match self.phase:
            case "advertise":
                self._length(n, payload, 2 * KEY)
                self._own_keys(n, payload)
            case "share":
                self._covers(n, unpack_table(payload[KEY:], 2 * SHARE + SEAL), self.keys.keys() - {n})
            case "mask":
                self._length(n, payload, 4 * self.session.size)
                self._add(n, payload)
                return
            case "unmask":
                self._covers(n, unpack_table(payload, SHARE), self.commitments.keys())
        self.received[n] = payload

    def _add(self, n: int, payload: bytes) -> None:
        vector = np.frombuffer(payload, "<u4")
        self.total = self.total + vector if self.summed else vector.astype(np.uint32)
        self.summed.append(n)

    def _length(self, n: int, payload: bytes, needed: int) -> None:
        if len(payload) != needed:
            raise ProtocolError(
                f"{party_name(n).capitalize()} sent {len(payload)} bytes; {needed} were due. They were left out."
            )

    def _own_keys(self, n: int, payload: bytes) -> None:
        taken = {keys[i : i + KEY] for keys in self.received.values() for i in (0, KEY)}
        if taken & {payload[:KEY], payload[KEY:]} or payload[:KEY] == payload[KEY:]:
            raise ProtocolError(
                f"{party_name(n).capitalize()} sent a public key that is there already; it was left out."
            )

    def _covers(self, n: int, table: list[tuple[int, bytes]], needed: object) -> None:
        if as_mapping(table, f"message of client {n}").keys() != needed:
            raise ProtocolError(
                f"{party_name(n).capitalize()} did not send a share for each client that is due one; left out."
            )

    def _replies(self, there: list[int]) -> Iterator[tuple[int, Message]]:
        match self.phase:
            case "advertise":
                self.keys = {n: self.received[n] for n in there}
                payloads = dict.fromkeys(there, pack_table(self.keys))
            case "share":
                self.commitments = {n: self.received[n][:KEY] for n in there}
                payloads = self._inboxes(there)
            case "mask":
                flags = {n: b"\1" if n in self.summed else b"\0" for n in self.commitments}
                payloads = dict.fromkeys(there, pack_table(flags))
            case _:
                self._unmask(there[: self.session.threshold])
                payloads = {}
        return ((n, self._seal(n, payload)) for n, payload in payloads.items())

    def _seal(self, n: int, payload: bytes) -> Message:
        phase = REPLIES[PHASES[PHASES.index(self.phase) + 1]]
        body = seal(payload, self.key, self.keys[n][:KEY], Address(self.session.id, phase, SERVER, n))
        return Message(phase, SERVER, n, body)

    def _inboxes(self, there: list[int]) -> dict[int, bytes]:
        tables = {n: dict(unpack_table(self.received[n][KEY:], 2 * SHARE + SEAL)) for n in there}
        return {n: pack_table({v: tables[v][n] for v in there if v != n}) for n in there}

    def _unmask(self, answering: list[int]) -> None:
        answers = {n: dict(unpack_table(self.received[n], SHARE)) for n in answering}
        secret = {v: combine({n: a[v] for n, a in answers.items()}, len(answering)) for v in self.commitments}
        for v in self.commitments:
            self._check_secret(v, secret[v])
        found = [masks.own(self.session.id, v, secret[v]) for v in self.summed]
        for v in self.commitments.keys() - set(self.summed):
            found += self._leftover(v, KeyPair(secret[v]))
        self.total = self.total.copy()
        masks.add(self.total, masks.opposite(found))

    def _leftover(self, dropped: int, key: KeyPair) -> Iterator[masks.Mask]:
        """The masks that the others added for a client that sent no vector."""
        pairwise = (masks.pairwise(self.session.id, dropped, key, n, self.keys[n][KEY:]) for n in self.summed)
        return masks.opposite(pairwise)

    def _check_secret(self, v: int, secret: bytes) -> None:
        kept = v in self.summed
        fits = (
            masks.commitment(self.session.id, v, secret) == self.commitments[v]
            if kept
            else (KeyPair(secret).public == self.keys[v][KEY:])
        )
        if not fits:
            raise ProtocolError(
                f"The shares of client {v}'s {'self mask' if kept else 'key'} give a wrong secret: a client sent a "
                "wrong share. The sum stays masked; run the round again."
            )
