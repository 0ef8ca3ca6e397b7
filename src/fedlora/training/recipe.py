"""A method and its settings for somebody else's training loop, with PEFT's LoRA: which methods work there, and how."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from fedlora.adapters import Dense, LoRA
from fedlora.methods import METHODS
from fedlora.methods._base import Method
from fedlora.methods.fedit import FedIT
from fedlora.methods.local import Local
from fedlora.registry import name_or_nearest
from fedlora.rounds import Rules
from fedlora.schema import construct
from fedlora.seeds import derive_seed
from fedlora.training.peft_settings import pattern_for
from fedlora.training.peft_state import PeftState
from fedlora.types import Layer, Turn, Upload, Work

PROBE = LoRA(rank=1, alpha=1.0)
PROBE_LAYER: Layer = {"A": torch.ones(1, 3), "B": torch.ones(3, 1)}


@dataclass(frozen=True)
class Recipe:
    """The constants of a run: the method's name and settings, and the scale of ``B`` in messages."""

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
        """Return the method. Raises ``ValueError`` if it cannot work in a user's own training loop."""
        try:
            return _build(self.method, json.dumps(dict(self.method_options)))
        except TypeError as error:
            raise ValueError(
                f"method_options holds what no message can carry ({error}); give numbers, strings and booleans."
            ) from error

    def turn_seed(self, round: int, client: int) -> int:
        """Return the seed of a client's turn in a round (from 0)."""
        return derive_seed(self.seed, "turn", round, client)

    def rules(self, adapter: PeftState) -> Rules:
        """Return the rule of each part: the method with the part's rank and scale, or the rule for heads."""
        method = self.build()
        heads = FedIT if method.shares_head else Local
        rules: dict[str, Method] = {}
        for part, layer in adapter.tree.items():
            if part in adapter.adapted:
                alpha = float(self.alpha_pattern.get(pattern_for(self.alpha_pattern, part), self.lora_alpha))
                rules[part] = replace(method, adapter=LoRA(layer["A"].shape[0], alpha, self.use_rslora))
            else:
                rules[part] = heads(Dense(frozenset(layer)), method.weighting)
        return rules


@lru_cache(maxsize=64)
def _build(name: str, options: str) -> Method:
    near, subject = name_or_nearest("method", name, [*METHODS.names(), *([name] if ":" in name else [])])
    if near is not None and LoRA not in METHODS.load(near).adapters:
        kinds = " or ".join(other.__name__ for other in METHODS.load(near).adapters)
        raise ValueError(
            f"{subject} trains an adapter of kind {kinds}, which PEFT's LoRA is not; run it with fedlora's own engine "
            f"(`fedlora run`), or take one of {', '.join(list_peft_methods())}."
        )
    kind = METHODS.load(name)
    method: Method = construct(kind, "method_options", json.loads(options), ("adapter",))
    penalty = method.penalty(PROBE_LAYER)
    if isinstance(penalty, torch.Tensor) or penalty != 0.0:
        raise ValueError(
            f"{method.title} adds a penalty to the loss with these method_options, which a training loop of your own "
            "does not; leave it out, or run it with fedlora's own engine (`fedlora run`)."
        )
    return method


def list_peft_methods() -> list[str]:
    """Return the methods that can train PEFT's LoRA."""
    return [name for name, kind in METHODS.classes().items() if LoRA in kind.adapters]


def needs_client(method: Method) -> bool:
    """Whether clients must call ``receive`` and ``send``: the method has client hooks, or changes the base."""
    hooks = ("trains", "send", "keep")
    if method.personal or any(getattr(type(method), hook) is not getattr(Method, hook) for hook in hooks):
        return True
    start = replace(method, adapter=PROBE).receive(PROBE_LAYER, {}, Turn(0, 0, 1))
    return changes_base(method) or not all(torch.equal(start[leaf], PROBE_LAYER[leaf]) for leaf in "AB")


def changes_base(method: Method) -> bool:
    """Whether a round with these settings updates the base."""
    rule = replace(method, adapter=PROBE)
    eye = torch.eye(3)
    uploads = [Upload(Turn(0, k, 1), 0.5, {"A": eye[k : k + 1], "B": eye[:, k : k + 1]}) for k in (0, 1)]
    return bool(rule.combine_all({"": PROBE_LAYER}, {"": uploads})[""].base_update)


def server_obstacle(method: Method) -> str | None:
    """Return the reason why clients without fedlora cannot take part, though they freeze, keep and send as listed.

    None if they can: a server then computes the upload of ``send`` from the leaves that a client has trained.
    """
    rule = replace(method, adapter=PROBE)
    end = {leaf: x + 1 for leaf, x in PROBE_LAYER.items()}
    if method.prunes:
        return "its clients shorten their own factors"
    for turn in (Turn(0, 0, 1), Turn(1, 0, 1)):
        try:
            trained = trainable_leaves(rule, rule.receive(PROBE_LAYER, {}, turn), turn)
        except ValueError:
            return "its clients ask for a gradient before they train"
        work = Work(rule.receive(PROBE_LAYER, {}, turn), end, trained)
        sent = rule.send(work, turn)
        stays = {leaf: end[leaf] for leaf in trained - sent.keys()}
        if not sent:
            return "its clients send nothing"
        if not _is_equal(rule.keep(work, sent, turn), stays):
            return "its clients keep notes of their own between rounds"
        if stays and not _is_equal(rule.receive(PROBE_LAYER, stays, turn), {**work.start, **stays}):
            return "its clients start from a mixture of what they keep and what they are sent"
        try:
            again = rule.send(plain_work(work.start, sent, stays.keys(), trained), turn)
        except KeyError:
            return "its clients compute what they send from leaves that they keep"
        if again.keys() != sent.keys():
            return "its clients send leaves that depend on training"
    return None


def plain_work(start: Layer, uploaded: Layer, stays: Collection[str], trained: frozenset[str]) -> Work:
    """Return a client's work as far as a server knows it: without the leaves that stay, and their start."""
    end = {leaf: x for leaf, x in {**start, **uploaded}.items() if leaf not in stays}
    return Work({} if stays else start, end, trained)


def _is_equal(layer: Layer, other: Layer) -> bool:
    return layer.keys() == other.keys() and all(torch.equal(x, other[leaf]) for leaf, x in layer.items())


def trainable_leaves(rule: Method, start: Layer, turn: Turn) -> frozenset[str]:
    """Return the leaves to train. Raises ``ValueError`` if the method needs a gradient first."""
    return rule.trains(start, turn, _no_gradient)


def _no_gradient() -> Layer:
    raise ValueError(
        "the method asks for a gradient before training, which a training loop of your own does not give; "
        "run it with fedlora's own engine (`fedlora run`)."
    )
