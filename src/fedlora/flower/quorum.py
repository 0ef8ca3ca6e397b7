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

    A client that is not connected may still connect. A node that is left out must be repaired first, and so must a
    connected client that failed when it was last asked.
    """

    registry: NodeRegistry
    number: int  # of the round, from 0
    seconds: float  # time to repair clients
    watch: Watch
    reasons: Mapping[int, str]  # client -> why it failed in this round
    failed: set[int] = field(default_factory=set)  # clients that failed when they were last asked
    since: float | None = None  # time since which too few clients can take part

    def check(self, least: int, able: AbstractSet[int], answered: AbstractSet[int] = frozenset()) -> None:
        """Report if fewer than ``least`` of the ``able`` clients can take part.

        Raises ``TooFewError`` after ``seconds`` of this.
        """
        self.failed -= answered
        here = self.registry.connected_clients() & able
        ready = answered | (here - self.failed)
        possible = len(ready) + max(0, len(able - here - ready) - len(self.registry.left_out()))
        if possible >= least:
            self.since = None
            return
        why = f"{possible} of {len(able)} clients can take part, and it needs {least}"
        if self.since is None:
            self.since = time.monotonic()
            text = f"{why}; the run ends if this lasts for {self.seconds:g} seconds (flower.repair_timeout)"
            self.watch(Event("waiting", self.number, text=text))
        elif time.monotonic() - self.since > self.seconds:
            failed = sorted(self.failed & self.registry.connected_clients())
            left = [f"node {node} ({reason})" for node, reason in self.registry.left_out().items()]
            left += [f"client {client} ({self.reasons.get(client, 'its upload was refused')})" for client in failed]
            raise TooFewError(
                f"round {self.number + 1} cannot be finished: {why}; left out: {', '.join(left) or 'nobody'}. The "
                "rounds before it are kept; mend this, and start the run again in the same folder."
            )
