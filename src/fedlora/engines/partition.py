"""Partitioners: they divide the rows among the clients, through flwr-datasets."""

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlora.registry import Registry
from fedlora.seeds import derive_seed
from fedlora.tasks._base import Data, Examples

LISTED = 5  # values that a note names


@dataclass(frozen=True)
class Partitioner(ABC):
    """One partitioner of ``clients.partition``; its fields are the keys of the table beside ``name``.

    A partitioner of another package is a frozen dataclass that defines ``rows``. Equal arguments must give equal rows,
    on every machine: draw from ``seed`` only.
    """

    own: ClassVar[bool] = False  # whether every client has its own rows, so that nothing is divided
    hint: ClassVar[str] = "lower clients.count"  # advice if the rows cannot be divided

    @abstractmethod
    def rows(self, examples: Examples, count: int, seed: int) -> list[Tensor]:
        """Return the rows of clients 0 to ``count - 1``: sorted int64 row numbers of ``examples``, none twice.

        ``examples.partition_labels`` has each row's label. ``examples.groups`` has its value of the column in the field
        ``column``, if the partitioner has one. Test rows follow from the labels of the training rows.
        """

    def describe_unused_rows(self, train: Examples, test: Examples, count: int) -> str:
        """Describe the rows that no client gets; empty if all are used."""
        return ""

    def __str__(self) -> str:
        name = PARTITIONERS.name_of(type(self))
        return ", ".join([repr(name), *(f"{key} = {value}" for key, value in asdict(self).items())])


@dataclass(frozen=True)
class FlowerPartitioner(Partitioner):
    """A partitioner of flwr-datasets: it gives all rows to clients."""

    @abstractmethod
    def partitioner(self, flwr: Any, count: int, examples: Examples, seed: int) -> Any:
        """Build the flwr-datasets partitioner; ``flwr`` is ``flwr_datasets.partitioner``, imported on first use."""

    def rows(self, examples: Examples, count: int, seed: int) -> list[Tensor]:
        import datasets
        import flwr_datasets.partitioner as flwr

        # Shuffled first: the partitioners that cut by size cut in the order of the rows.
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
        places = examples.partition_labels.unique(return_inverse=True)[1]  # 0, 1, ... as the partitioners want them
        columns = {"row": order, "label": places[order].tolist()}
        if examples.groups is not None:
            columns["group"] = [examples.groups[i] for i in order]
        partitioner = self.partitioner(flwr, count, examples, seed % 2**32)
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about repeated draws; the result is checked here
                parts = [partitioner.load_partition(i)["row"] for i in range(count)]
        except ValueError as error:
            raise ValueError(f"the rows cannot be split by {self} over {count} clients; {self.hint}.") from error
        left = len(examples) - sum(len(part) for part in parts)
        if left:
            raise ValueError(f"splitting by {self} over {count} clients leaves {left} rows to nobody; {self.hint}.")
        return [torch.tensor(list(part), dtype=torch.int64).sort().values for part in parts]


@dataclass(frozen=True)
class Iid(FlowerPartitioner):
    """Equal shares at random."""

    def partitioner(self, flwr, count, examples, seed):
        return flwr.IidPartitioner(count)


@dataclass(frozen=True)
class _ByDirichlet(FlowerPartitioner):
    alpha: float = 0.5

    def __post_init__(self):
        if not self.alpha > 0:
            raise ValueError(f"clients.partition.alpha is {self.alpha}; a Dirichlet split needs a positive one.")


@dataclass(frozen=True)
class Dirichlet(_ByDirichlet):
    """Each label's rows go to the clients in proportions drawn from Dirichlet(alpha): small alpha, few labels each."""

    min_rows: int = 2  # draws are repeated until every client has so many
    hint = (
        "raise clients.partition.alpha, lower clients.partition.min_rows or clients.count, or use 'inner-dirichlet', "
        "which gives all clients the same number of rows"
    )

    def partitioner(self, flwr, count, examples, seed):
        _labels(self, examples)
        return flwr.DirichletPartitioner(count, "label", self.alpha, self.min_rows, False, True, seed)


@dataclass(frozen=True)
class InnerDirichlet(_ByDirichlet):
    """Equal shares, each client's mix of labels drawn from Dirichlet(alpha) (Acar et al. 2021): for few labels.

    If a label has run out, clients take rows of the others, in the proportions of their mixes.
    """

    hint = "raise clients.partition.alpha"

    def partitioner(self, flwr, count, examples, seed):
        _labels(self, examples)
        sizes = apportion([1.0] * count, len(examples))
        return flwr.InnerDirichletPartitioner(sizes, "label", float(self.alpha), True, seed)


@dataclass(frozen=True)
class Pathological(FlowerPartitioner):
    """Every client has rows of so many labels only."""

    labels_per_client: int = 2
    hint = (
        "every label needs a client and every client rows: change clients.partition.labels_per_client, or clients.count"
    )

    def __post_init__(self):
        if self.labels_per_client < 1:
            raise ValueError(f"clients.partition.labels_per_client is {self.labels_per_client}; it must be at least 1.")

    def partitioner(self, flwr, count, examples, seed):
        labels = _labels(self, examples)
        if self.labels_per_client > labels:
            raise ValueError(
                f"clients.partition.labels_per_client is {self.labels_per_client}, but there are {labels} labels."
            )
        # In turn: client k has labels k, k + 1, ..., so that every label has a client if possible.
        return flwr.PathologicalPartitioner(count, "label", self.labels_per_client, "deterministic", True, seed)


@dataclass(frozen=True)
class NaturalId(Partitioner):
    """The natural clients of the data: one for each value of a column, those with the most rows first."""

    column: str

    def rows(self, examples, count, seed):
        owners = self._values(examples)[:count]
        if len(owners) < count:
            raise ValueError(
                f"clients.count is {count}, but column {self.column!r} has only {len(owners)} values; "
                "lower clients.count."
            )
        groups = examples.groups or ()
        return [torch.tensor([i for i, g in enumerate(groups) if g == owner]) for owner in owners]

    def _values(self, examples: Examples) -> list[str]:
        """Return the column's values, those of the most rows first."""
        sizes = Counter(examples.groups or ())
        return sorted(sizes, key=lambda g: (-sizes[g], g))

    def describe_unused_rows(self, train, test, count):
        owners = self._values(train)
        known, sizes, tests = set(owners[:count]), Counter(train.groups or ()), Counter(test.groups or ())
        others = [*owners[count:], *sorted(tests.keys() - set(owners))]
        if not others:
            return ""
        rows, more = (sum(n for owner, n in part.items() if owner not in known) for part in (sizes, tests))
        of_tests = f" and {more} of {len(test)} test rows" if tests else ""
        names = ", ".join(f"{owner!r} ({sizes[owner]})" for owner in others[:LISTED])
        return (
            f"{len(others)} of the {len(known) + len(others)} values of column {self.column!r} have no client, and "
            f"their {rows} of {len(train)} training rows{of_tests} are unused: "
            f"{names}{', ...' if len(others) > LISTED else ''}; clients.count is {count}."
        )


@dataclass(frozen=True)
class Size(FlowerPartitioner):
    """Random rows in given proportions, a client each."""

    sizes: list[float]

    def __post_init__(self):
        if not self.sizes or min(self.sizes) <= 0:
            raise ValueError(f"clients.partition.sizes is {self.sizes}; it needs a positive number for each client.")

    def partitioner(self, flwr, count, examples, seed):
        if len(self.sizes) != count:
            raise ValueError(f"clients.partition.sizes has {len(self.sizes)} numbers, but clients.count is {count}.")
        counts = apportion(self.sizes, len(examples))
        if 0 in counts:
            raise ValueError(
                f"client {counts.index(0)} gets no row of {len(examples)} by clients.partition.sizes; raise its share."
            )
        return flwr.SizePartitioner(counts)


@dataclass(frozen=True)
class Own(Partitioner):
    """Every client has its own rows on its own machine, so nothing is divided."""

    own = True

    def rows(self, examples, count, seed):
        raise AssertionError("every client has its own rows")


@dataclass(frozen=True)
class Given(Partitioner):
    """Every client has the rows of its own dataset, in the order in which ``fedlora.run`` got these."""

    column: ClassVar[str] = "client"  # of the rows of Python objects: the number of a row's dataset

    def rows(self, examples, count, seed):
        groups = torch.tensor([int(group) for group in examples.groups or ()], dtype=torch.int64)
        sets = 1 + int(groups.max()) if len(groups) else 0
        if sets != count:
            raise ValueError(
                f"clients.count is {count}, and clients.partition is 'given' with {sets} datasets, one a client; "
                "leave clients.count out."
            )
        return [(groups == client).nonzero()[:, 0] for client in range(count)]


_CLASSES = {
    "iid": Iid, "dirichlet": Dirichlet, "inner-dirichlet": InnerDirichlet, "pathological": Pathological,
    "column": NaturalId, "size": Size, "own": Own, "given": Given,
}  # fmt: skip
PARTITIONERS = Registry(
    Partitioner, "partitioner", group="fedlora.partitioners",
    listed={name: f"{__name__}:{kind.__name__}" for name, kind in _CLASSES.items()},
)  # fmt: skip
names, load = PARTITIONERS.names, PARTITIONERS.load


def _labels(partitioner: Partitioner, examples: Examples) -> int:
    """Count the labels; ``ValueError`` if rows have none or one."""
    labels = len(examples.partition_labels.unique())
    if labels < 2:
        name = PARTITIONERS.name_of(type(partitioner))
        raise ValueError(
            f"clients.partition.name is {name!r}, which partitions by label, but all rows have the same; set "
            "task.label to a column of several values (in a dataset of your own: an integer 'label' or 'labels', or "
            "the second of two values), or split by 'iid', 'size' or 'column'."
        )
    return labels


def apportion(shares: Sequence[float], total: int, ranks: Sequence[int] | None = None) -> list[int]:
    """Return whole numbers in proportion to ``shares`` that sum to ``total`` (largest remainder).

    Of equal remainders the one of the lowest rank goes first; without ``ranks``, the first.
    """
    exact = [share * total / sum(shares) for share in shares]
    counts = [int(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i if ranks is None else ranks[i]))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def select_own_test_rows(data: Data, train: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the test rows of each client's own group; None if a split of the data does not name groups.

    Raises ``ValueError`` if a client has no test rows.
    """
    if data.train.groups is None or data.test.groups is None:
        return None
    owners = [data.train.groups[int(rows[0])] for rows in train]
    tests = [torch.tensor([i for i, g in enumerate(data.test.groups) if g == owner]) for owner in owners]
    for client, (owner, rows) in enumerate(zip(owners, tests)):
        if len(rows) == 0:
            raise ValueError(
                f"client {client} ({owner!r}) has no test rows; drop it, or leave the column out of the test split."
            )
    return tests


def draw_test_rows(data: Data, train: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Draw test rows for each client in the proportions of its training labels, from every test set."""
    sets = torch.zeros(len(data.test)) if data.test.sets is None else data.test.sets
    drawn = [_draw_test_rows(data, train, (sets == i).nonzero()[:, 0], seed) for i in sets.unique().tolist()]
    return [torch.cat(rows) for rows in zip(*drawn)]


def _draw_test_rows(data: Data, train: Sequence[Tensor], within: Tensor, seed: int) -> list[Tensor]:
    """Draw each client's test rows from the rows ``within``.

    A client's share is that of its training rows, or less if the scarcest label would run out: the distribution is
    kept, not the size. Two clients may have the same test row.
    """
    known, kinds = data.train.partition_labels, data.test.partition_labels[within]
    labels = 1 + int(max(known.max(), kinds.max()))
    available = torch.bincount(kinds, minlength=labels)
    pools = [within[kinds == label] for label in range(labels)]
    train_rows = sum(len(rows) for rows in train)
    tests = []
    for client, rows in enumerate(train):
        counts = torch.bincount(known[rows], minlength=labels) * (available > 0)
        if counts.sum() == 0:
            raise ValueError(
                f"client {client} has only labels that the test split lacks; give the test split all labels."
            )
        held = counts.nonzero()[:, 0]
        most = float((available[held] / (counts[held] / counts.sum())).min())
        size = max(1, int(min(len(within) * len(rows) / train_rows, most)))
        draws = torch.Generator().manual_seed(derive_seed(seed, "test rows", client))
        shuffled = [pool[torch.randperm(len(pool), generator=draws)] for pool in pools]
        # Ties at random: small clients have many, and in order all would be scored on their lowest labels.
        quotas = apportion(counts.tolist(), size, torch.randperm(labels, generator=draws).tolist())
        tests.append(torch.cat([pool[:quota] for pool, quota in zip(shuffled, quotas)]).sort().values)
    return tests


def draw_label_order(labels: int, seed: int, seen: set[tuple[int, ...]]) -> Tensor:
    """Draw an order of the labels that is not among ``seen``, as long as there are any left, and add it to them."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(100):
        order = torch.randperm(labels, generator=draws)
        if tuple(order.tolist()) not in seen:
            break
    seen.add(tuple(order.tolist()))
    return order
