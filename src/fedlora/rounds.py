"""A round in two functions, ``client_turn`` and ``server_turn``; the network is between them.

``rules`` maps each part of the model to its method: the run's method for the adapted weights, and FedIT or Local for
the parts trained in full.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedlora.methods._base import Method, pick
from fedlora.types import Factors, Layer, Outcome, Tree, Turn, Upload, Work

Rules = Mapping[str, Method]
SMALL = 2**17  # values; weights are stacked up to this size: for larger stacks, copies cost more than calls


class Received(NamedTuple):
    """One client's upload, as received by the server."""

    turn: Turn
    examples: int  # number of training rows: the client's weight, if the method weights by examples
    tree: Tree
    factor: float = 1.0  # of its weight, set by a robust aggregator


class Served(NamedTuple):
    """The server's result of a round."""

    shared: Tree
    base_updates: Mapping[str, tuple[Factors, ...]]  # only of the parts that have any
    notes: Mapping[str, Mapping[str, float]]  # part -> the method's own figures


@runtime_checkable
class Trainer(Protocol):
    """The interface of local training."""

    def gradient(self, start: Tree) -> Tree: ...
    def fit(self, start: Tree, trained: Mapping[str, frozenset[str]], rules: Rules) -> Tree: ...


def client_turn(rules: Rules, shared: Tree, kept: Tree, turn: Turn, trainer: Trainer) -> tuple[Tree, Tree]:
    """Receive, train, send. Returns the upload and the leaves that stay with the client."""
    return finish_turn(rules, client_work(rules, client_start(rules, shared, kept, turn), turn, trainer), turn)


def client_work(rules: Rules, start: Tree, turn: Turn, trainer: Trainer) -> dict[str, Work]:
    """Train the leaves that the rules select, from ``start``."""
    trained = select_leaves_to_train(rules, start, turn, trainer.gradient)
    end = trainer.fit(start, trained, rules)
    return {part: Work(start[part], end[part], trained[part]) for part in rules}


def select_leaves_to_train(
    rules: Rules, start: Tree, turn: Turn, gradient: Callable[[Tree], Tree]
) -> dict[str, frozenset[str]]:
    """Return the leaves to train in a turn. ``gradient(start)`` is computed once, and only if a rule needs it."""
    once = cache(lambda: gradient(start))
    return {part: rule.trains(start[part], turn, lambda part=part: once()[part]) for part, rule in rules.items()}


def finish_turn(rules: Rules, work: Mapping[str, Work], turn: Turn) -> tuple[Tree, Tree]:
    """Return the upload and the leaves that stay with the client, after training."""
    sent = {part: rule.send(work[part], turn) for part, rule in rules.items()}
    stays = {part: rule.keep(work[part], sent[part], turn) for part, rule in rules.items()}
    return sent, stays


def client_start(rules: Rules, shared: Tree, kept: Tree, turn: Turn) -> Tree:
    """Return the leaves of a client before training. The client is also evaluated with them."""
    return {part: public_leaves(rule.receive(shared[part], kept.get(part, {}), turn)) for part, rule in rules.items()}


def public_leaves(layer: Layer) -> Layer:
    """Return the leaves of the weight itself. Other names begin with ``_`` and are a client's own notes."""
    return {leaf: x for leaf, x in layer.items() if not leaf.startswith("_")}


def server_turn(rules: Rules, shared: Tree, uploads: Sequence[Received]) -> Served:
    """Combine the uploads. The order of clients has no effect. Parts of one shape are combined in one call."""
    if not uploads:
        return Served(shared, {}, {})
    uploads = sorted(uploads, key=lambda upload: upload.turn.client)
    outcomes: dict[str, Outcome] = {}
    for rule in dict.fromkeys(rules.values()):
        outcomes |= _combine(rule, [part for part in rules if rules[part] == rule], shared, uploads)
    return Served(
        {part: outcomes[part].layer for part in rules},
        {part: outcomes[part].base_update for part in rules if outcomes[part].base_update},
        {part: {k: float(v) for k, v in outcomes[part].notes.items()} for part in rules if outcomes[part].notes},
    )


def shares(rule: Method, examples: Sequence[int]) -> list[float]:
    """Return each client's weight in the cohort, by rows or equal; the weights sum to one."""
    if rule.weighting == "uniform":
        return [1 / len(examples)] * len(examples)
    if sum(examples) <= 0:
        raise ValueError(f"the clients of a round hold {sum(examples)} training rows; weights need at least one.")
    return [n / sum(examples) for n in examples]


def upload_weights(rule: Method, uploads: Sequence[Received]) -> list[float]:
    """Return the weights of uploads, including the factors of a robust aggregator."""
    weights = shares(rule, [upload.examples for upload in uploads])
    if all(upload.factor == 1.0 for upload in uploads):
        return weights
    total = sum(w * upload.factor for w, upload in zip(weights, uploads))
    return [w * upload.factor / total for w, upload in zip(weights, uploads)]


def _combine(rule: Method, parts: list[str], shared: Tree, uploads: Sequence[Received]) -> dict[str, Outcome]:
    weights = upload_weights(rule, uploads)
    moving = {part: pick(shared[part], rule.adapter.trainable & set(shared[part])) for part in parts}
    groups = [
        batch
        for group in group_by_shape(
            parts, lambda part: [moving[part], *(_form(upload.tree, part) for upload in uploads)]
        )
        for batch in split_group(group, sum(x.numel() for x in moving[group[0]].values()))
    ]
    start = {group[0]: stack_layers([moving[part] for part in group]) for group in groups}
    stacks = {
        group[0]: [Upload(u.turn, w, _stack(u.tree, group)) for u, w in zip(uploads, weights, strict=True)]
        for group in groups
    }
    outcomes = rule.combine_all(start, stacks)
    return {
        part: _select(outcomes[group[0]], i, start[group[0]], shared[part])
        for group in groups
        for i, part in enumerate(group)
    }


def group_by_shape(parts: Sequence[str], layers: Callable[[str], Sequence[Layer]]) -> list[list[str]]:
    """Group the parts whose layers have the same leaves and shapes, so that they can be stacked."""
    groups: dict[object, list[str]] = {}
    for part in parts:
        # Sorted: a received layer may have another order of leaves, and the size of a group affects the last bits.
        form = tuple(tuple(sorted((leaf, tuple(x.shape)) for leaf, x in layer.items())) for layer in layers(part))
        groups.setdefault(form, []).append(part)
    return list(groups.values())


def _form(tree: Tree, part: str) -> Layer:
    """Return a layer for its names and shapes. An offloaded tree has them without reading the values."""
    form: Callable[[str], Layer] = getattr(tree, "form", tree.__getitem__)
    return form(part)


def _stack(tree: Tree, group: Sequence[str]) -> Layer:
    return stack_layers([tree[part] for part in group]) if isinstance(tree, dict) else _LazyStack(tree, group)


class _LazyStack(Mapping[str, Tensor]):
    """The stacked layers of an offloaded upload; each leaf is stacked when it is accessed."""

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
    """Split a group of parts with ``numbers`` values each into batches of at most ``SMALL`` values."""
    size = max(1, SMALL // max(1, numbers))
    return [group[i : i + size] for i in range(0, len(group), size)]


def stack_layers(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Stack the leaves of several parts along a new first dimension. A leaf common to all parts is not copied."""
    if len(layers) == 1:
        return {leaf: x[None] for leaf, x in layers[0].items()}
    return {
        leaf: x.expand(len(layers), *x.shape)
        if all(layer[leaf] is x for layer in layers)
        else torch.stack([layer[leaf] for layer in layers])
        for leaf, x in layers[0].items()
    }


def _select(outcome: Outcome, i: int, start: Layer, before: Layer) -> Outcome:
    """Return one part's outcome. An unchanged leaf stays the same object, so that it is not sent again."""
    layer = {leaf: x[i].clone() for leaf, x in outcome.layer.items() if x is not start.get(leaf)}
    base_update = tuple(Factors(f.U[i], f.V[i]) for f in outcome.base_update)
    return Outcome({**before, **layer}, base_update, {name: x[i] for name, x in outcome.notes.items()})
