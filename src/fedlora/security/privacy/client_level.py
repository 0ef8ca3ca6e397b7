"""Client-level privacy: clipped changes, and noise on the sum of a round or on every upload.

McMahan, Ramage, Talwar, Zhang. Learning Differentially Private Recurrent Language Models. ICLR 2018.
https://arxiv.org/abs/1710.06963
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedlora.rounds import Received, Rules, Served
from fedlora.security.privacy.noise import Stream
from fedlora.security.validation.expected import build_upload_spec
from fedlora.types import Tree, Turn

MARGIN = 1 - 2.0**-18  # of the bound, so that a clipped change stays within it after rounding to float32
# Changes are float64: the difference of two float32 numbers is exact in it, and so is a bounded sum of many.


def starting_leaves(rules: Rules, shared: Tree, turn: Turn) -> dict[str, dict[str, Tensor]]:
    """Return the leaves that a client sends in a turn, before its training; its change is measured from them.

    They depend on the seed and on the served tree, and on no client's rows.
    """
    spec = build_upload_spec(rules, shared, turn)
    if not spec.exact:
        raise ValueError(
            "this method chooses the leaves to train by a gradient on the client's rows, which no noise covers; with "
            "privacy, let it choose by another score (for Ravan, method.score)."
        )
    return {part: {leaf: spec.start[part][leaf] for leaf in sorted(layer)} for part, layer in spec.sent.items()}


def iterate_leaves(tree: Tree) -> Iterator[tuple[str, str, Tensor]]:
    """Iterate over part, leaf and tensor in sorted order."""
    for part in sorted(tree):
        for leaf in sorted(tree[part]):
            yield part, leaf, tree[part][leaf]


def clip_factor(norm: float, clip: float) -> float:
    """Return the factor that clips a change of this norm to at most ``clip``; 0 if the norm is not finite."""
    if not math.isfinite(norm):
        return 0.0
    return min(1.0, clip * MARGIN / norm) if norm > 0 else 1.0


def clip_change(start: Tree, sent: Tree, clip: float) -> dict[tuple[str, str], Tensor]:
    """Clip the change of the upload to an L2 norm of at most ``clip`` over all leaves together, float64.

    ``ValueError`` if the leaves or shapes are not those of the turn: their choice would reveal something of the rows.
    """
    changes = {}
    for part, leaf, x in iterate_leaves(start):
        end = sent.get(part, {}).get(leaf)
        if end is None or end.shape != x.shape:
            raise ValueError(
                f"{leaf!r} of {part!r} was not sent, or with another shape; with privacy every client sends the same."
            )
        changes[part, leaf] = end.double() - x.double()
    by = clip_factor(math.sqrt(sum(float(x.square().sum()) for x in changes.values())), clip)
    return {key: x * by if by else torch.zeros_like(x) for key, x in changes.items()}


def add_noise(start: Tree, changes: Mapping[tuple[str, str], Tensor], std: float, by: float, draw: Callable) -> Tree:
    """Return ``start + (changes + std · noise) / by``, as float32 leaves; summed in float64 and rounded once."""
    tree: dict[str, dict[str, Tensor]] = {part: {} for part in start}
    for part, leaf, x in iterate_leaves(start):
        noise = draw(x.shape, part, leaf).to(x.device) if std else 0.0
        tree[part][leaf] = (x.double() + (changes[part, leaf] + std * noise) / by).to(x.dtype)
    return tree


def protect(rules: Rules, shared: Tree, turn: Turn, sent: Tree, clip: float, std: float, stream: Stream) -> Tree:
    """Return a client's protected upload: the served leaves plus its clipped change and noise of ``std``."""
    start = starting_leaves(rules, shared, turn)
    changes = clip_change(start, sent, clip)
    return add_noise(start, changes, std, 1.0, lambda shape, *leaf: stream.normal(shape, "share", turn.round, *leaf))


def private_turn(
    rules: Rules, shared: Tree, turn: Turn, uploads: Sequence[Received], clip: float, std: float, expected: float,
    stream: Stream,
) -> Served:  # fmt: skip
    """Compute the server's result of a round: ``shared + (Σ_k clip(x_k − shared) + N(0, std²)) / expected``.

    ``expected`` is the expected size of the cohort, known before the cohort is drawn, so a client more or less
    changes only the sum, by ``clip``. Noise is also added without any upload. ``turn`` is any client's.
    """
    start = starting_leaves(rules, shared, turn)
    sums = {(part, leaf): torch.zeros_like(x, dtype=torch.float64) for part, leaf, x in iterate_leaves(start)}
    for upload in sorted(uploads, key=lambda upload: upload.turn.client):
        for key, x in clip_change(start, upload.tree, clip).items():
            sums[key] = sums[key] + x.to(sums[key].device)
    noisy = add_noise(start, sums, std, expected, lambda shape, *leaf: stream.normal(shape, "noise", turn.round, *leaf))
    return Served({part: {**layer, **noisy[part]} for part, layer in shared.items()}, {}, {})
