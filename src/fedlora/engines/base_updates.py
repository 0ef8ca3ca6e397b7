"""The base weights as a log: the pretrained weights plus every base update so far, for all clients alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedlora.linalg.factors import compact, total
from fedlora.types import Factors, Tree

BaseUpdate = Mapping[str, tuple[Factors, ...]]  # of one round: part -> low-rank terms that are added to its base weight


def base_update_to_tree(base_updates: BaseUpdate) -> dict[str, Mapping[str, Tensor]]:
    """One round's base update as a tree: part ``PART/i`` with the leaves ``U`` and ``V``."""
    return {f"{part}/{i}": f._asdict() for part, several in base_updates.items() for i, f in enumerate(several)}


def base_update_from_tree(tree: Tree) -> BaseUpdate:
    """The base update that ``folds_to_tree`` was given."""
    found: dict[str, dict[int, Factors]] = {}
    for key, factors in tree.items():
        part, _, place = key.rpartition("/")
        found.setdefault(part, {})[int(place)] = Factors(**factors)
    return {part: tuple(several[i] for i in sorted(several)) for part, several in found.items()}


@dataclass
class BaseUpdateLog:
    """Every base update of a run, in order.

    The first ``start`` of them, which all parties hold, are kept as one sum a weight, and the others one by one. A sum
    whose rank grows beyond ``min(m, n)`` is brought down to it, so neither the log nor the delivery to a returning
    client grows without end.
    """

    prefix: dict[str, Factors] = field(default_factory=dict)
    start: int = 0
    entries: list[BaseUpdate] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of base updates so far."""
        return self.start + len(self.entries)

    def append(self, base_updates: BaseUpdate) -> None:
        """Adds the base update of a round."""
        self.entries.append(base_updates)

    def missing_sum(self, seen: int) -> dict[str, tuple[Factors, ...]]:
        """Returns the sum of the updates after the first ``seen``, as one term a weight.

        Raises ``ValueError`` if ``seen`` is within those that are kept as one sum.
        """
        if 0 < seen < self.start:
            raise ValueError(
                f"the first {self.start} base updates are kept as one; a party with {seen} of them must start anew."
            )
        return _sum_updates([*([self._first()] if seen < self.start else []), *self._since(seen)])

    def missing(self, seen: int) -> list[BaseUpdate]:
        """Returns the updates after the first ``seen``, round by round, so that all bases have the same bits.

        If the sum of several is smaller than its terms, returns that sum instead, which is equal up to rounding.
        """
        summed, rounds = self.missing_sum(seen), [*([self._first()] if seen < self.start else []), *self._since(seen)]
        few = all(sum(_rank(r.get(part, ())) for r in rounds) == _rank(f) for part, f in summed.items())
        return rounds if few else [summed]

    def total(self) -> dict[str, Factors]:
        """Returns the sum of all updates: the base less the pretrained weights."""
        return {part: factors[0] for part, factors in self.missing_sum(0).items()}

    def settle(self, seen: int) -> None:
        """Keeps the first ``seen`` updates, which every party holds, as one sum."""
        if seen > self.start:
            first = _sum_updates([self._first(), *self.entries[: seen - self.start]])
            self.prefix = {part: factors[0] for part, factors in first.items()}
            self.entries = self.entries[seen - self.start :]
            self.start = seen

    def _first(self) -> BaseUpdate:
        return {part: (f,) for part, f in self.prefix.items()}

    def _since(self, seen: int) -> list[BaseUpdate]:
        return self.entries[max(0, seen - self.start) :]


def _rank(factors: Sequence[Factors]) -> int:
    return sum(f.V.shape[-2] for f in factors)


def _sum_updates(several: Sequence[BaseUpdate]) -> dict[str, tuple[Factors, ...]]:
    parts: dict[str, list[Factors]] = {}
    for base_updates in several:
        for part, factors in base_updates.items():
            parts.setdefault(part, []).extend(factors)
    return {part: (compact(total(factors)),) for part, factors in parts.items()}
