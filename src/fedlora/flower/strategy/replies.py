"""Checks of a round's replies, one by one and beside each other. A reply that fails is left out by name.

Beside each other, uploads pass fedlora's validation and, where one is named, a robust rule.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from math import isfinite
from typing import Any

from flwr.app import Array, Message, MetricRecord, RecordDict
from torch import Tensor

from fedlora.flower.replies import MALFORMED, describe_error
from fedlora.flower.strategy.instructions import select_sent
from fedlora.flower.strategy.peft_state import MARK, PeftState, parse_keys, read_mark, read_tensor
from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules
from fedlora.schema import construct, construct_by_name
from fedlora.security.robust import ROBUST_RULES
from fedlora.security.robust._base import RobustAggregator, reweigh_uploads
from fedlora.security.validation import UploadScreen, Validation, excluded_clients
from fedlora.seeds import derive_seed
from fedlora.types import Tree, Turn

LOG = getLogger("flwr")


@dataclass(frozen=True)
class ReplyChecks:
    """The checks of one round's replies by themselves."""

    rules: Rules
    shared: PeftState
    round: int  # from 0
    asked: frozenset[int]  # nodes
    weight: str  # the metric that holds a reply's number of examples
    any_rank: bool
    needs_mark: bool  # must `send` have made the reply?
    base_updates: int  # the number of base updates that the nodes were sent

    def select_good(self, replies: Sequence[Message]) -> dict[int, tuple[Received, RecordDict]]:
        """The good replies by node; each other one is named in the log with what is wrong."""
        good: dict[int, tuple[Received, RecordDict]] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if node in good:
                    raise ValueError("it has replied already")
                good[node] = self._read(node, reply), reply.content
            except MALFORMED as error:
                LOG.warning(
                    "round %s: node %s is left out: %s.", self.round + 1, node, describe_error(error, (ValueError,))
                )
        return self._one_rank(good)

    def _read(self, node: int, reply: Message) -> Received:
        check_error(reply)
        if node not in self.asked:
            raise ValueError("it was not asked")
        records = list(reply.content.array_records.values())
        if len(records) != 1:
            raise ValueError(f"it sent {len(records)} records of arrays where 1 is needed")
        examples = read_weight(reply.content, self.weight)
        arrays = dict(records[0])
        self._check_mark(arrays.pop(MARK, None))
        tree = self._tree(arrays)
        ranks = [layer["A"].shape[0] for part, layer in tree.items() if part in self.shared.adapted and "A" in layer]
        return Received(Turn(self.round, node, max(ranks, default=0)), examples, tree)  # type: ignore[arg-type]

    def _check_mark(self, mark: Array | None) -> None:
        if mark is None:
            if self.needs_mark:
                title = next(iter(self.rules.values())).title
                raise ValueError(f"{title} works at the client, too, and its app does not use fedlora.flower.send")
            return
        found = read_mark(mark)
        if found != (self.round, self.base_updates):
            raise ValueError(
                f"it answers for round {found[0] + 1} with {found[1]} base updates, where round {self.round + 1} with "
                f"{self.base_updates} was asked for"
            )

    def _tree(self, arrays: Mapping[str, Array]) -> dict[str, dict[str, Tensor]]:
        keys = parse_keys(arrays)
        wanted = {(part, leaf) for part, rule in self.rules.items() for leaf in select_sent(rule, self.round)}
        for what, odd in (("lacks", wanted - keys.keys()), ("sent", keys.keys() - wanted)):
            if odd:
                first = sorted(self.shared.keys.get(x, keys.get(x)) for x in odd)
                more = f" and {len(first) - 1} more" if len(first) > 1 else ""
                needed = "" if what == "lacks" else ", which the method does not send in this round"
                raise ValueError(f"it {what} {first[0]!r}{more}{needed}")
        tree: dict[str, dict[str, Tensor]] = {part: {} for part in self.rules}
        for (part, leaf), key in sorted(keys.items()):
            tree[part][leaf] = read_tensor(key, arrays[key])
        for part, layer in tree.items():
            self._check_shapes(part, layer)
        return tree

    def _check_shapes(self, part: str, layer: Mapping[str, Tensor]) -> None:
        own = self.shared.tree[part]
        needed = {leaf: tuple(own[leaf].shape) for leaf in layer}
        if self.any_rank and part in self.shared.adapted and layer.keys() == {"A", "B"}:
            rank = layer["A"].shape[0] if layer["A"].dim() == 2 else 0
            if 1 <= rank <= needed["A"][0]:
                needed = {"A": (rank, needed["A"][1]), "B": (needed["B"][0], rank)}
        found = {leaf: tuple(x.shape) for leaf, x in layer.items()}
        if found != needed:
            raise ValueError(f"it sent {found} for {part!r} where {needed} is needed")

    def _one_rank(self, good: dict[int, tuple[Received, RecordDict]]) -> dict[int, tuple[Received, RecordDict]]:
        """Sets each turn's rank to the server's where all uploads have one form: methods compare the turns' ranks."""
        forms = {
            tuple(tuple(x.shape) for layer in received.tree.values() for x in layer.values())
            for received, _ in good.values()
        }
        if len(forms) > 1 or not good:
            return good
        rank = max(self.shared.ranks().values())
        return {
            node: (received._replace(turn=Turn(self.round, node, rank)), content)
            for node, (received, content) in good.items()
        }


def check_error(reply: Message) -> None:
    """``ValueError`` where a reply is an error."""
    if reply.has_error():
        raise ValueError(f"it reports {reply.error.reason!r}")


def read_weight(content: RecordDict, key: str) -> int | float:
    """A reply's number of examples. ``ValueError`` where it is missing or no weight."""
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise ValueError(f"it sent {len(records)} records of metrics where 1 is needed")
    found = records[0].get(key)
    if not isinstance(found, int | float) or not isfinite(found) or found <= 0:
        raise ValueError(f"its metric {key!r} is {found!r}, where a number above 0 is needed")
    return found


def select_alike(contents: Iterable[RecordDict]) -> list[RecordDict]:
    """Selects the replies whose metrics can be averaged: those of the form that most of them have."""
    found = list(contents)
    forms = Counter(_form(content) for content in found)
    most = max(forms, key=lambda form: forms[form], default=None)
    if len(forms) > 1:
        LOG.warning("%s replies have metrics unlike the others'; their metrics are left out.", len(found) - forms[most])
    return [content for content in found if _form(content) == most]


def _form(content: RecordDict) -> tuple[tuple[str, int], ...]:
    record: MetricRecord = next(iter(content.metric_records.values()))
    return tuple(sorted((key, len(x) if isinstance(x, list) else -1) for key, x in record.items()))


def read_limits(table: Mapping[str, Any] | None) -> Validation:
    """The settings of ``[validation]``; those of files do not apply, since a strategy has no folder."""
    found: Validation = construct(Validation, "validation", dict(table or {}), ("keep_files", "keep_mb"))
    return found


def read_rule(robust: str | Mapping[str, Any] | None, method: Method) -> RobustAggregator | None:
    """A robust rule by its name, or by a table with ``name`` and its settings. ``ValueError`` where it cannot work."""
    if robust is None:
        return None
    table = {"name": robust} if isinstance(robust, str) else dict(robust)
    if not isinstance(table.get("name"), str):
        raise ValueError(f"robust names no rule; give one of {', '.join(ROBUST_RULES.names())}.")
    found: RobustAggregator = construct_by_name(ROBUST_RULES, "robust", table)
    found.check(method, hidden=False)
    return found


@dataclass
class Guard:
    """Validation and robust rule of one run of a strategy."""

    limits: Validation
    rule: RobustAggregator | None
    method: Method
    seed: int
    quarantined: dict[int, dict[int, str]] = field(default_factory=dict)  # round (from 1) -> node -> why
    conduct: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reset(self) -> None:
        """Begins another run, which forgets the misconduct in the one before."""
        self.quarantined, self.conduct = {}, {}

    def filter_nodes(self, nodes: Collection[int], round: int) -> list[int]:
        """Selects the nodes that may take part in a round (from 0); the log names the others."""
        out = excluded_clients(self.limits, self.conduct)
        for node in sorted(out & set(nodes)):
            times = self.conduct["strikes"][str(node)]
            LOG.warning("round %s: node %s is left out: it was quarantined in %s rounds.", round + 1, node, times)
        return [node for node in nodes if node not in out]

    def screen(self, rules: Rules, shared: Tree, round: int, uploads: Mapping[int, Received]) -> dict[int, Received]:
        """Selects the uploads that are neither broken nor absurd beside the others, and caps their claims."""
        screen = UploadScreen(self.limits, rules, shared, self.conduct)
        seeded = (u._replace(turn=self._turn(u, node)) for node, u in uploads.items())
        arrived = [found for upload in seeded if (found := screen.check(upload)) is not None]
        good = screen.compare(arrived, lambda upload: 1)
        screen.record_conduct()
        for node, bad in sorted(screen.rejected.items()):
            self.quarantined.setdefault(round + 1, {})[node] = bad.reason
            LOG.warning("round %s: node %s is left out, its upload is quarantined: %s.", round + 1, node, bad.reason)
        return {upload.turn.client: upload for upload in good}

    def apply_rule(self, rules: Rules, shared: Tree, round: int, uploads: Sequence[Received]) -> list[Received]:
        """The uploads that the robust rule keeps, with its weights; all of them where there is no rule."""
        found, said = reweigh_uploads(self.rule, self.method, rules, shared, uploads, round, self.seed)
        if self.rule is not None:
            LOG.info("round %s: the robust rule kept the nodes %s", round + 1, said["kept"])
        return found

    def _turn(self, upload: Received, node: int) -> Turn:
        """The turn with the seed of the node's instructions: where a method starts afresh, it draws from it."""
        turn = upload.turn
        return replace(turn, seed=derive_seed(self.seed, "turn", turn.round, node))
