"""The updates of the base that a run's model stands for, weight by weight, as all exports write them."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fedlora.linalg.factors import compact, total, truncate
from fedlora.linalg.geometry import distances
from fedlora.linalg.sums import Term
from fedlora.runs.folder import RunFolder
from fedlora.types import Factors, Tree

Updates = Mapping[str, Factors]  # part -> the difference of its weight from the pretrained one


class ExportUpdates(NamedTuple):
    """The updates of an export."""

    cut: Updates  # at most of the rank that was asked for
    about: dict[str, Any]  # ``client``, ``error`` of the truncation, and ``ranks``


def collect_updates(
    run: RunFolder, tree: Tree, parts: Iterable[str], client: int | None, rank: int | None
) -> ExportUpdates:
    """Return each adapted weight's update, the adapter's and the base updates, truncated to ``rank``."""
    whole = {part: _add_base_update(run, part, tree) for part in parts}
    cut = {part: truncate(f, rank) if rank and f.V.shape[-2] > rank else f for part, f in whole.items()}
    ranks = sorted({f.V.shape[-2] for f in cut.values()})
    return ExportUpdates(cut, {"client": client, "error": _truncation_error(whole, cut), "ranks": ranks})


def list_adapted_parts(run: RunFolder, tree: Tree) -> list[str]:
    """Return the parts of a tree that have adapters; the others are trained in full."""
    return [part for part, layer in tree.items() if run.config.method.adapter.trainable & set(layer)]


def _add_base_update(run: RunFolder, part: str, tree: Tree) -> Factors:
    update = run.adapter_of(part).delta(tree[part])
    both = [f for f in (update, run.base_updates.get(part)) if f is not None and bool(f.U.any())]
    return compact(total(both)) if both else update


def _truncation_error(whole: Updates, cut: Updates) -> float:
    """Return the error of truncation, relative to all updates together (Frobenius norm)."""
    pairs = [(Term(1.0, *whole[part]), Term(1.0, *cut[part])) for part in whole if cut[part] is not whole[part]]
    lost = sum((norm * away[0]) ** 2 for norm, away in (distances([f], [[c]]) for f, c in pairs))
    everything = sum(distances([Term(1.0, *f)], [])[0] ** 2 for f in whole.values())
    return float(lost / everything) ** 0.5 if everything else 0.0
