"""Ends a run if too few clients can take part in a round."""

import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from fedlora.engines.loop import Event, Watch
from fedlora.flower.node_registry import NodeRegistry


class TooFewError(ValueError):
    """Fewer clients than a round needs can take part, and none was repaired in time."""


@dataclass
class Quorum:
    """Checks in one round whether enough clients can still take part.

    A client that is not connected can still come. A node that is left out, and a connected client that failed when it
    was last asked, must be repaired first.
    """

    registry: NodeRegistry
    number: int  # of the round, from 0
    seconds: float  # that clients have to be repaired
    watch: Watch
    reasons: Mapping[int, str]  # client -> why it failed, as the round notes it
    failed: set[int] = field(default_factory=set)  # clients that failed when they were last asked
    since: float | None = None  # since when too few can take part

    def check(self, least: int, able: AbstractSet[int], answered: AbstractSet[int] = frozenset()) -> None:
        """``TooFewError`` where fewer than ``least`` of the clients that are ``able`` can take part, for too long."""
        self.failed -= answered
        here = self.registry.connected_clients() & able
        ready = answered | (here - self.failed)
        possible = len(ready) + max(0, len(able - here - ready) - len(self.registry.left_out()))
        if possible >= least:
            self.since = None
        else:
            self._wait_or_raise(f"{possible} of {len(able)} clients can take part, and it needs {least}")

    def _wait_or_raise(self, why: str) -> None:
        """Reports that the round cannot be finished; raises ``TooFewError`` after ``seconds`` of this."""
        if self.since is None:
            self.since = time.monotonic()
            text = f"{why}; the run ends if this lasts for {self.seconds:g} seconds (flower.repair_timeout)"
            self.watch(Event("waiting", self.number, text=text))
        elif time.monotonic() - self.since > self.seconds:
            failed = sorted(self.failed & self.registry.connected_clients())
            left = [f"node {node} ({said})" for node, said in self.registry.left_out().items()]
            left += [f"client {client} ({self.reasons.get(client, 'its upload was refused')})" for client in failed]
            raise TooFewError(
                f"round {self.number + 1} cannot be finished: {why}; left out: {', '.join(left) or 'nobody'}. The "
                "rounds before it are kept; mend this, and start the run again in the same folder."
            )
