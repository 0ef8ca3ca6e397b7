"""The base as a log: pretrained weights plus every update folded so far, so that nobody's absence changes anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedlora.linalg.factors import compacted, total
from fedlora.types import Factors, Tree

Folds = Mapping[str, tuple[Factors, ...]]  # of one round: part -> what is added to its base weight


def folds_to_tree(folds: Folds) -> dict[str, Mapping[str, Tensor]]:
    """One round's folds as a tree: part ``PART/i`` with the leaves ``U`` and ``V``."""
    return {f"{part}/{i}": f._asdict() for part, several in folds.items() for i, f in enumerate(several)}


def folds_from_tree(tree: Tree) -> Folds:
    """The folds that ``folds_to_tree`` was given."""
    found: dict[str, dict[int, Factors]] = {}
    for key, factors in tree.items():
        part, _, place = key.rpartition("/")
        found.setdefault(part, {})[int(place)] = Factors(**factors)
    return {part: tuple(several[i] for i in sorted(several)) for part, several in found.items()}


@dataclass
class FoldLog:
    """Every fold of a run, in order.

    The first ``start`` of them, which all parties hold, are kept as one sum a weight; the others one by one. Sums are
    brought to rank ``min(m, n)`` where they grow beyond it, so neither the log nor what a returning client is sent
    grows without end.
    """

    prefix: dict[str, Factors] = field(default_factory=dict)
    start: int = 0
    entries: list[Folds] = field(default_factory=list)

    def __len__(self) -> int:
        """How many folds there have been."""
        return self.start + len(self.entries)

    def append(self, folds: Folds) -> None:
        """One more fold."""
        self.entries.append(folds)

    def missed(self, seen: int) -> dict[str, tuple[Factors, ...]]:
        """What a party lacks that holds the first ``seen`` folds: one sum a weight where there are several.

        Raises ``ValueError`` where it holds some but not all of those that are kept as one sum.
        """
        if 0 < seen < self.start:
            raise ValueError(
                f"the first {self.start} folds are kept as one; a party with {seen} of them must start anew."
            )
        return _summed([*([self._first()] if seen < self.start else []), *self._since(seen)])

    def catching_up(self, seen: int) -> list[Folds]:
        """What a party lacks, in the order to fold it: round by round, so that its base ends with everybody's bits.

        Where factors add up to more than their sum, that is one sum instead, equal up to rounding.
        """
        summed, rounds = self.missed(seen), [*([self._first()] if seen < self.start else []), *self._since(seen)]
        few = all(sum(_rank(r.get(part, ())) for r in rounds) == _rank(f) for part, f in summed.items())
        return rounds if few else [summed]

    def everything(self) -> dict[str, Factors]:
        """The sum of all folds: what separates the base from the pretrained weights."""
        return {part: factors[0] for part, factors in self.missed(0).items()}

    def settle(self, seen: int) -> None:
        """Keeps the first ``seen`` folds as one sum; every party holds them."""
        if seen > self.start:
            first = _summed([self._first(), *self.entries[: seen - self.start]])
            self.prefix = {part: factors[0] for part, factors in first.items()}
            self.entries = self.entries[seen - self.start :]
            self.start = seen

    def _first(self) -> Folds:
        return {part: (f,) for part, f in self.prefix.items()}

    def _since(self, seen: int) -> list[Folds]:
        return self.entries[max(0, seen - self.start) :]


def _rank(factors: Sequence[Factors]) -> int:
    return sum(f.V.shape[-2] for f in factors)


def _summed(several: Sequence[Folds]) -> dict[str, tuple[Factors, ...]]:
    parts: dict[str, list[Factors]] = {}
    for folds in several:
        for part, factors in folds.items():
            parts.setdefault(part, []).extend(factors)
    return {part: (compacted(total(factors)),) for part, factors in parts.items()}
