"""The log of base updates: the base weights are the pretrained weights plus every update so far, for all clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedlora.linalg.factors import compact, total
from fedlora.types import Factors, Tree

RECENT = 16  # updates that ``keep_recent`` keeps one by one
BaseUpdate = Mapping[str, tuple[Factors, ...]]  # of one round: part -> low-rank terms that are added to its base weight


def base_update_to_tree(base_updates: BaseUpdate) -> dict[str, Mapping[str, Tensor]]:
    """Convert one round's base update to a tree with the parts ``PART/i`` and the leaves ``U`` and ``V``."""
    return {f"{part}/{i}": f._asdict() for part, terms in base_updates.items() for i, f in enumerate(terms)}


def base_update_from_tree(tree: Tree) -> BaseUpdate:
    """Invert ``base_update_to_tree``."""
    terms: dict[str, dict[int, Factors]] = {}
    for key, factors in tree.items():
        part, _, number = key.rpartition("/")
        terms.setdefault(part, {})[int(number)] = Factors(**factors)
    return {part: tuple(by_number[i] for i in sorted(by_number)) for part, by_number in terms.items()}


@dataclass
class BaseUpdateLog:
    """Every base update of a run, in order.

    The first ``start`` of them, which all clients have, are kept as one sum a weight, and the others one by one. The
    rank of a sum is at most ``min(m, n)``, so neither the log nor the delivery to a returning client grows without end.
    """

    prefix: dict[str, Factors] = field(default_factory=dict)
    start: int = 0
    entries: list[BaseUpdate] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of base updates so far."""
        return self.start + len(self.entries)

    def append(self, base_updates: BaseUpdate) -> None:
        """Add the base update of a round."""
        self.entries.append(base_updates)

    def missing_sum(self, seen: int) -> dict[str, tuple[Factors, ...]]:
        """Return the sum of the updates after the first ``seen``, as one term a weight.

        Raises ``ValueError`` if ``seen`` is within those that are kept as one sum.
        """
        if 0 < seen < self.start:
            raise ValueError(
                f"the first {self.start} base updates are kept as one; a client with {seen} of them must start anew."
            )
        return _sum_updates(self._since(seen))

    def missing(self, seen: int) -> list[BaseUpdate]:
        """Return the updates after the first ``seen``, round by round, so that all bases have the same bits.

        If the sum of several is smaller than its terms, returns that sum instead, which is equal up to rounding.
        """
        summed, rounds = self.missing_sum(seen), self._since(seen)
        is_small = all(sum(_rank(r.get(part, ())) for r in rounds) == _rank(f) for part, f in summed.items())
        return rounds if is_small else [summed]

    def total(self) -> dict[str, Factors]:
        """Return the sum of all updates: the base less the pretrained weights."""
        return {part: factors[0] for part, factors in self.missing_sum(0).items()}

    def settle(self, seen: int) -> None:
        """Keep the first ``seen`` updates, which every client has, as one sum."""
        if seen > self.start:
            kept, everything = self._since(seen), self._since(0)
            first = _sum_updates(everything[: len(everything) - len(kept)])
            self.prefix, self.entries, self.start = {part: f[0] for part, f in first.items()}, kept, seen

    def keep_recent(self) -> None:
        """Keep all but the last updates as one sum, whatever clients have: one that lacks more is sent all of them."""
        self.settle(max(self.start, len(self) - RECENT))

    def _since(self, seen: int) -> list[BaseUpdate]:
        """Return the updates after the first ``seen``; those that are kept as one sum count as one update."""
        prefix = [{part: (f,) for part, f in self.prefix.items()}] if seen < self.start else []
        return [*prefix, *self.entries[max(0, seen - self.start) :]]


def _rank(factors: Sequence[Factors]) -> int:
    return sum(f.V.shape[-2] for f in factors)


def _sum_updates(updates: Sequence[BaseUpdate]) -> dict[str, tuple[Factors, ...]]:
    terms: dict[str, list[Factors]] = {}
    for update in updates:
        for part, factors in update.items():
            terms.setdefault(part, []).extend(factors)
    return {part: (compact(total(factors)),) for part, factors in terms.items()}
