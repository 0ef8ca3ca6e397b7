"""Local training: every client for itself; the line that a federation has to beat.

No paper: what each client reaches with its own data alone.

Use it when always, beside every other method: a federation that does not beat it is not worth its messages.
Not when parties have too few rows to learn the task alone.
"""

from dataclasses import dataclass

from fedlora.methods._base import Method
from fedlora.types import Layer, Turn, Work


@dataclass(frozen=True)
class Local(Method):
    """Nothing is sent, so everything that was trained is kept."""

    title = "Local"
    any_rank = True
    personal = True
    shares_head = False

    def receive(self, shared: Layer, kept: Layer, turn: Turn) -> Layer:
        return {**self.adapter.leading(shared, turn.rank), **kept}

    def send(self, work: Work, turn: Turn) -> Layer:
        return {}
