"""The client of secure aggregation: it sends four messages, each once.

Bonawitz et al. 2017, figure 4, rounds 0 to 2 and 4 (round 3, the consistency check, is for active servers only).
"""

import os
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor

from fedlora.security.secure_aggregation import masks, messages
from fedlora.security.secure_aggregation.keys import SEAL, Address, KeyPair, party_name, seal, unseal
from fedlora.security.secure_aggregation.messages import PHASES, REPLIES, Message
from fedlora.security.secure_aggregation.session import KEY, SERVER, ProtocolError, SessionTerms, TooFewClientsError
from fedlora.security.secure_aggregation.shamir import SHARE, split


@dataclass
class SecureClient:
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
        message = self._send("advertise", self.masking.public)
        return Message(message.phase, message.sender, message.receiver, self.sealing.public + message.body)

    def share(self, peers: Message) -> Message:
        """Phase 2: for each of ``peers``, shares of the self mask's seed and of the masking key, sealed for that peer.

        Refuses a list below the threshold, with unknown clients, with a key twice, or with this client's keys altered.
        """
        table = messages.as_mapping(messages.unpack_table(self._open(peers, "share"), 2 * KEY), "list of peers")
        self._check_peers(table)
        seeds, keys = (split(s, list(table), self.session.threshold) for s in (self.seed, self.masking.private))
        self.peers, self.held = table, {self.number: seeds[self.number] + keys[self.number]}
        sealed = {
            n: seal(seeds[n] + keys[n], self.sealing, table[n][:KEY], self._address("shares", self.number, n))
            for n in table
            if n != self.number
        }
        commitment = masks.commitment(self.session.id, self.number, self.seed)
        return self._send("share", commitment + messages.pack_table(sealed))

    def mask(self, inbox: Message, values: Tensor) -> Message:
        """Phase 3: ``values`` (``size`` numbers of any shape) times this client's weight, in fixed point, masked.

        Refuses an inbox below the threshold or with a share that does not open, and values of another count, outside
        the session's range or not finite.
        """
        id, payload = self.session.id, self._open(inbox, "mask")
        table = messages.as_mapping(messages.unpack_table(payload, 2 * SHARE + SEAL), "inbox")
        if strangers := table.keys() - (self.peers.keys() - {self.number}):
            raise ProtocolError(f"The inbox holds shares of {party_name(min(strangers))}, which is no peer; refused.")
        self._check_count(len(table) + 1, "shared")
        opened = {
            n: unseal(sealed, self.sealing, self.peers[n][:KEY], self._address("shares", n, self.number))
            for n, sealed in table.items()
        }
        if values.numel() != self.session.size:
            raise ProtocolError(f"{values.numel()} values were given; this session sums {self.session.size} a client.")
        vector = self.session.encoding.encode(values, self.session.weight(self.number))
        pairwise = [masks.pairwise(id, self.number, self.masking, n, self.peers[n][KEY:]) for n in table]
        masks.add(vector, [masks.own(id, self.number, self.seed), *pairwise])
        self.held |= opened
        return self._send("mask", vector.astype("<u4", copy=False).data.cast("B"))

    def unmask(self, survivors: Message) -> Message:
        """Phase 4: the share of the seed of each client that sent its vector, and of the key of each that did not.

        Refuses to give both of one client, shares of clients that did not share with it, and to unmask fewer than
        the threshold or a sum that it is not part of. Forgets its secrets: it answers once.
        """
        request = self._parse_request(survivors)
        answer = {n: self.held[n][:SHARE] if sent else self.held[n][SHARE:] for n, sent in request.items()}
        message = self._send("unmask", messages.pack_table(answer))
        self.seed, self.held = b"", {}
        self.sealing = self.masking = KeyPair(b"")
        return message

    def survivors(self, survivors: Message) -> frozenset[int]:
        """Return the clients with a vector in the sum that the request would unmask; send no answer."""
        return frozenset(n for n, sent in self._parse_request(survivors).items() if sent)

    def to_bytes(self) -> bytes:
        """Save the state, with private keys: for this client's own store, never for the wire."""
        keys = {"sealing": self.sealing.private, "masking": self.masking.private, "seed": self.seed}
        tables = {"peers": list(self.peers.items()), "held": list(self.held.items())}
        plain = {"session": self.session.record(), "number": self.number, "phase": self.phase}
        return messages.save_state("client", plain | keys | tables)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Load a client that :meth:`to_bytes` saved; ``ValueError`` if ``data`` is no saved client."""
        fields, _ = messages.load_state("client", data)
        keys = {key: KeyPair(fields[key]) for key in ("sealing", "masking")}
        tables = {key: dict(map(tuple, fields[key])) for key in ("peers", "held")}
        return cls(**fields | keys | tables | {"session": SessionTerms.of(fields["session"])})

    def _expect(self, phase: str) -> None:
        if self.phase != phase:
            raise ProtocolError(
                f"Client {self.number} was asked to {phase!r}, but {self.phase!r} is its next step; each step is taken "
                "once and in order. Start a new session to begin again."
            )

    def _address(self, phase: str, sender: int, receiver: int) -> Address:
        return Address(self.session.id, phase, sender, receiver)

    def _open(self, message: Message, phase: str) -> bytes:
        self._expect(phase)
        address = self._address(REPLIES[phase], SERVER, self.number)
        if (message.phase, message.sender, message.receiver) != (address.phase, SERVER, self.number):
            raise ProtocolError(
                f"Client {self.number} was given the {message.phase!r} message from {party_name(message.sender)} to "
                f"{party_name(message.receiver)}; it waits for the server's {address.phase!r} message to itself."
            )
        return unseal(message.body, self.sealing, self.session.server_key, address)

    def _send(self, phase: str, payload: bytes | memoryview) -> Message:
        """Seal a message for the server, and set the next phase."""
        address = self._address(phase, self.number, SERVER)
        body = seal(payload, self.sealing, self.session.server_key, address)
        self.phase = (*PHASES, "done")[PHASES.index(phase) + 1]
        return Message(phase, self.number, SERVER, body)

    def _check_count(self, clients: int, what: str) -> None:
        if clients < self.session.threshold:
            raise TooFewClientsError(
                f"Client {self.number} was given {clients} clients that {what}, itself among them; it takes part with "
                f"{self.session.threshold} or more only. Run the round again."
            )

    def _check_peers(self, table: dict[int, bytes]) -> None:
        self._check_count(len(table), "advertised keys")
        if strangers := table.keys() - set(self.session.numbers):
            raise ProtocolError(
                f"The list of peers holds {party_name(min(strangers))}, which is not of the cohort; refused."
            )
        if table.get(self.number) != self.sealing.public + self.masking.public:
            raise ProtocolError(f"The list of peers holds other keys for client {self.number} than it made; refused.")
        if len({entry[i : i + KEY] for entry in table.values() for i in (0, KEY)}) < 2 * len(table):
            raise ProtocolError("The list of peers holds one public key twice; each client needs its own. Refused.")

    def _parse_request(self, survivors: Message) -> dict[int, bool]:
        """Return client -> whether it sent its vector."""
        request = messages.unpack_table(self._open(survivors, "unmask"), 1)
        sent = {n for n, flag in request if flag == b"\1"}
        if both := sent & {n for n, flag in request if flag != b"\1"}:
            raise ProtocolError(
                f"The server asks for the self mask and for the key of {party_name(min(both))}; together they would "
                "reveal its vector. The request was refused."
            )
        if strangers := {n for n, _ in request} - self.held.keys():
            raise ProtocolError(
                f"The server asks for shares of {party_name(min(strangers))}, which shared none here; refused."
            )
        if self.number not in sent:
            raise ProtocolError(f"Client {self.number} sent its vector, but is not among the survivors; refused.")
        self._check_count(len(sent), "sent their vectors")
        return {n: n in sent for n, _ in request}
