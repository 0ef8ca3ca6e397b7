"""Checks of a round's replies, one by one and in comparison. A reply that fails is left out and reported."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from logging import getLogger
from math import isfinite
from typing import Any, TypeVar

from flwr.app import Array, Message, MetricRecord, RecordDict
from torch import Tensor

from fedlora.flower.replies import MALFORMED, describe_refusal
from fedlora.flower.strategy.arrays import MARK, read_mark, read_tensor
from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules
from fedlora.schema import construct, construct_by_name
from fedlora.security.robust import ROBUST_RULES
from fedlora.security.robust._base import RobustAggregator, reweigh_uploads
from fedlora.security.validation import UploadScreen, Validation, excluded_clients
from fedlora.security.validation.expected import build_upload_spec
from fedlora.seeds import derive_seed
from fedlora.training.peft_state import PeftState, parse_keys
from fedlora.types import Tree, Turn

LOG = getLogger("flwr")
Reading = TypeVar("Reading")


@dataclass(frozen=True)
class ReplyChecks:
    """The checks of each single reply of a round."""

    rules: Rules
    shared: PeftState
    round: int  # from 0
    asked: frozenset[int]  # nodes
    weight: str  # the metric with a reply's number of examples
    any_rank: bool
    needs_mark: bool  # must replies come from `send`?
    base_updates: int  # the number of base updates that the nodes were sent

    def select_good(self, replies: Sequence[Message]) -> dict[int, tuple[Received, RecordDict]]:
        """Return the good replies by node; the log has the others with the reasons."""
        good = read_replies(replies, self._read, f"round {self.round + 1}")
        # Methods compare the turns' ranks: if all uploads have the same shapes, each has the server's rank.
        shapes = {
            tuple(tuple(x.shape) for layer in upload.tree.values() for x in layer.values())
            for upload, _ in good.values()
        }
        if len(shapes) != 1:
            return good
        rank = max(self.shared.ranks().values())
        return {k: (u._replace(turn=Turn(self.round, k, rank)), content) for k, (u, content) in good.items()}

    def _read(self, reply: Message) -> tuple[Received, RecordDict]:
        node = reply.metadata.src_node_id
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
        turn = Turn(self.round, node, max(ranks, default=0))
        return Received(turn, examples, tree), reply.content  # type: ignore[arg-type]

    def _check_mark(self, mark: Array | None) -> None:
        if mark is None:
            if self.needs_mark:
                title = next(iter(self.rules.values())).title
                raise ValueError(f"{title} works at the client, too, and its app does not use fedlora.flower.send")
            return
        round, held = read_mark(mark)
        if (round, held) != (self.round, self.base_updates):
            raise ValueError(
                f"it answers for round {round + 1} with {held} base updates, where round {self.round + 1} with "
                f"{self.base_updates} was asked for"
            )

    @cached_property
    def _leaves(self) -> set[tuple[str, str]]:
        """The parts and leaves that the method sends in this round."""
        turn = Turn(self.round, 0, max(self.shared.ranks().values()))
        sent = build_upload_spec(self.rules, self.shared.tree, turn).sent
        return {(part, leaf) for part, layer in sent.items() for leaf in layer}

    def _tree(self, arrays: Mapping[str, Array]) -> dict[str, dict[str, Tensor]]:
        keys, _ = parse_keys(arrays)
        which = ", which the method does not send in this round"
        for verb, odd, end in (("lacks", self._leaves - keys.keys(), ""), ("sent", keys.keys() - self._leaves, which)):
            if odd:
                names = sorted(self.shared.keys.get(x, keys.get(x)) for x in odd)
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(f"it {verb} {names[0]!r}{more}{end}")
        tree: dict[str, dict[str, Tensor]] = {part: {} for part in self.rules}
        for (part, leaf), key in sorted(keys.items()):
            tree[part][leaf] = read_tensor(key, arrays[key])
        for part, layer in tree.items():
            self._check_shapes(part, layer)
        return tree

    def _check_shapes(self, part: str, layer: Mapping[str, Tensor]) -> None:
        needed = {leaf: tuple(self.shared.tree[part][leaf].shape) for leaf in layer}
        if self.any_rank and part in self.shared.adapted and layer.keys() == {"A", "B"}:
            rank = layer["A"].shape[0] if layer["A"].dim() == 2 else 0
            if 1 <= rank <= needed["A"][0]:
                needed = {"A": (rank, needed["A"][1]), "B": (needed["B"][0], rank)}
        shapes = {leaf: tuple(x.shape) for leaf, x in layer.items()}
        if shapes != needed:
            raise ValueError(f"it sent {shapes} for {part!r} where {needed} is needed")


def read_replies(replies: Iterable[Message], read: Callable[[Message], Reading], occasion: str) -> dict[int, Reading]:
    """Read each node's reply. The log has the nodes that are left out, with the reasons."""
    good: dict[int, Reading] = {}
    for reply in replies:
        node = reply.metadata.src_node_id
        try:
            if node in good:
                raise ValueError("it has replied already")
            if reply.has_error():
                raise ValueError(f"it reports {reply.error.reason!r}")
            good[node] = read(reply)
        except MALFORMED as error:
            LOG.warning("%s: node %s is left out: %s.", occasion, node, describe_refusal(error, ValueError))
    return good


def read_weight(content: RecordDict, key: str) -> int | float:
    """Return a reply's number of examples. Raises ``ValueError`` if it is missing or not positive."""
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise ValueError(f"it sent {len(records)} records of metrics where 1 is needed")
    weight = records[0].get(key)
    if not isinstance(weight, int | float) or not isfinite(weight) or weight <= 0:
        raise ValueError(f"its metric {key!r} is {weight!r}, where a number above 0 is needed")
    return weight


def select_alike(contents: Iterable[RecordDict]) -> list[RecordDict]:
    """Return the replies whose metrics can be averaged: those with the most frequent names and lengths."""
    groups: dict[tuple, list[RecordDict]] = {}
    for content in contents:
        record: MetricRecord = next(iter(content.metric_records.values()))
        form = tuple(sorted((key, len(x) if isinstance(x, list) else -1) for key, x in record.items()))
        groups.setdefault(form, []).append(content)
    largest = max(groups.values(), key=len, default=[])
    if len(groups) > 1:
        others = sum(map(len, groups.values())) - len(largest)
        LOG.warning("%s replies have metrics unlike the others'; their metrics are left out.", others)
    return largest


class Guard:
    """Validation and robust aggregation of one run of a strategy.

    ``validation`` has settings of the table ``[validation]``, except those of files, since a strategy has no folder.
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
        self.quarantine: dict[int, dict[int, str]] = {}  # round (from 1) -> node -> reason
        self.conduct: dict[str, dict[str, Any]] = {}

    def filter_nodes(self, nodes: Collection[int], round: int) -> list[int]:
        """Return the nodes that may take part in a round (from 0); the log has the others."""
        out = excluded_clients(self.limits, self.conduct)
        for node in sorted(out & set(nodes)):
            times = self.conduct["strikes"][str(node)]
            LOG.warning("round %s: node %s is left out: it was quarantined in %s rounds.", round + 1, node, times)
        return [node for node in nodes if node not in out]

    def screen(self, rules: Rules, shared: Tree, round: int, uploads: Mapping[int, Received]) -> dict[int, Received]:
        """Return the uploads that pass validation alone and in comparison, with their numbers of examples capped."""
        screen = UploadScreen(self.limits, rules, shared, self.conduct)
        # A method that begins each turn afresh draws from the seed of the node's instructions.
        seeds = {node: derive_seed(self.seed, "turn", u.turn.round, node) for node, u in uploads.items()}
        seeded = (u._replace(turn=replace(u.turn, seed=seeds[node])) for node, u in uploads.items())
        good = screen.compare([u for upload in seeded if (u := screen.check(upload)) is not None], lambda upload: 1)
        screen.record_conduct()
        for node, bad in sorted(screen.rejected.items()):
            self.quarantine.setdefault(round + 1, {})[node] = bad.reason
            LOG.warning("round %s: node %s is left out, its upload is quarantined: %s.", round + 1, node, bad.reason)
        return {upload.turn.client: upload for upload in good}

    def apply_rule(self, rules: Rules, shared: Tree, round: int, uploads: Sequence[Received]) -> list[Received]:
        """Return the uploads that the robust aggregator keeps, with its weights; all of them if there is none."""
        kept, judged = reweigh_uploads(self.rule, self.method, rules, shared, uploads, round, self.seed)
        if self.rule is not None:
            LOG.info("round %s: the robust rule kept the nodes %s", round + 1, judged["kept"])
        return kept
