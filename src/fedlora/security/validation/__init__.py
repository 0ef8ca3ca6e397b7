"""What an upload must be before it can touch the aggregate, and what becomes of one that is not.

``forms`` (outside): the leaves of this client's turn, their shapes, plain numbers. ``sizes``: how large a change it is,
and how far its factors have moved. ``gate``: one round's uploads judged by both, and the record of who failed.
``shelf``: where the files of bad uploads are kept.
"""

from fedlora.security.validation.expected import RefusedError
from fedlora.security.validation.screen import Bad, Gate, barred
from fedlora.security.validation.settings import Hygiene

__all__ = ["Bad", "Gate", "Hygiene", "RefusedError", "barred"]
