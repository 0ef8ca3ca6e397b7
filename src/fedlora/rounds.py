"""A round, cut where the network is: what a client does, and what the server does.

``rules`` says which method looks after which part of the model: the run's method for the
adapted weights, and FedIT or Local for the parts trained in full.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedlora.methods._base import Method, pick
from fedlora.types import Factors, Layer, Outcome, Tree, Turn, Upload, Work

Rules = Mapping[str, Method]
SMALL = 2**17  # numbers; weights are stacked up to this size together: for larger ones, copies cost more than calls


class Received(NamedTuple):
    """One client's upload as it reached the server."""

    turn: Turn
    examples: int  # rows the client trained on: its weight, where the method weights by examples
    tree: Tree
    factor: float = 1.0  # of its weight, as a robust rule has it


class Served(NamedTuple):
    """What the server makes of a round."""

    shared: Tree
    base_updates: Mapping[str, tuple[Factors, ...]]  # only the parts that fold something
    notes: Mapping[str, Mapping[str, float]]  # part -> the method's own figures


@runtime_checkable
class Trainer(Protocol):
    """Local training, as the rest of the library sees it."""

    def gradient(self, start: Tree) -> Tree: ...
    def fit(self, start: Tree, trained: Mapping[str, frozenset[str]], rules: Rules) -> Tree: ...


def client_turn(rules: Rules, shared: Tree, kept: Tree, turn: Turn, trainer: Trainer) -> tuple[Tree, Tree]:
    """Receive, train, send: returns what goes up and what stays."""
    work = client_work(rules, client_start(rules, shared, kept, turn), turn, trainer)
    sent = {part: rule.send(work[part], turn) for part, rule in rules.items()}
    stays = {part: rule.keep(work[part], sent[part], turn) for part, rule in rules.items()}
    return sent, stays


def client_work(rules: Rules, start: Tree, turn: Turn, trainer: Trainer) -> dict[str, Work]:
    """Trains, from ``start``, what the rules train this turn."""
    gradient = _once(lambda: trainer.gradient(start))
    trained = {p: rule.trains(start[p], turn, lambda p=p: gradient()[p]) for p, rule in rules.items()}
    end = trainer.fit(start, trained, rules)
    return {part: Work(start[part], end[part], trained[part]) for part in rules}


def client_start(rules: Rules, shared: Tree, kept: Tree, turn: Turn) -> Tree:
    """What a client holds before training: also the model it is evaluated with."""
    return {part: public_leaves(rule.receive(shared[part], kept.get(part, {}), turn)) for part, rule in rules.items()}


def public_leaves(layer: Layer) -> Layer:
    """The leaves of the weight itself; names that begin with ``_`` are a party's own notes and never reach a model."""
    return {leaf: x for leaf, x in layer.items() if not leaf.startswith("_")}


def server_turn(rules: Rules, shared: Tree, uploads: Sequence[Received]) -> Served:
    """Combine. The clients' order has no influence, and parts of one shape go through a method in one call."""
    if not uploads:
        return Served(shared, {}, {})
    uploads = sorted(uploads, key=lambda upload: upload.turn.client)
    outcomes: dict[str, Outcome] = {}
    for rule in dict.fromkeys(rules.values()):
        outcomes |= _combined(rule, [part for part in rules if rules[part] == rule], shared, uploads)
    return Served(
        {part: outcomes[part].layer for part in rules},
        {part: outcomes[part].base_update for part in rules if outcomes[part].base_update},
        {part: {k: float(v) for k, v in outcomes[part].notes.items()} for part in rules if outcomes[part].notes},
    )


def shares(rule: Method, examples: Sequence[int]) -> list[float]:
    """Each client's weight in the cohort: by its rows, or equal; they sum to one."""
    if rule.weighting == "uniform":
        return [1 / len(examples)] * len(examples)
    if sum(examples) <= 0:
        raise ValueError(f"the clients of a round hold {sum(examples)} training rows; weights need at least one.")
    return [n / sum(examples) for n in examples]


def upload_weights(rule: Method, uploads: Sequence[Received]) -> list[float]:
    """The same of uploads, each with the factor that a robust rule gave it."""
    own = shares(rule, [upload.examples for upload in uploads])
    if all(upload.factor == 1.0 for upload in uploads):
        return own
    whole = sum(w * upload.factor for w, upload in zip(own, uploads))
    return [w * upload.factor / whole for w, upload in zip(own, uploads)]


def _combined(rule: Method, parts: list[str], shared: Tree, uploads: Sequence[Received]) -> dict[str, Outcome]:
    weights = upload_weights(rule, uploads)
    moving = {part: pick(shared[part], rule.adapter.trainable & set(shared[part])) for part in parts}
    groups = [
        some
        for group in group_by_shape(
            parts, lambda part: [moving[part], *(_form(upload.tree, part) for upload in uploads)]
        )
        for some in split_group(group, sum(x.numel() for x in moving[group[0]].values()))
    ]
    start = {group[0]: stack_layers([moving[part] for part in group]) for group in groups}
    arrived = {
        group[0]: [
            Upload(upload.turn, w, _stack(upload.tree, group)) for upload, w in zip(uploads, weights, strict=True)
        ]
        for group in groups
    }
    made = rule.combine_all(start, arrived)
    return {
        part: _row(made[group[0]], i, start[group[0]], shared[part]) for group in groups for i, part in enumerate(group)
    }


def group_by_shape(parts: Sequence[str], layers: Callable[[str], Sequence[Layer]]) -> list[list[str]]:
    """The parts in groups whose layers have the same leaves and shapes, so that they can be stacked."""
    groups: dict[object, list[str]] = {}
    for part in parts:
        # Sorted: a mapping from the wire has its leaves in another order, and a group's size shows in the last bits.
        form = tuple(tuple(sorted((leaf, tuple(x.shape)) for leaf, x in layer.items())) for layer in layers(part))
        groups.setdefault(form, []).append(part)
    return list(groups.values())


def _form(tree: Tree, part: str) -> Layer:
    """A layer's leaves and shapes; a tree that is kept elsewhere knows them without reading the leaves."""
    form: Callable[[str], Layer] = getattr(tree, "form", tree.__getitem__)
    return form(part)


def _stack(tree: Tree, group: Sequence[str]) -> Layer:
    return stack_layers([tree[part] for part in group]) if isinstance(tree, dict) else _Later(tree, group)


class _Later(Mapping[str, Tensor]):
    """A stack that is made when a leaf is asked for, of an upload that is kept elsewhere than in memory."""

    def __init__(self, tree: Tree, group: Sequence[str]):
        self.tree, self.group = tree, group

    def __iter__(self) -> Iterator[str]:
        return iter(_form(self.tree, self.group[0]))

    def __len__(self) -> int:
        return len(_form(self.tree, self.group[0]))

    def __contains__(self, leaf: object) -> bool:
        return leaf in _form(self.tree, self.group[0])

    def __getitem__(self, leaf: str) -> Tensor:
        return stack_layers([{leaf: self.tree[part][leaf]} for part in self.group])[leaf]


def split_group(group: list[str], numbers: int) -> list[list[str]]:
    """Parts of one shape, of so many ``numbers`` each, as many together as are stacked."""
    most = max(1, SMALL // max(1, numbers))
    return [group[i : i + most] for i in range(0, len(group), most)]


def stack_layers(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Leaves of several parts as one, with the part as the first dimension; no copies of a leaf common to all."""
    if len(layers) == 1:
        return {leaf: x[None] for leaf, x in layers[0].items()}
    return {
        leaf: x.expand(len(layers), *x.shape)
        if all(layer[leaf] is x for layer in layers)
        else torch.stack([layer[leaf] for layer in layers])
        for leaf, x in layers[0].items()
    }


def _row(outcome: Outcome, i: int, start: Layer, before: Layer) -> Outcome:
    """One part's outcome. A leaf the method passed on stays the same object: the channel need not send it again."""
    layer = {leaf: x[i].clone() for leaf, x in outcome.layer.items() if x is not start.get(leaf)}
    base_update = tuple(Factors(f.U[i], f.V[i]) for f in outcome.base_update)
    return Outcome({**before, **layer}, base_update, {name: x[i] for name, x in outcome.notes.items()})


def _once(make: Callable[[], Tree]) -> Callable[[], Tree]:
    """Calls ``make`` the first time it is needed, and not at all if it never is."""
    made: list[Tree] = []

    def get() -> Tree:
        if not made:
            made.append(make())
        return made[0]

    return get
