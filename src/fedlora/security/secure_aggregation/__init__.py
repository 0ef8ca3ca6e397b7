"""Secure aggregation: the server learns the weighted mean of a round and no client's own values.

Pairwise masks that cancel in the sum, self masks, and shares of both, so that clients may drop out at any step.
Bonawitz et al. Practical Secure Aggregation for Privacy-Preserving Machine Learning. CCS 2017.
https://doi.org/10.1145/3133956.3133982
Needs ``cryptography``, which comes with ``fedlora[flower]``. The threat model is in ``docs/secure-aggregation.md``.
"""

from fedlora.security.secure_aggregation.client import Client
from fedlora.security.secure_aggregation.messages import PHASES, Message
from fedlora.security.secure_aggregation.rehearsal import aggregate
from fedlora.security.secure_aggregation.server import Aggregate, Server
from fedlora.security.secure_aggregation.session import ProtocolError, Session, TooFewClientsError, default_threshold

__all__ = [
    "PHASES",
    "Aggregate",
    "Client",
    "Message",
    "ProtocolError",
    "Server",
    "Session",
    "TooFewClientsError",
    "aggregate",
    "default_threshold",
]
