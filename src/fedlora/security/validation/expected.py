"""What an upload must look like: known before its client has trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from fedlora.adapters import Dense
from fedlora.methods._base import Method
from fedlora.rounds import Rules, received
from fedlora.types import Layer, Tree, Turn, Work

PLAIN = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 65504.0  # of a trained number, float16's; far beyond it, factorisations of sums overflow
Form = Mapping[str, tuple[torch.Size, torch.dtype]]  # shape and type of a layer's leaves


class RefusedError(ValueError):
    """A reply that is left out; the text says why."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What the method sends of a start that nobody has trained."""

    start: Tree  # every leaf that the client holds before training
    sent: Tree  # those that it sends
    exact: bool  # False where the choice goes by the client's own rows: then it sends some of ``sent``
    products: frozenset[str]  # parts whose update ``ΔW`` the upload tells: no factor of it stays with the client
    forms: Mapping[str, "Form"]  # of ``sent``


class Checked(NamedTuple):
    """A sound upload: its leaves in the server's types, and the start that it is a change of."""

    tree: Tree
    start: Tree
    products: frozenset[str]


FIELDS = tuple(f.name for f in fields(Turn))
OWN = {"client", "seed"}  # fields by which no two turns of a round are alike


class _Read(Turn):
    """A turn that notes what is read of it."""

    def __getattribute__(self, name: str) -> Any:
        if name in FIELDS:
            object.__getattribute__(self, "__dict__").setdefault("read", {})[name] = None
        return object.__getattribute__(self, name)


@dataclass
class Expectations:
    """What the uploads of one round have to have. Hooks are pure, so where they read nothing of a turn but, say, its
    rank, the answer is the same for all clients of that rank, and is made once."""

    rules: Rules
    shared: Tree
    _known: dict[tuple[str, ...], dict[tuple[Any, ...], Expected]] = field(default_factory=dict, init=False)

    def of(self, turn: Turn) -> Expected:
        """What a client's upload of this turn has to have."""
        for names, answers in self._known.items():
            if (found := answers.get(tuple([getattr(turn, name) for name in names]))) is not None:
                return found
        watched = _Read(*(getattr(turn, name) for name in FIELDS))
        found = expected(self.rules, self.shared, watched)
        names = tuple(vars(watched).get("read", ()))
        if not OWN & set(names):
            self._known.setdefault(names, {})[tuple([getattr(turn, name) for name in names])] = found
        return found


def expected(rules: Rules, shared: Tree, turn: Turn) -> Expected:
    """What a client's upload of this turn has to have."""
    start, exact = received(rules, shared, {}, turn), True
    sent, products = {}, set()
    for part, rule in rules.items():
        trained, known = _trained(rule, start[part], turn)
        sent[part] = rule.send(Work(start[part], start[part], trained), turn)
        exact = exact and known
        stays = (trained - set(sent[part])) & rule.adapter.outputs
        if not isinstance(rule.adapter, Dense) and (not stays or set(sent[part]) & rule.adapter.outputs):
            products.add(part)
    forms = {part: _form({leaf: layer[leaf] for leaf in sorted(layer)}) for part, layer in sent.items()}
    return Expected(start, sent, exact, frozenset(products), forms)


def checked(rules: Rules, turn: Turn, sent: Tree, wanted: Expected) -> Checked:
    """The upload with every part of the model. ``RefusedError`` where it has not the leaves that this client's turn
    sends, with their shapes, or other than plain numbers; whether these are finite, ``sizes`` tells."""
    if {part: _form(layer) for part, layer in sent.items()} == wanted.forms:  # nearly all: nothing is to be converted
        plain = {part: {leaf: sent[part][leaf] for leaf in form} for part, form in wanted.forms.items()}
        return Checked(plain, wanted.start, wanted.products)
    strange = sorted(sent.keys() - rules.keys())
    if strange:
        raise RefusedError(f"it sent the part {strange[0]!r}, which the model does not have")
    tree, start = {}, {}
    for part, rule in rules.items():
        layer = sent.get(part, {})
        rank = _rank(part, rule, wanted.sent[part], layer, wanted.exact, turn.rank)
        whole = wanted.start[part]
        start[part] = whole if rank is None else rule.adapter.leading(whole, rank)
        tree[part] = {leaf: layer[leaf].to(wanted.sent[part][leaf].dtype) for leaf in sorted(layer)}
    return Checked(tree, start, wanted.products)


def finite(part: str, layer: Layer) -> None:
    """``RefusedError`` where a leaf holds what is no number, or one that no training leads to."""
    for leaf, x in layer.items():
        if not bool((x.float().abs() <= LARGEST).all()):
            raise RefusedError(f"it sent {leaf!r} of {part!r} with values that are no finite numbers, or no plain ones")


def _form(layer: Layer) -> Form:
    return {leaf: (x.shape, x.dtype) for leaf, x in layer.items()}


def _rank(part: str, rule: Method, needed: Layer, sent: Layer, exact: bool, rank: int) -> int | None:
    """Checks one layer; the rank where it is a smaller one than the turn's."""
    odd = sorted(sent.keys() - needed.keys()) or (sorted(needed.keys() - sent.keys()) if exact else [])
    if odd:
        what = "it did not send" if odd[0] in needed else "it sent"
        raise RefusedError(f"{what} the leaf {odd[0]!r} of {part!r}")
    for leaf, x in sent.items():
        if x.dtype not in (*PLAIN, needed[leaf].dtype):
            raise RefusedError(f"it sent {leaf!r} of {part!r} with values that are no finite numbers, or no plain ones")
    shapes = _shapes(sent)
    if shapes == _shapes({leaf: needed[leaf] for leaf in sent}):
        return None
    pruned = _pruned(rule, needed, shapes, rank)
    if pruned is None:
        wrong = next(leaf for leaf in sent if shapes[leaf] != tuple(needed[leaf].shape))
        raise RefusedError(
            f"it sent {wrong!r} of {part!r} with shape {shapes[wrong]}, not {tuple(needed[wrong].shape)}"
        )
    return pruned


def _shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    return {leaf: tuple(x.shape) for leaf, x in layer.items()}


def _pruned(rule: Method, needed: Layer, shapes: Mapping[str, tuple[int, ...]], rank: int) -> int | None:
    """The rank of a client that may differ in it and has sent a smaller one, the same in all its leaves."""
    smaller = range(1, rank) if rule.any_rank else ()
    return next((r for r in smaller if _shapes(rule.adapter.leading(needed, r)) == shapes), None)


class _GradientError(Exception):
    """The choice of what to train goes by the client's own rows: any leaf may come."""


def _trained(rule: Method, start: Layer, turn: Turn) -> tuple[frozenset[str], bool]:
    def unknown() -> Layer:
        raise _GradientError

    try:
        return rule.trains(start, turn, unknown), True
    except _GradientError:
        return rule.adapter.trainable, False
