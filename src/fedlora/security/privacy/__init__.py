"""Differential privacy: what is clipped, where noise is added, and what that comes to as (ε, δ).

``settings`` is the table, ``refusals`` what has no sound analysis, ``accounting`` the figures, ``noise`` every draw,
``uploads`` the client level, ``each`` and ``dpsgd`` the example level.
"""

from fedlora.security.privacy.noise import Stream, key_of
from fedlora.security.privacy.settings import Privacy

__all__ = ["Privacy", "Stream", "key_of"]
