"""Splits, test rows, labels, budgets and cohorts."""

import numpy
import pytest
import torch

from fedlora.engines.clients import Clients
from fedlora.tasks._base import Data, Examples


def data(rows=600, labels=6, groups=None, test_groups=None):
    g = torch.Generator().manual_seed(0)

    def split(n, owner):
        y = torch.randint(labels, (n,), generator=g)
        return Examples({}, y, torch.ones(n, dtype=torch.int64), owner)

    return Data(split(rows, groups), split(rows // 3, test_groups), tuple(map(str, range(labels))))


PARTITIONS = [
    {"name": "iid"},
    {"name": "dirichlet", "alpha": 0.3},
    {"name": "pathological", "labels_per_client": 2},
    {"name": "size", "sizes": [1, 1, 2, 2, 4]},
    {"name": "inner-dirichlet", "alpha": 0.3},
]


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda s: s["name"])
def test_every_row_has_one_owner_and_the_seed_decides(partition):
    d, clients = data(), Clients(5, partition=partition)
    before = torch.random.get_rng_state(), numpy.random.get_state()[1].tolist()
    shards = clients.shards(d, 0)
    assert torch.equal(torch.cat([s.train for s in shards]).sort().values, torch.arange(600))
    again, other = clients.shards(d, 0), clients.shards(d, 1)
    assert all(torch.equal(a.train, b.train) and torch.equal(a.test, b.test) for a, b in zip(shards, again))
    assert any(not torch.equal(a.train, b.train) for a, b in zip(shards, other))
    assert torch.equal(before[0], torch.random.get_rng_state()), "no draw from the global generators"
    assert before[1] == numpy.random.get_state()[1].tolist()


def test_what_the_partitions_promise():
    d = data()
    assert [len(s.train) for s in Clients(5).shards(d, 0)] == [120] * 5
    sizes = [len(s.train) for s in Clients(5, partition=PARTITIONS[3]).shards(d, 0)]
    assert sizes == [60, 60, 120, 120, 240]
    for shard in Clients(5, partition=PARTITIONS[2]).shards(d, 0):
        assert len(d.train.labels[shard.train].unique()) == 2
    counts = [
        torch.bincount(d.train.labels[s.train], minlength=6) for s in Clients(5, partition=PARTITIONS[1]).shards(d, 0)
    ]
    assert max(float(c.max() / c.sum()) for c in counts) > 0.4, "alpha 0.3 is skewed"


@pytest.mark.parametrize("labels", [(0, 1), (3, 7)])  # labels need not begin at 0
def test_two_labels_over_many_clients_can_be_skewed_with_equal_shares(labels):
    d = data(labels=2)
    rows = Examples({}, torch.tensor(labels)[d.train.labels], d.train.lengths)
    skew = {}
    for alpha in (0.1, 100.0):
        many = Clients(50, partition={"name": "inner-dirichlet", "alpha": alpha})
        counts = [rows.labels[part].unique(return_counts=True)[1] for part in many.partitioner.rows(rows, 50, 0)]
        assert {int(n.sum()) for n in counts} == {12}
        skew[alpha] = sum(float(n.max()) / 12 for n in counts) / 50
    assert skew[0.1] > skew[100.0] + 0.1, "small alpha, one label most of all"
    with pytest.raises(ValueError, match="cannot be split by 'dirichlet'.* or use 'inner-dirichlet'"):
        Clients(50, partition={"name": "dirichlet", "alpha": 0.1}).shards(d, 0)


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda s: s["name"])
def test_test_rows_follow_the_training_labels(partition):
    d = data(rows=3000)
    for shard in Clients(5, partition=partition).shards(d, 0):
        assert len(shard.test.unique()) == len(shard.test)
        there = [torch.bincount(y, minlength=6) for y in (d.train.labels[shard.train], d.test.labels[shard.test])]
        shares = [x / x.sum() for x in there]
        assert float((shares[0] - shares[1]).abs().max()) <= 1 / len(shard.test) + 1e-6


def test_which_of_its_labels_a_small_client_is_scored_on_goes_by_lot():
    d, lowest = data(rows=1200), []
    for shard in Clients(400).shards(d, 0):
        counts = torch.bincount(d.train.labels[shard.train], minlength=6)
        most = (counts == counts.max()).nonzero()[:, 0].tolist()
        (scored,) = d.test.labels[shard.test].tolist()
        assert scored in most
        lowest += [scored == most[0]] if len(most) > 1 else []
    assert len(lowest) > 50 and 0.25 < sum(lowest) / len(lowest) < 0.65, "about one in how many there are"


def test_clients_by_a_column():
    owners = tuple("abc"[i % 3] if i < 540 else "d" for i in range(600))
    d = data(groups=owners, test_groups=tuple("abcd"[i % 4] for i in range(200)))
    shards = Clients(4, partition={"name": "column", "column": "who"}).shards(d, 0)
    assert [len(s.train) for s in shards] == [180, 180, 180, 60]
    assert [{owners[i] for i in s.train.tolist()} for s in shards] == [{"a"}, {"b"}, {"c"}, {"d"}]
    assert all({"abcd"[i % 4] for i in s.test.tolist()} == {name} for s, name in zip(shards, "abcd"))
    with pytest.raises(ValueError, match="column 'who' has only 4 values; lower clients.count"):
        Clients(5, partition={"name": "column", "column": "who"}).shards(d, 0)
    without = Clients(4, partition={"name": "column", "column": "who"}).shards(data(groups=owners), 0)
    assert all(len(s.test) > 0 for s in without), "a test split without the column is shared out by labels"


def test_rows_of_a_columns_other_values_are_said():
    owners = tuple("abc"[i % 3] if i < 540 else "d" for i in range(600))
    tests = tuple("abcde"[i % 5] for i in range(200))
    d = data(groups=owners, test_groups=tests)

    def left(count, d=d):
        return Clients(count, partition={"name": "column", "column": "who"}).partitioner.describe_unused_rows(
            d.train, d.test, count
        )

    assert left(2) == (
        "3 of the 5 values of column 'who' have no client, and their 240 of 600 training rows and 120 of 200 test rows "
        "are unused: 'c' (180), 'd' (60), 'e' (0); clients.count is 2."
    )
    assert "their 0 of 600 training rows and 40 of 200 test rows are unused: 'e' (0);" in left(4)
    assert left(4, data(groups=owners)) == "" and left(4, data(groups=owners, test_groups=owners[::3])) == ""
    many = data(groups=tuple(str(i % 50) for i in range(600)))
    assert "their 564 of 600 training rows are unused: '11' (12), " in left(3, many) and ", ...; " in left(3, many)
    assert Clients(2).partitioner.describe_unused_rows(d.train, d.test, 2) == ""


def test_permuted_labels_differ_and_cover():
    shards = Clients(10, permute_labels=True).shards(data(), 0)
    orders = [tuple(s.relabel.tolist()) for s in shards]
    assert len(set(orders)) == 10
    assert all(sorted(order) == list(range(6)) for order in orders)
    two = Clients(4, permute_labels=True).shards(data(labels=2), 0)
    assert {tuple(s.relabel.tolist()) for s in two} == {(0, 1), (1, 0)}


def test_budgets():
    assert Clients(3).budgets(8, 0) == [8, 8, 8]
    assert Clients(4, ranks=[2, 4]).budgets(8, 0) == [2, 4, 2, 4]
    drawn = Clients(10, ranks={"4": 0.5, "8": 0.5}).budgets(8, 0)
    assert sorted(drawn) == [4] * 5 + [8] * 5
    assert drawn != sorted(drawn) or Clients(10, ranks={"4": 0.5, "8": 0.5}).budgets(8, 1) != drawn
    for ranks in ([0], 9, {"x": 1.0}, []):
        with pytest.raises(ValueError, match=r"clients\.ranks"):
            Clients(3, ranks=ranks).budgets(8, 0)


@pytest.mark.parametrize("ranks", [{"4": 0.0, "8": 0.0}, {}, [], {"x": 1.0}, {"4": -1.0, "8": 2.0}])
def test_ranks_that_give_nobody_one(ranks):
    with pytest.raises(ValueError, match="it is a number, a list, or shares"):
        Clients(4, ranks=ranks).budgets(8, 0)


def test_cohorts():
    clients = Clients(10, per_round=3)
    cohorts = [clients.cohort(round, 0) for round in range(30)]
    assert cohorts == [clients.cohort(round, 0) for round in range(30)]
    assert all(len(set(c)) == 3 and c == sorted(c) for c in cohorts)
    assert {k for c in cohorts for k in c} == set(range(10))
    assert Clients(4).cohort(5, 0) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "clients,sentence",
    [
        (lambda: Clients(5, partition={"name": "pathological", "labels_per_client": 1}), "leaves .* rows to nobody"),
        (lambda: Clients(5, partition={"name": "pathological", "labels_per_client": 9}), "but there are 6 labels"),
        (lambda: Clients(5, partition={"name": "size", "sizes": [1, 2]}), "has 2 numbers, but clients.count is 5"),
        (lambda: Clients(300, partition={"name": "dirichlet", "alpha": 0.01}), "cannot be split by 'dirichlet'.*raise"),
        (lambda: Clients(700), "clients.count is 700, but there are only 600"),
        (
            lambda: Clients(5, partition={"name": "size", "sizes": [1000, 1000, 1000, 1000, 1]}),
            "client 4 gets no row of 600 by clients.partition.sizes",
        ),
    ],
)
def test_mistakes(clients, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        clients().shards(data(), 0)
    assert "\n" not in str(caught.value)
