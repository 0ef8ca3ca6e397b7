"""Secure aggregation: the server learns the weighted mean of a round, and no single client's values.

Pairwise masks cancel in the sum. Self masks and secret shares of both masks let clients drop out at any step.
Bonawitz et al. Practical Secure Aggregation for Privacy-Preserving Machine Learning. CCS 2017.
https://doi.org/10.1145/3133956.3133982
Needs ``cryptography``, a dependency of ``fedlora[flower]``. ``docs/secure-aggregation.md`` has the threat model.
"""

from fedlora.security.secure_aggregation.client import SecureClient
from fedlora.security.secure_aggregation.messages import PHASES, Message
from fedlora.security.secure_aggregation.server import Aggregate, SecureServer
from fedlora.security.secure_aggregation.session import (
    ProtocolError,
    SessionTerms,
    TooFewClientsError,
    default_threshold,
)  # fmt: skip
from fedlora.security.secure_aggregation.simulation import simulate

__all__ = [
    "PHASES",
    "Aggregate",
    "Message",
    "ProtocolError",
    "SecureClient",
    "SecureServer",
    "SessionTerms",
    "TooFewClientsError",
    "default_threshold",
    "simulate",
]  # fmt: skip  # fmt: skip
