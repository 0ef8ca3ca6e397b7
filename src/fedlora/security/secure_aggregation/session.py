"""The public terms of one round of secure aggregation."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from fedlora.security.secure_aggregation.fixed_point import SLACK, FixedPoint

SERVER = -1  # the server's number; clients are numbered from 0
KEY, NONCE = 32, 16  # bytes
LARGEST = 2**29  # numbers in a vector: the cipher seals less than 2^31 bytes at once


class ProtocolError(ValueError):
    """The server or a client refuses a message, a request or a value; its state does not change."""


class TooFewClientsError(ProtocolError):
    """Fewer clients than the threshold remain, so the round's sum cannot, and must not, be unmasked."""


def default_threshold(clients: int) -> int:
    """``floor(2K/3) + 1`` of ``K`` clients: the number that must answer to the end, and that can expose a client."""
    return 2 * clients // 3 + 1


@dataclass(frozen=True)
class SessionTerms:
    """One round's public terms, the same for all. Their digest is part of every key and every seal.

    ``numbers`` are the cohort's ``K >= 3`` clients, and ``weights`` their positive shares of it, which sum to one.
    ``size`` is ``d``, the count of numbers that each sends; ``threshold`` is ``t``, above ``K/2``; ``range`` is ``R``,
    the largest absolute value that a client may send. ``server_key`` is the server's X25519 key of this session, and
    ``nonce`` has 16 random bytes. ``ValueError`` if these do not fit together.
    """

    numbers: tuple[int, ...]
    weights: tuple[float, ...]
    size: int
    threshold: int
    server_key: bytes
    nonce: bytes
    run: str = ""
    round: int = 0
    range: float = 16.0

    def __post_init__(self) -> None:
        K, t, numbers = len(self.numbers), self.threshold, self.numbers
        total = math.fsum(self.weights)
        faults = [
            (K < 3, f"A cohort of {K} clients cannot be hidden in a sum; secure aggregation needs 3 or more."),
            (len(set(numbers)) < K, "A client's number is in the cohort twice; give each client a number of its own."),
            (any(not 0 <= n < 2**62 for n in numbers), "A client's number is negative or above 2^62; count from 0."),
            (not K / 2 < t <= K, f"The threshold is {t} of {K} clients; take more than half and at most all of them."),
            (
                len(self.weights) != K or not all(w > 0 for w in self.weights) or not abs(total - 1) <= SLACK,
                f"The {len(self.weights)} weights of {K} clients sum to {total}; give each a positive share of one.",
            ),
            (not 0 < self.size < LARGEST, f"A vector of {self.size} numbers was asked for; 1 to 2^29 - 1 can be sent."),
            (len(self.server_key) != KEY, f"The server's key has {len(self.server_key)} bytes; it needs {KEY}."),
            (len(self.nonce) != NONCE, f"The session's nonce has {len(self.nonce)} bytes; it needs {NONCE}."),
        ]
        for is_wrong, text in faults:
            if is_wrong:
                raise ValueError(text)
        _ = self.encoding  # refuses a range that it cannot represent

    @cached_property
    def id(self) -> bytes:
        """SHA-256 of all terms: another run, round, cohort or nonce is another session."""
        plain = {key: x.hex() if isinstance(x, bytes) else x for key, x in self.record().items()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).digest()

    @cached_property
    def encoding(self) -> FixedPoint:
        """The fixed-point encoding of this session."""
        return FixedPoint(self.range, len(self.numbers))

    def weight(self, number: int) -> float:
        """Return client ``number``'s share of the cohort."""
        return self.weights[self.numbers.index(number)]

    def record(self) -> dict[str, Any]:
        """Return the terms as numbers, text, bytes and lists of numbers, for the wire."""
        return asdict(self) | {"numbers": list(self.numbers), "weights": list(self.weights)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Build the terms of a :meth:`record`; ``ValueError`` if they do not fit together."""
        return cls(**{**record, "numbers": tuple(record["numbers"]), "weights": tuple(record["weights"])})
