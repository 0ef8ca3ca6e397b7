"""The client level: an upload as a bounded change, and noise on the sum of a round or on every upload.

McMahan, Ramage, Talwar, Zhang. Learning Differentially Private Recurrent Language Models. ICLR 2018.
https://arxiv.org/abs/1710.06963
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedlora.rounds import Received, Rules, Served, received
from fedlora.security.privacy.noise import Stream
from fedlora.types import Layer, Tree, Turn, Work

SHORT = 1 - 2.0**-18  # of the bound: what rounding a clipped change to float32 may add does not take it beyond
# Changes are float64: the difference of two float32 numbers is exact in it, and so is a bounded sum of many.


def served_to(rules: Rules, shared: Tree, turn: Turn) -> dict[str, dict[str, Tensor]]:
    """The leaves that a client sends in a turn, as they were before its training: what its change is measured from.

    They depend on the seed and on what was served, and on no client's rows.
    """
    start = received(rules, shared, {}, turn)
    found: dict[str, dict[str, Tensor]] = {}
    for part, rule in rules.items():
        trained = rule.trains(start[part], turn, _untold)
        sent = rule.send(Work(start[part], start[part], trained), turn)
        found[part] = {leaf: start[part][leaf] for leaf in sorted(sent)}
    return found


def _untold() -> Layer:
    raise ValueError(
        "what this method trains goes by a gradient on the client's rows, which no noise covers; with privacy, "
        "let it choose by something else (for Ravan, method.score)."
    )


def leaves(tree: Tree) -> Iterator[tuple[str, str, Tensor]]:
    """Part, leaf and tensor, in one order for all."""
    for part in sorted(tree):
        for leaf in sorted(tree[part]):
            yield part, leaf, tree[part][leaf]


def change(start: Tree, sent: Tree) -> dict[tuple[str, str], Tensor]:
    """What training did to every leaf that is sent, float64.

    ``ValueError`` where the leaves or shapes are not those of the turn: their choice would tell of the rows.
    """
    found = {}
    for part, leaf, x in leaves(start):
        own = sent.get(part, {}).get(leaf)
        if own is None or own.shape != x.shape:
            raise ValueError(
                f"{leaf!r} of {part!r} was not sent, or with another shape; with privacy every client sends the same."
            )
        found[part, leaf] = own.double() - x.double()
    return found


def factor(norm: float, clip: float) -> float:
    """What a change of that norm is multiplied by to have norm ``clip`` at most; 0 where it is no number."""
    if not math.isfinite(norm):
        return 0.0
    return min(1.0, clip * SHORT / norm) if norm > 0 else 1.0


def clipped(start: Tree, sent: Tree, clip: float) -> dict[tuple[str, str], Tensor]:
    """The change with an L2 norm of at most ``clip`` over all leaves together, float64."""
    found = change(start, sent)
    by = factor(math.sqrt(sum(float(x.square().sum()) for x in found.values())), clip)
    return {key: x * by if by else torch.zeros_like(x) for key, x in found.items()}


def noised(start: Tree, changes: Mapping[tuple[str, str], Tensor], std: float, by: float, draw: Callable) -> Tree:
    """``start + (changes + std · noise) / by``, as float32 leaves; the sum is made in float64 and rounded once."""
    tree: dict[str, dict[str, Tensor]] = {part: {} for part in start}
    for part, leaf, x in leaves(start):
        noise = draw(x.shape, part, leaf).to(x.device) if std else 0.0
        tree[part][leaf] = (x.double() + (changes[part, leaf] + std * noise) / by).to(x.dtype)
    return tree


def protected(rules: Rules, shared: Tree, turn: Turn, sent: Tree, clip: float, std: float, stream: Stream) -> Tree:
    """What leaves a client instead of ``sent``: what it was served, with its clipped change and noise of ``std``."""
    start = served_to(rules, shared, turn)
    found = clipped(start, sent, clip)
    return noised(start, found, std, 1.0, lambda shape, *leaf: stream.normal(shape, "share", turn.round, *leaf))


def private_turn(
    rules: Rules, shared: Tree, turn: Turn, uploads: Sequence[Received], clip: float, std: float, expected: float,
    stream: Stream,
) -> Served:  # fmt: skip
    """What the server makes of a round: ``shared + (Σ_k clip(x_k − shared) + N(0, std²)) / expected``.

    ``expected`` is the size of a cohort as it is known before the cohort is drawn, so one client more or less changes
    the sum by ``clip`` and nothing else; without any upload there is noise all the same. ``turn`` is any client's.
    """
    start = served_to(rules, shared, turn)
    sums = {(part, leaf): torch.zeros_like(x, dtype=torch.float64) for part, leaf, x in leaves(start)}
    for upload in sorted(uploads, key=lambda upload: upload.turn.client):
        for key, x in clipped(start, upload.tree, clip).items():
            sums[key] = sums[key] + x.to(sums[key].device)
    made = noised(start, sums, std, expected, lambda shape, *leaf: stream.normal(shape, "noise", turn.round, *leaf))
    return Served({part: {**layer, **made[part]} for part, layer in shared.items()}, {}, {})
