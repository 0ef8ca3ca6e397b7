"""The leaves, shapes and types that an upload must have; they are known before its client trains."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from fedlora.adapters import Dense
from fedlora.methods._base import Method
from fedlora.rounds import Rules, client_start
from fedlora.types import Layer, Tree, Turn, Work

PLAIN = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 65504.0  # float16's largest number; far beyond it, factorisations of sums overflow
Form = Mapping[str, tuple[torch.Size, torch.dtype]]  # shape and type of a layer's leaves


class RefusedError(ValueError):
    """A reply is left out; the message says why."""


@dataclass(frozen=True, eq=False)
class UploadSpec:
    """The leaves that a turn's upload must have, from what the method sends of an untrained start."""

    start: Tree  # every leaf that the client holds before training
    sent: Tree  # those that it sends
    exact: bool  # False if the choice depends on the client's rows; then it sends some of ``sent``
    products: frozenset[str]  # parts with ``ΔW`` known from the upload: no factor stays with the client
    forms: Mapping[str, Form]  # of ``sent``


class CheckedUpload(NamedTuple):
    """A valid upload: its leaves in the server's types, and the start that they were trained from."""

    tree: Tree
    start: Tree
    products: frozenset[str]


FIELDS = tuple(f.name for f in fields(Turn))
OWN = {"client", "seed"}  # fields by which no two turns of a round are alike


class _RecordingTurn(Turn):
    """A turn that records which of its fields are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in FIELDS:
            object.__getattribute__(self, "__dict__").setdefault("read", {})[name] = None
        return object.__getattribute__(self, name)


@dataclass
class UploadSpecs:
    """The specs of one round's uploads.

    Hooks are pure: if they read only the rank of a turn, the spec is the same for all clients of that rank, and is
    computed once.
    """

    rules: Rules
    shared: Tree
    _known: dict[tuple[str, ...], dict[tuple[Any, ...], UploadSpec]] = field(default_factory=dict, init=False)

    def of(self, turn: Turn) -> UploadSpec:
        """Return the spec of the upload of this turn."""
        for names, specs in self._known.items():
            if (spec := specs.get(tuple([getattr(turn, name) for name in names]))) is not None:
                return spec
        watched = _RecordingTurn(*(getattr(turn, name) for name in FIELDS))
        spec = build_upload_spec(self.rules, self.shared, watched)
        names = tuple(vars(watched).get("read", ()))
        if not OWN & set(names):
            self._known.setdefault(names, {})[tuple([getattr(turn, name) for name in names])] = spec
        return spec


def build_upload_spec(rules: Rules, shared: Tree, turn: Turn) -> UploadSpec:
    """Compute the spec of the upload of this turn."""
    start, exact = client_start(rules, shared, {}, turn), True
    sent, products = {}, set()
    for part, rule in rules.items():
        trained, known = _trained_leaves(rule, start[part], turn)
        sent[part] = rule.send(Work(start[part], start[part], trained), turn)
        exact = exact and known
        stays = (trained - set(sent[part])) & rule.adapter.outputs
        if not isinstance(rule.adapter, Dense) and (not stays or set(sent[part]) & rule.adapter.outputs):
            products.add(part)
    forms = {part: _form_of({leaf: layer[leaf] for leaf in sorted(layer)}) for part, layer in sent.items()}
    return UploadSpec(start, sent, exact, frozenset(products), forms)


def check_upload(rules: Rules, turn: Turn, sent: Tree, spec: UploadSpec) -> CheckedUpload:
    """Check the leaves, shapes and types of an upload, and return it with every part of the model.

    ``RefusedError`` if they are not those of the turn. ``update_norms`` checks that the numbers are finite.
    """
    if {part: _form_of(layer) for part, layer in sent.items()} == spec.forms:  # nearly always: nothing to convert
        plain = {part: {leaf: sent[part][leaf] for leaf in form} for part, form in spec.forms.items()}
        return CheckedUpload(plain, spec.start, spec.products)
    if strange := sent.keys() - rules.keys():
        raise RefusedError(f"it sent the part {min(strange)!r}, which the model does not have")
    tree, start = {}, {}
    for part, rule in rules.items():
        layer, whole = sent.get(part, {}), spec.start[part]
        rank = _check_layer(part, rule, spec.sent[part], layer, spec.exact, turn.rank)
        start[part] = whole if rank is None else rule.adapter.leading(whole, rank)
        tree[part] = {leaf: layer[leaf].to(spec.sent[part][leaf].dtype) for leaf in sorted(layer)}
    return CheckedUpload(tree, start, spec.products)


def check_finite(part: str, layer: Layer) -> None:
    """``RefusedError`` if a leaf holds a number that is not finite or too large for training to reach."""
    for leaf, x in layer.items():
        if not bool((x.float().abs() <= LARGEST).all()):
            raise RefusedError(f"it sent {leaf!r} of {part!r} with values that are no finite numbers, or no plain ones")


def _form_of(layer: Layer) -> Form:
    return {leaf: (x.shape, x.dtype) for leaf, x in layer.items()}


def _check_layer(part: str, rule: Method, needed: Layer, sent: Layer, exact: bool, rank: int) -> int | None:
    """Check one layer; return its rank if the client pruned it, which some methods allow."""
    odd = sorted(sent.keys() - needed.keys()) or (sorted(needed.keys() - sent.keys()) if exact else [])
    if odd:
        verb = "it did not send" if odd[0] in needed else "it sent"
        raise RefusedError(f"{verb} the leaf {odd[0]!r} of {part!r}")
    for leaf, x in sent.items():
        if x.dtype not in (*PLAIN, needed[leaf].dtype):
            raise RefusedError(f"it sent {leaf!r} of {part!r} with values that are no finite numbers, or no plain ones")
    shapes = _shapes(sent)
    wrong = next((leaf for leaf in sent if shapes[leaf] != tuple(needed[leaf].shape)), None)
    if wrong is None:
        return None
    for smaller in range(1, rank) if rule.any_rank else ():
        if _shapes(rule.adapter.leading(needed, smaller)) == shapes:
            return smaller
    raise RefusedError(f"it sent {wrong!r} of {part!r} with shape {shapes[wrong]}, not {tuple(needed[wrong].shape)}")


def _shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    return {leaf: tuple(x.shape) for leaf, x in layer.items()}


class _GradientError(Exception):
    """The choice of the leaves to train depends on the client's rows, so any leaf may be sent."""


def _trained_leaves(rule: Method, start: Layer, turn: Turn) -> tuple[frozenset[str], bool]:
    def unknown() -> Layer:
        raise _GradientError

    try:
        return rule.trains(start, turn, unknown), True
    except _GradientError:
        return rule.adapter.trainable, False
