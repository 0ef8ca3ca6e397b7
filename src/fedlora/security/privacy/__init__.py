"""Differential privacy: clipping, noise, and the accounting of (ε, δ).

``settings`` has the table, ``accounting`` computes ε, ``noise`` draws, ``client_level`` protects clients, ``dp_sgd``
and ``per_sample_gradients`` protect rows.
"""

from fedlora.security.privacy.noise import Stream, key_of
from fedlora.security.privacy.settings import Privacy

__all__ = ["Privacy", "Stream", "key_of"]
