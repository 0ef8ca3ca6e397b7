"""What the strategy asks of good replies beside each other: fedlora's hygiene, and a robust rule where one is named."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from typing import Any

from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules
from fedlora.schema import construct, construct_named
from fedlora.security.robust import ROBUST_RULES
from fedlora.security.robust._base import RobustAggregator, reweigh_uploads
from fedlora.security.validation import UploadScreen, Validation, excluded_clients
from fedlora.seeds import derived
from fedlora.types import Tree, Turn

LOG = getLogger("flwr")


def limits(table: Mapping[str, Any] | None) -> Validation:
    """The settings of ``[hygiene]``; those of files do not apply, since a strategy has no folder."""
    found: Validation = construct(Validation, "hygiene", dict(table or {}), ("keep_files", "keep_mb"))
    return found


def rule(robust: str | Mapping[str, Any] | None, method: Method) -> RobustAggregator | None:
    """A robust rule by its name, or by a table with ``name`` and its settings. ``ValueError`` where it cannot work."""
    if robust is None:
        return None
    table = {"name": robust} if isinstance(robust, str) else dict(robust)
    if not isinstance(table.get("name"), str):
        raise ValueError(f"robust names no rule; give one of {', '.join(ROBUST_RULES.names())}.")
    found: RobustAggregator = construct_named(ROBUST_RULES, "robust", table)
    found.check(method, hidden=False)
    return found


@dataclass
class Guard:
    """Of one run of a strategy."""

    limits: Validation
    rule: RobustAggregator | None
    method: Method
    seed: int
    quarantined: dict[int, dict[int, str]] = field(default_factory=dict)  # round (from 1) -> node -> why
    conduct: dict[str, dict[str, Any]] = field(default_factory=dict)

    def begin(self) -> None:
        """Another run: who misbehaved in the one before begins anew."""
        self.quarantined, self.conduct = {}, {}

    def allowed(self, nodes: Collection[int], round: int) -> list[int]:
        """The nodes that may take part in a round (from 0); the log names the others."""
        out = excluded_clients(self.limits, self.conduct)
        for node in sorted(out & set(nodes)):
            times = self.conduct["strikes"][str(node)]
            LOG.warning("round %s: node %s is left out: it was quarantined in %s rounds.", round + 1, node, times)
        return [node for node in nodes if node not in out]

    def passed(self, rules: Rules, shared: Tree, round: int, uploads: Mapping[int, Received]) -> dict[int, Received]:
        """The uploads that are neither broken nor absurd beside the others, their claims capped; the log names why."""
        screen = UploadScreen(self.limits, rules, shared, self.conduct)
        seeded = (u._replace(turn=self._turn(u, node)) for node, u in uploads.items())
        arrived = [found for upload in seeded if (found := screen.check(upload)) is not None]
        good = screen.compare(arrived, lambda upload: 1)
        screen.record_conduct()
        for node, bad in sorted(screen.rejected.items()):
            self.quarantined.setdefault(round + 1, {})[node] = bad.reason
            LOG.warning("round %s: node %s is left out, its upload is quarantined: %s.", round + 1, node, bad.reason)
        return {upload.turn.client: upload for upload in good}

    def counted(self, rules: Rules, shared: Tree, round: int, uploads: Sequence[Received]) -> list[Received]:
        """What the robust rule lets count, with its weights; all of them where there is no rule."""
        found, said = reweigh_uploads(self.rule, self.method, rules, shared, uploads, round, self.seed)
        if self.rule is not None:
            LOG.info("round %s: the robust rule kept the nodes %s", round + 1, said["kept"])
        return found

    def _turn(self, upload: Received, node: int) -> Turn:
        """The turn as the node's order had it: where a method starts afresh, the seed says from what."""
        turn = upload.turn
        return replace(turn, seed=derived(self.seed, "turn", turn.round, node))
