"""The client of secure aggregation: it sends four messages, each once.

Bonawitz et al. 2017, figure 4, rounds 0 to 2 and 4 (round 3, the consistency check, is for active servers only).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor

from fedlora.security.secure_aggregation import masks
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
from fedlora.security.secure_aggregation.session import KEY, SERVER, ProtocolError, SessionTerms, TooFewClientsError
from fedlora.security.secure_aggregation.shamir import SHARE, split


@dataclass
class Client:
    """Client ``number`` in one session: :meth:`advertise`, :meth:`share`, :meth:`mask`, :meth:`unmask`, in order.

    A refusal (:class:`ProtocolError`) does not change the client. Save :meth:`to_bytes` **before** a message is sent: a
    client that is set back could be made to answer twice.
    """

    session: SessionTerms
    number: int
    sealing: KeyPair = field(default_factory=KeyPair.new)  # Bonawitz's c: for messages
    masking: KeyPair = field(default_factory=KeyPair.new)  # s: for pairwise masks; the server may learn it
    seed: bytes = field(default_factory=lambda: os.urandom(32), repr=False)  # b: of the self mask
    phase: str = PHASES[0]  # of its next message, or "done"
    peers: dict[int, bytes] = field(default_factory=dict)  # client that advertised -> both public keys
    held: dict[int, bytes] = field(default_factory=dict, repr=False)  # client that shared -> shares of its seed and key

    def __post_init__(self) -> None:
        if self.number not in self.session.numbers:
            raise ValueError(f"Client {self.number} is not in this session's cohort; start it with a number that is.")

    def advertise(self) -> Message:
        """Phase 1: two public keys. The one for messages precedes the sealed body, which is sealed with it."""
        self._expect("advertise")
        message = self._seal("advertise", self.masking.public)
        self.phase = "share"
        return Message(message.phase, message.sender, message.receiver, self.sealing.public + message.body)

    def share(self, peers: Message) -> Message:
        """Phase 2: for each of ``peers``, shares of the self mask's seed and of the masking key, sealed for that peer.

        Refuses a list below the threshold, with unknown clients, with a key twice, or with this client's keys altered.
        """
        table = as_mapping(unpack_table(self._open(peers, "share"), 2 * KEY), "list of peers")
        self._check_peers(table)
        seeds, keys = (split(s, list(table), self.session.threshold) for s in (self.seed, self.masking.private))
        self.peers, self.held = table, {self.number: seeds[self.number] + keys[self.number]}
        sealed = {n: self._for_peer(n, seeds[n] + keys[n]) for n in table if n != self.number}
        commitment = masks.commitment(self.session.id, self.number, self.seed)
        return self._send("share", commitment + pack_table(sealed))

    def mask(self, inbox: Message, values: Tensor) -> Message:
        """Phase 3: ``values`` (``size`` numbers of any shape) times this client's weight, in fixed point, masked.

        Refuses an inbox below the threshold or with a share that does not open, and values of another count, outside
        the session's range or not finite.
        """
        table = as_mapping(unpack_table(self._open(inbox, "mask"), 2 * SHARE + SEAL), "inbox")
        self._check_inbox(table)
        opened = {n: self._from_peer(n, sealed) for n, sealed in table.items()}
        if values.numel() != self.session.size:
            raise ProtocolError(f"{values.numel()} values were given; this session sums {self.session.size} a client.")
        vector = self.session.fixed.encode(values, self.session.weight(self.number))
        masks.add(vector, [self._own_mask(), *(self._pairwise(n) for n in table)])
        self.held |= opened
        return self._send("mask", vector.astype("<u4", copy=False).data.cast("B"))

    def unmask(self, survivors: Message) -> Message:
        """Phase 4: the share of the seed of each client that sent its vector, and of the key of each that did not.

        Refuses to give both of one client, shares of clients that did not share with it, and to unmask fewer than
        the threshold or a sum that it is not part of. Forgets its secrets: it answers once.
        """
        wanted = self._wanted(unpack_table(self._open(survivors, "unmask"), 1))
        answer = {n: self.held[n][:SHARE] if kept else self.held[n][SHARE:] for n, kept in wanted.items()}
        message = self._send("unmask", pack_table(answer))
        self.seed, self.held = b"", {}
        self.sealing = self.masking = KeyPair(b"")
        return message

    def survivors(self, survivors: Message) -> frozenset[int]:
        """The clients with a vector in the sum that the request would unmask; sends no answer."""
        request = unpack_table(self._open(survivors, "unmask"), 1)
        return frozenset(n for n, kept in self._wanted(request).items() if kept)

    def to_bytes(self) -> bytes:
        """The state for :meth:`from_bytes`, with private keys: for this client's own store, never for the wire."""
        keys = {"sealing": self.sealing.private, "masking": self.masking.private, "seed": self.seed}
        tables = {"peers": as_list(self.peers), "held": as_list(self.held)}
        plain = {"session": self.session.record(), "number": self.number, "phase": self.phase}
        return save_state("client", plain | keys | tables)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Loads a client that :meth:`to_bytes` saved; ``ValueError`` if ``data`` is no saved client."""
        fields, _ = load_state("client", data)
        revived = {key: KeyPair(fields[key]) for key in ("sealing", "masking")}
        tables = {key: dict(map(tuple, fields[key])) for key in ("peers", "held")}
        return cls(**fields | revived | tables | {"session": SessionTerms.of(fields["session"])})

    def _expect(self, phase: str) -> None:
        if self.phase != phase:
            raise ProtocolError(
                f"Client {self.number} was asked to {phase!r}, but {self.phase!r} is its next step; each step is taken "
                "once and in order. Start a new session to begin again."
            )

    def _open(self, message: Message, phase: str) -> bytes:
        self._expect(phase)
        address = Address(self.session.id, REPLIES[phase], SERVER, self.number)
        if (message.phase, message.sender, message.receiver) != (address.phase, SERVER, self.number):
            raise ProtocolError(
                f"Client {self.number} was given the {message.phase!r} message from {party_name(message.sender)} to "
                f"{party_name(message.receiver)}; it waits for the server's {address.phase!r} message to itself."
            )
        return unseal(message.body, self.sealing, self.session.server_key, address)

    def _seal(self, phase: str, payload: bytes | memoryview) -> Message:
        address = Address(self.session.id, phase, self.number, SERVER)
        return Message(phase, self.number, SERVER, seal(payload, self.sealing, self.session.server_key, address))

    def _send(self, phase: str, payload: bytes | memoryview) -> Message:
        message = self._seal(phase, payload)
        self.phase = (*PHASES, "done")[PHASES.index(phase) + 1]
        return message

    def _for_peer(self, n: int, shares: bytes) -> bytes:
        return seal(shares, self.sealing, self.peers[n][:KEY], Address(self.session.id, "shares", self.number, n))

    def _from_peer(self, n: int, sealed: bytes) -> bytes:
        return unseal(sealed, self.sealing, self.peers[n][:KEY], Address(self.session.id, "shares", n, self.number))

    def _own_mask(self) -> masks.Mask:
        return masks.own(self.session.id, self.number, self.seed)

    def _pairwise(self, n: int) -> masks.Mask:
        return masks.pairwise(self.session.id, self.number, self.masking, n, self.peers[n][KEY:])

    def _enough(self, there: int, what: str) -> None:
        if there < self.session.threshold:
            raise TooFewClientsError(
                f"Client {self.number} was given {there} clients that {what}, itself among them; it takes part with "
                f"{self.session.threshold} or more only. Run the round again."
            )

    def _check_peers(self, table: Mapping[int, bytes]) -> None:
        self._enough(len(table), "advertised keys")
        strangers = table.keys() - set(self.session.numbers)
        if strangers:
            raise ProtocolError(
                f"The list of peers holds {party_name(min(strangers))}, who is not of the cohort; refused."
            )
        if table.get(self.number) != self.sealing.public + self.masking.public:
            raise ProtocolError(f"The list of peers holds other keys for client {self.number} than it made; refused.")
        keys = {entry[i : i + KEY] for entry in table.values() for i in (0, KEY)}
        if len(keys) < 2 * len(table):
            raise ProtocolError(
                "The list of peers holds one public key twice; each client has its own. It was refused."
            )

    def _check_inbox(self, table: Mapping[int, bytes]) -> None:
        strangers = table.keys() - (self.peers.keys() - {self.number})
        if strangers:
            raise ProtocolError(
                f"The inbox holds shares of {party_name(min(strangers))}, who is no peer here; refused."
            )
        self._enough(len(table) + 1, "shared")

    def _wanted(self, request: list[tuple[int, bytes]]) -> dict[int, bool]:
        kept = {n for n, flag in request if flag == b"\1"}
        both = kept & {n for n, flag in request if flag != b"\1"}
        if both:
            raise ProtocolError(
                f"The server asks for the self mask and for the key of {party_name(min(both))}; together they would "
                "bare its vector. The request was refused."
            )
        strangers = {n for n, _ in request} - self.held.keys()
        if strangers:
            raise ProtocolError(
                f"The server asks for shares of {party_name(min(strangers))}, who shared none here; refused."
            )
        if self.number not in kept:
            raise ProtocolError(f"Client {self.number} sent its vector, but is not among the survivors; refused.")
        self._enough(len(kept), "sent their vectors")
        return {n: n in kept for n, _ in request}
