"""The privacy ledger of a long run: the figures of one that is taken anew every round, at the cost of a round each."""

import random
import warnings

import pytest

from fedlora.runs.config import build
from fedlora.schema import apply_overrides, merge_tables
from tests.fixtures.federation import TABLE

pytest.importorskip("opacus", reason="needs the dp extra")
from fedlora.security.privacy import accounting

LONG = {"rounds": 12, "task": {"train_rows": 200, "test_rows": 40}}
LONG |= {"clients": {"count": 20, "per_round": 6, "partition": {"name": "dirichlet", "alpha": 1.0}}}
ROWS = ("privacy.level=example", "privacy.noise_multiplier=1.0", "privacy.accountant=rdp", "training.batch_size=2")
UNEQUAL = ("clients.stragglers=0.5", "training.local_steps=6", "clients.capability=bell", "clients.capability_scales=['steps']")  # fmt: skip


def opacus(name, noise, rate, steps, delta):
    from opacus.accountants import create_accountant

    book = create_accountant(mechanism=name)
    book.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(book.get_epsilon(delta=delta))


@pytest.mark.parametrize("case", [("rdp", 1.3, 0.2, 7, 1e-5), ("rdp", 0.7, 1.0, 30, 1e-6), ("prv", 1.1, 0.05, 9, 1e-5), ("prv", 2.0, 0.4, 25, 1e-6)])  # fmt: skip
def test_divergences_taken_once_give_the_bits_of_opacus(case):
    assert accounting.compute_epsilon(*case) == opacus(*case)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_largest_is_the_largest_of_all(accountant, monkeypatch):
    draws = random.Random(0)
    pairs = [(draws.choice([0.02, 0.05, 0.1]), draws.randint(1, 40)) for _ in range(6)] + [(0.3, 2)]
    each = [accounting.compute_epsilon(accountant, 1.2, q, n, 1e-5) for q, n in pairs]
    asked, plain = [], accounting.compute_epsilon
    monkeypatch.setattr(accounting, "compute_epsilon", lambda *about: asked.append(about) or plain(*about))
    assert accounting.largest_epsilon(accountant, 1.2, pairs, 1e-5) == max(each)
    assert accountant == "rdp" or sum(about[0] == "prv" for about in asked) < len(pairs), "not each of them"
    assert accounting.largest_epsilon(accountant, 1.2, [], 1e-5) == 0.0
    assert accounting.largest_epsilon(accountant, 0.0, [(0.1, 1)], 1e-5) == float("inf")


def anew(f, rounds):
    """Client -> noisy sums, from the definition."""
    each = range(f.clients.members)
    asked = {k: [n for n in range(rounds) if k in f.cohort(n)] for k in each}
    if f.privacy.by_client:
        return {k: len(own) for k, own in asked.items()}
    return {k: sum(f.training_of(n, k).steps(len(f.shards[k].train)) for n in own) for k, own in asked.items()}


@pytest.mark.parametrize("settings", [ROWS, (*ROWS, *UNEQUAL), ("privacy.level=client", "privacy.noise_multiplier=1.0", "method.weighting=uniform")])  # fmt: skip
def test_a_run_looks_at_each_round_once_and_says_the_same(settings):
    f = build(apply_overrides(merge_tables(TABLE, LONG), list(settings))).federation()
    wanted = [anew(f, n + 1) for n in range(f.rounds)]
    ledger, p = f.privacy_ledger, f.privacy
    rates, noise, d = ledger.rates, ledger.noise_multiplier, ledger.delta
    told = [max(p.epsilon(noise, rates[k], n, d) for k, n in own.items()) for own in wanted]
    turns, cohorts = [], []
    ledger.steps = lambda *turn: turns.append(turn) or f.training_of(*turn).steps(len(f.shards[turn[1]].train))
    ledger.cohort = lambda n: cohorts.append(n) or f.cohort(n)
    assert [ledger.report_spending(n + 1)["privacy"]["epsilon"] for n in range(f.rounds)] == told
    assert len(cohorts) == f.rounds and len(turns) == len(set(turns)), "no round twice"
    assert p.by_client or turns
    assert ledger.report(f.rounds)["privacy"]["epsilon"] == told[-1]
    assert len(cohorts) == f.rounds
    assert ledger.planned_sums == wanted[-1]
    assert ledger.after(3) == wanted[2], "also asked for fewer"
    assert ledger.after(5) == wanted[4]


def test_only_pairs_that_no_other_covers_are_accounted_for():
    f = build(apply_overrides(merge_tables(TABLE, LONG), list(ROWS))).federation()
    f.privacy_ledger.__dict__["rates"] = {0: 0.5, 1: 0.5, 2: 0.2, 3: 0.1, 4: 0.7, 5: 0.7}
    assert f.privacy_ledger.worst({0: 3, 1: 4, 2: 4, 3: 9, 4: 2, 5: 2}) == [(0.7, 2), (0.5, 4), (0.1, 9)]
    assert f.privacy_ledger.worst({}) == []
