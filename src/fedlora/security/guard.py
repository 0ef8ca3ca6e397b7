"""Validation and robust aggregation of uploads for one server's run, with the record of the clients' conduct."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules
from fedlora.schema import construct, construct_by_name
from fedlora.security.robust import ROBUST_RULES
from fedlora.security.robust._base import RobustAggregator, reweigh_uploads
from fedlora.security.validation import Rejected, UploadScreen, Validation, excluded_clients
from fedlora.types import Tree


class Guard:
    """Validation and robust aggregation of one run.

    ``validation`` has settings of the table ``[validation]``, except those of files, since there is no run folder.
    ``robust`` is the name of a robust aggregator, or its table. Raises ``ValueError`` if it does not suit the method.
    """

    def __init__(
        self, validation: Mapping[str, Any] | None, robust: str | Mapping[str, Any] | None, method: Method, seed: int
    ):
        self.limits: Validation = construct(Validation, "validation", dict(validation or {}), ("keep_files", "keep_mb"))
        self.rule: RobustAggregator | None = None
        self.method, self.seed = method, seed
        self.reset()
        if robust is not None:
            table = {"name": robust} if isinstance(robust, str) else dict(robust)
            if not isinstance(table.get("name"), str):
                raise ValueError(f"robust names no rule; give one of {', '.join(ROBUST_RULES.names())}.")
            self.rule = construct_by_name(ROBUST_RULES, "robust", table)
            self.rule.check(method, hidden=False)

    def reset(self) -> None:
        """Begin another run; the misconduct of the last run is forgotten."""
        self.quarantine: dict[int, dict[int, str]] = {}  # round (from 1) -> client -> reason
        self.conduct: dict[str, dict[str, Any]] = {}

    @property
    def exclusions(self) -> frozenset[int]:
        """The clients that were quarantined too often and take no further part."""
        return excluded_clients(self.limits, self.conduct)

    def screen(
        self, rules: Rules, shared: Tree, round: int, uploads: Mapping[int, Received],
        refused: Mapping[int, str] | None = None, remember: bool = True,
    ) -> dict[int, Received]:  # fmt: skip
        """Return the uploads that pass validation alone and in comparison, with their numbers of examples capped.

        ``quarantine`` has the others, and the clients of ``refused`` (client -> reason), whose uploads could not be
        read. With ``remember=False``, the numbers of clients mean nothing in other rounds.
        """
        screen = UploadScreen(self.limits, rules, shared, self.conduct if remember else {})
        good = screen.compare([u for x in uploads.values() if (u := screen.check(x)) is not None], lambda upload: 1)
        screen.rejected |= {client: Rejected(reason, {}) for client, reason in (refused or {}).items()}
        screen.record_conduct()
        if screen.rejected:
            reasons = {client: bad.reason for client, bad in sorted(screen.rejected.items())}
            self.quarantine.setdefault(round + 1, {}).update(reasons)
        return {upload.turn.client: upload for upload in good}

    def apply_rule(
        self, rules: Rules, shared: Tree, round: int, uploads: Sequence[Received]
    ) -> tuple[list[Received], list[int] | None]:
        """Return the uploads that the robust aggregator keeps, with its weights, and their clients.

        Without an aggregator, these are all uploads, and None.
        """
        kept, judged = reweigh_uploads(self.rule, self.method, rules, shared, uploads, round, self.seed)
        return kept, None if self.rule is None else judged["kept"]
