"""The server's instructions to a client, sent beside the adapter: the method, the round, the base updates."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ConfigRecord, Message

from fedlora.adapters import Dense, LoRA
from fedlora.flower.strategy.peft_state import PeftState
from fedlora.methods import METHODS, Method
from fedlora.methods.fedit import FedIT
from fedlora.methods.local import Local
from fedlora.registry import name_or_nearest
from fedlora.rounds import Rules, public_leaves
from fedlora.runs.config import construct
from fedlora.training.peft_settings import pattern_for
from fedlora.types import Layer, Turn, Upload, Work

RECORD, BASE_UPDATES = (
    "fedlora",
    "fedlora.base_updates",
)  # of a message: the instructions, and the base updates that the node lacks
PROTOCOL = 1
PROBE = LoRA(rank=1, alpha=1.0)


@dataclass(frozen=True)
class Recipe:
    """The constants of a run: the method by its name with its settings, and the scale of ``B`` in messages."""

    method: str
    lora_alpha: float
    use_rslora: bool = False
    method_options: Mapping[str, Any] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}; give the number in the server's LoraConfig.")

    def build(self) -> Method:
        """The method. ``ValueError`` where it cannot work in somebody else's training loop."""
        try:
            return _build(self.method, json.dumps(dict(self.method_options)))
        except TypeError as error:
            raise ValueError(
                f"method_options holds what no message can carry ({error}); give numbers, strings and booleans."
            ) from error

    def rules(self, adapter: PeftState) -> Rules:
        """Which rule looks after which part: the method, with each part's own rank and scale, and one for heads."""
        method = self.build()
        heads = FedIT if method.shares_head else Local
        return {
            part: replace(method, adapter=self._lora(part, layer["A"].shape[0]))
            if part in adapter.adapted
            else heads(Dense(frozenset(layer)), method.weighting)
            for part, layer in adapter.tree.items()
        }

    def _lora(self, part: str, rank: int) -> LoRA:
        alpha = self.alpha_pattern.get(pattern_for(self.alpha_pattern, part), self.lora_alpha)
        return LoRA(rank, float(alpha), self.use_rslora)


@dataclass(frozen=True)
class Instructions:
    """The instructions of one message."""

    recipe: Recipe
    round: int  # from 0
    seed: int  # of this client in this round
    series: str  # names the run: what a node kept of another one does not count
    arrays: str  # the record that holds the adapter
    first: int = 0  # the base updates that come along are those after the first so many,
    last: int = 0  # up to this one

    def record(self) -> ConfigRecord:
        """As a record of the message."""
        rest = {key: value for key, value in vars(self).items() if key != "recipe"}
        return ConfigRecord({**rest, "recipe": json.dumps(asdict(self.recipe)), "protocol": PROTOCOL})

    @classmethod
    def read(cls, message: Message) -> "Instructions | None":
        """A message's instructions; None where the server's strategy is not fedlora's."""
        if RECORD not in message.content:
            return None
        found = dict(message.content[RECORD])
        if found.pop("protocol", None) != PROTOCOL:
            raise ValueError(
                "the server's fedlora speaks another protocol than this node's; install one version at both."
            )
        return cls(**{**found, "recipe": Recipe(**json.loads(found["recipe"]))})


@lru_cache(maxsize=64)
def _build(name: str, options: str) -> Method:
    if ":" in name:
        raise ValueError(
            f"the method is {name!r}, but what a server names is imported by every client; name an installed method, "
            "see `fedlora methods`."
        )
    near, subject = name_or_nearest("method", name, METHODS.names())
    if near is not None and near not in list_methods():
        kinds = " or ".join(other.__name__ for other in METHODS.load(near).adapters)
        raise ValueError(
            f"{subject} trains an adapter of kind {kinds}, which PEFT's LoRA is not; run it with fedlora's own engine "
            f"(`fedlora run`), or take one of {', '.join(list_methods())}."
        )
    kind = METHODS.load(name)
    method: Method = construct(kind, "method_options", json.loads(options), ("adapter",))
    penalty = method.penalty(_probe())
    if isinstance(penalty, torch.Tensor) or penalty != 0.0:
        raise ValueError(
            f"{method.title} adds a penalty to the loss with these method_options, which a training loop of your own "
            "does not; leave it out, or run it with fedlora's own engine (`fedlora run`)."
        )
    return method


def list_methods() -> list[str]:
    """The methods that PEFT's LoRA can be trained with."""
    return [name for name, kind in METHODS.classes().items() if LoRA in kind.adapters]


def needs_client(method: Method) -> bool:
    """Whether clients must call ``receive`` and ``send``: the method does something there, or changes the base."""
    hooks = ("trains", "send", "keep")
    if method.personal or any(getattr(type(method), hook) is not getattr(Method, hook) for hook in hooks):
        return True
    shared = _probe()
    start = replace(method, adapter=PROBE).receive(shared, {}, Turn(0, 0, 1))
    return changes_base(method) or not all(torch.equal(start[leaf], shared[leaf]) for leaf in "AB")


def changes_base(method: Method) -> bool:
    """Whether a round with these settings adds something to the base."""
    rule = replace(method, adapter=PROBE)
    uploads = [
        Upload(Turn(0, k, 1), 0.5, {"A": torch.eye(3)[k : k + 1], "B": torch.eye(3)[:, k : k + 1]}) for k in (0, 1)
    ]
    return bool(rule.combine_all({"": _probe()}, {"": uploads})[""].base_update)


@lru_cache(maxsize=1024)
def select_sent(rule: Method, round: int) -> frozenset[str]:
    """Selects the leaves that a client sends in a round, by letting the rule work on a weight of one number."""
    dense = isinstance(rule.adapter, Dense)
    rule = rule if dense else replace(rule, adapter=PROBE)
    layer = dict.fromkeys(rule.adapter.trainable, torch.ones(1)) if dense else _probe(1)
    turn = Turn(round, 0, 1)
    start = public_leaves(rule.receive(layer, {}, turn))
    return frozenset(rule.send(Work(start, start, select_trained(rule, start, turn)), turn))


def select_trained(rule: Method, start: Layer, turn: Turn) -> frozenset[str]:
    """Selects the leaves to train. ``ValueError`` where the method asks for a gradient first."""
    return rule.trains(start, turn, _no_gradient)


def _no_gradient() -> Layer:
    raise ValueError(
        "the method asks for a gradient before training, which a training loop of your own does not give; "
        "run it with fedlora's own engine (`fedlora run`)."
    )


def _probe(side: int = 3) -> Layer:
    return {"A": torch.ones(1, side), "B": torch.ones(side, 1)}
