"""Differential privacy: clipping, noise, and the accounting of (ε, δ).

``settings`` is the table, ``accounting`` has the figures, ``noise`` every draw, ``client_level`` the client level,
``dp_sgd`` and ``per_sample_gradients`` the example level.
"""

from fedlora.security.privacy.noise import Stream, key_of
from fedlora.security.privacy.settings import Privacy

__all__ = ["Privacy", "Stream", "key_of"]
