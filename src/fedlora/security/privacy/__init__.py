"""Differential privacy: clipping, noise, and the (ε, δ) that they amount to.

``settings``: the ``[privacy]`` table. ``accounting``: ε of composed noise. ``noise``: all random draws.
``client_level``: clipped and noised uploads. ``per_sample_gradients`` and ``dp_sgd``: clipped and noised gradients.
"""

from fedlora.security.privacy.noise import Stream, key_of
from fedlora.security.privacy.settings import Privacy

__all__ = ["Privacy", "Stream", "key_of"]
