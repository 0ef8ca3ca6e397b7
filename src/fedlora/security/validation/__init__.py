"""Validation of uploads before they can reach the aggregate, and quarantine of those that fail.

``expected``: the leaves of a client's turn, their shapes and types. ``update_norms``: the size of an update and the
movement of its factors. ``screen``: checks one round's uploads by both, and writes the rejected ones to disk.
"""

from fedlora.security.validation.expected import RefusedError
from fedlora.security.validation.screen import Rejected, UploadScreen, excluded_clients
from fedlora.security.validation.settings import Validation

__all__ = ["RefusedError", "Rejected", "UploadScreen", "Validation", "excluded_clients"]
