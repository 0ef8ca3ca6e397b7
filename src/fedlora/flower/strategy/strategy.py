"""A Flower strategy that combines PEFT adapters by any of fedlora's methods."""

from collections.abc import Iterable, Mapping, Sequence
from logging import getLogger
from typing import Any
from uuid import uuid4

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.engines.peft_round import PeftRound
from fedlora.flower.strategy.arrays import encode_base_updates, read_state, split_arrays
from fedlora.flower.strategy.instructions import BASE_UPDATES, RECORD, Instructions, check_method_name
from fedlora.flower.strategy.replies import ReplyChecks, read_replies, read_weight, select_alike
from fedlora.rounds import Received
from fedlora.security.guard import Guard
from fedlora.training.recipe import Recipe, changes_base, needs_client
from fedlora.types import Tree

LOG = getLogger("flwr")


class FedLoRA(FedAvg):
    """``FedAvg`` with another rule for the arrays, which are a PEFT state dict (``get_peft_model_state_dict``).

    ``lora_alpha``, ``use_rslora`` and ``alpha_pattern`` are those of the server's ``LoraConfig``; clients that call
    ``fedlora.flower.receive`` and ``send`` may have another scale. ``r`` is the largest rank (None: that of the initial
    arrays). ``method_options`` and ``validation`` are the settings of these tables in fedlora's TOML; validation is
    always on. ``robust`` is the name of a robust aggregator, or its table. The arguments of ``FedAvg`` keep their
    meaning. ``quarantine`` has the nodes that were left out of each round, with the reasons. The arrays of a result
    include the method's updates of the base, under keys that begin with ``fedlora.fold.``:
    ``fedlora.flower.load(model, arrays)`` loads both. Raises ``ValueError`` for settings that exclude each other.
    """

    def __init__(
        self,
        method: str = "fedit",
        *,
        lora_alpha: float,
        r: int | None = None,
        use_rslora: bool = False,
        alpha_pattern: Mapping[str, float] | None = None,
        method_options: Mapping[str, Any] | None = None,
        seed: int = 0,
        validation: Mapping[str, Any] | None = None,
        robust: str | Mapping[str, Any] | None = None,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self.recipe = Recipe(method, lora_alpha, use_rslora, method_options or {}, alpha_pattern or {}, seed)
        check_method_name(self.recipe)
        self.method = self.recipe.build()
        self.guard = Guard(validation, robust, self.method, seed)
        self.r = r
        self.needs_client = needs_client(self.method)
        self._log = BaseUpdateLog()
        self._known: dict[int, int] = {}  # node -> its number of base updates, by its last reply
        self._series, self._round = "", 0
        self._asked: frozenset[int] = frozenset()
        self._arrays = ArrayRecord()  # the last ones that were passed in or returned

    def summary(self) -> None:
        """Log Flower's summary, the method, and its requirements for the apps."""
        super().summary()
        LOG.info("\t└──> fedlora: %s %s", self.method.title, dict(self.recipe.method_options) or "")
        if self.needs_client:
            LOG.info("\t\t├── clients must call fedlora.flower.receive and fedlora.flower.send")
        if changes_base(self.method):
            LOG.info("\t\t└── it changes the base: load results with fedlora.flower.load")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return ``FedAvg``'s messages, each with instructions and the base updates that its node lacks."""
        self._open(server_round, arrays)
        messages = list(super().configure_train(server_round, self._plain, config, grid))
        nodes = [message.metadata.dst_node_id for message in messages]
        excluded = self.guard.exclusions
        for node in sorted(excluded & set(nodes)):
            times = self.guard.conduct["strikes"][str(node)]
            LOG.warning("round %s: node %s is left out: it was quarantined in %s rounds.", server_round, node, times)
        self._asked = frozenset(nodes) - excluded
        messages = [message for message in messages if message.metadata.dst_node_id in self._asked]
        return self._add_instructions(messages, server_round - 1)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return ``FedAvg``'s messages, each with instructions and the base updates that its node lacks."""
        plain = ArrayRecord(split_arrays(arrays)[0])
        return self._add_instructions(list(super().configure_evaluate(server_round, plain, config, grid)), server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the method's combination of the good replies, or the old arrays if there are too few good replies."""
        replies = list(replies)
        if not self._asked:
            return None, None
        self._forget_failures(replies)
        good = self._screen(replies)
        LOG.info("aggregate_train: %s good replies of %s", len(good), len(self._asked))
        if len(good) < max(1, self.min_train_nodes):
            LOG.warning(
                "round %s: %s good replies, %s needed (min_train_nodes): the model stays as it was.",
                server_round, len(good), self.min_train_nodes,
            )  # fmt: skip
            return self._arrays, None
        self._known |= {node: len(self._log) for node, (_, content) in good.items()}
        self._arrays = self._combine(server_round, [received for received, _ in good.values()])
        contents = select_alike(content for _, content in good.values())
        return self._arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean metrics of the good replies; the log has the others."""
        replies = list(replies)
        self._forget_failures(replies)

        def read(reply: Message) -> RecordDict:
            read_weight(reply.content, self.weighted_by_key)
            return reply.content

        good = read_replies(replies, read, f"evaluation {server_round}")
        return self.evaluate_metrics_aggr_fn(select_alike(good.values()), self.weighted_by_key) if good else None

    def _open(self, server_round: int, arrays: ArrayRecord) -> None:
        """Read the arrays of a round. Arrays that are not this strategy's last ones begin a new run."""
        plain, base_updates = split_arrays(arrays)
        self._plain = ArrayRecord(plain)
        self._turn = PeftRound(self.recipe, read_state(plain), server_round - 1)
        if not self._series or (server_round <= self._round and arrays is not self._arrays):
            self._series, self._known = uuid4().hex, {}
            self.guard.reset()
            self._log = BaseUpdateLog(base_updates, 1, []) if base_updates else BaseUpdateLog()
            self._check_start()
        self._round, self._arrays = server_round, arrays

    def _check_start(self) -> None:
        ranks = set(self._turn.shared.ranks().values())
        if self.r is not None and self.r != max(ranks):
            raise ValueError(
                f"r is {self.r}, but the initial arrays have ranks {sorted(ranks)}; leave r out, or make "
                "the server's model with the largest rank."
            )
        self._turn.check_start()

    def _add_instructions(self, messages: Sequence[Message], round: int) -> list[Message]:
        records: dict[int, ArrayRecord] = {}  # first missing base update -> its record
        for message in messages:
            node = message.metadata.dst_node_id
            first = self._known.get(node, 0)
            first = first if first >= self._log.start else 0
            if first not in records:
                missing = {part: factors[0] for part, factors in self._log.missing_sum(first).items()}
                records[first] = ArrayRecord(encode_base_updates(missing))
            seed = self.recipe.turn_seed(round, node)
            instructions = Instructions(
                self.recipe, round, seed, self._series, self.arrayrecord_key, first, len(self._log)
            )
            more: dict[str, Any] = {BASE_UPDATES: records[first]} if records[first] else {}
            message.content = RecordDict({**message.content, RECORD: instructions.record(), **more})
        return list(messages)

    def _forget_failures(self, replies: Sequence[Message]) -> None:
        """Send everything to the nodes that failed, next time: they may have lost their memory."""
        for reply in replies:
            if reply.has_error():
                self._known.pop(reply.metadata.src_node_id, None)

    def _screen(self, replies: Sequence[Message]) -> dict[int, tuple[Received, RecordDict]]:
        """Return the replies that pass the checks, alone and in comparison."""
        turn, number = self._turn, self._turn.number
        checks = ReplyChecks(turn, self._asked, self.weighted_by_key, self.needs_client, len(self._log))
        good = checks.select_good(replies)
        uploads = self.guard.screen(turn.rules, turn.shared.tree, number, {node: u for node, (u, _) in good.items()})
        for node in sorted(good.keys() - uploads.keys()):
            reason = self.quarantine[number + 1][node]
            LOG.warning("round %s: node %s is left out, its upload is quarantined: %s.", number + 1, node, reason)
        return {node: (uploads[node], content) for node, (_, content) in good.items() if node in uploads}

    @property
    def quarantine(self) -> Mapping[int, Mapping[int, str]]:
        """Round -> node -> the reason why its upload was quarantined."""
        return self.guard.quarantine

    def _combine(self, server_round: int, uploads: Sequence[Received]) -> ArrayRecord:
        try:
            served, _, kept = self._turn.combine(self.guard, uploads)
            arrays = self._to_arrays(served.shared)
        except ValueError as error:
            LOG.warning("round %s cannot be combined, the model stays as it was: %s", server_round, error)
            return self._arrays
        if kept is not None:
            LOG.info("round %s: the robust rule kept the nodes %s", server_round, kept)
        if served.base_updates:
            self._log.append(served.base_updates)
            self._log.keep_recent()
        return ArrayRecord({**arrays, **encode_base_updates(self._log.total())})

    def _to_arrays(self, shared: Tree) -> dict[str, Array]:
        """Return the adapter with its keys and its precision; leaves that did not change keep their bits."""
        before = {key: array.numpy() for key, array in self._plain.items()}
        after = self._turn.shared.to_state_dict(shared, before)
        return {key: self._plain[key] if x is before[key] else Array(x) for key, x in after.items()}
