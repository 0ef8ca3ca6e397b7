"""Unequal clients: profiles, ranks and steps that follow, stragglers and dropouts."""

from collections import Counter

import pytest
import torch

import fedlora
from fedlora.engines.clients import DROPPED, Clients
from fedlora.engines.in_process import InProcess
from fedlora.schema import ConfigError
from fedlora.training.local import Training
from tests.fixtures.federation import HEAD, LORA, config, same


@pytest.mark.parametrize(
    "profile,counts",
    [
        ("uniform", [4, 4, 4, 4]),
        ("bell", [2, 6, 6, 2]),
        ("skewed", [8, 4, 2, 2]),
        ([1, 0, 0, 3], [4, 0, 0, 12]),
        ({"1/4": 0.5, "1": 0.5}, [8, 0, 0, 8]),
        ({"0.75": 3, "0.5": 1}, [0, 4, 12, 0]),
    ],
)
def test_counts_follow_the_profile_and_the_seed_says_who(profile, counts):
    clients = Clients(16, capability=profile)
    found = clients.capabilities(0)
    assert [Counter(found)[level] for level in (0.25, 0.5, 0.75, 1.0)] == counts
    assert found == clients.capabilities(0)
    assert any(found != clients.capabilities(seed) for seed in range(1, 6))
    assert found != sorted(found) or clients.capabilities(1) != sorted(found)


def test_ranks_and_heads_are_the_rounded_share_and_at_least_one():
    clients = Clients(16, capability="uniform")
    for full, ranks in ((8, {2, 4, 6, 8}), (4, {1, 2, 3, 4}), (2, {1, 2}), (1, {1})):
        budgets = clients.budgets(full, 0)
        assert set(budgets) == ranks
        assert budgets == [max(1, round(share * full)) for share in clients.capabilities(0)]
    assert Clients(4, capability="uniform", capability_scales=["steps"]).budgets(8, 0) == [8] * 4
    assert clients.budgets(0, 0) == [0] * 16, "an adapter without ranks"


def test_steps_a_client():
    able = Clients(4, capability="uniform", capability_scales=["steps"])
    assert [able.steps(10, 0, k, 0) for k in range(4)] == [max(1, round(10 * share)) for share in able.capabilities(0)]
    assert [able.steps(1, 0, k, 0) for k in range(4)] == [1] * 4
    assert [Clients(5, local_steps=[2, 7]).steps(10, 3, k, 0) for k in range(5)] == [2, 7, 2, 7, 2]
    assert Clients(5, local_steps=3).steps(10, 0, 4, 0) == 3
    table = Clients(4, capability="uniform", local_steps={"1/4": 1, "1/2": 2, "0.75": 9, "1": 4})
    wanted = {0.25: 1, 0.5: 2, 0.75: 9, 1.0: 4}
    assert [table.steps(10, 0, k, 0) for k in range(4)] == [wanted[share] for share in table.capabilities(0)]
    assert [Clients(3).steps(10, 0, k, 0) for k in range(3)] == [10] * 3


def test_stragglers_do_a_part_of_their_steps():
    clients = Clients(10, stragglers=0.2, straggler_work=0.3)
    for round in range(20):
        slow = clients.draw_stragglers(round, 0)
        assert len(slow) == 2
        assert [clients.steps(10, round, k, 0) for k in range(10)] == [3 if k in slow else 10 for k in range(10)]
        assert [clients.steps(1, round, k, 0) for k in range(10)] == [1] * 10
    assert {k for round in range(40) for k in clients.draw_stragglers(round, 0)} == set(range(10))


def test_the_share_that_drops_out():
    clients = Clients(20, per_round=10, dropout=0.1)
    gone = [clients.draw_dropouts(round, 0) for round in range(50)]
    assert all(len(g) == 1 and set(g) <= set(clients.cohort(round, 0)) for round, g in enumerate(gone))
    assert len({g[0] for g in gone}) > 10
    for round in range(50):
        assert sorted([*clients.remaining(round, 0), *gone[round]]) == clients.cohort(round, 0)
    third = [len(Clients(3, dropout=0.1).draw_dropouts(round, 0)) for round in range(2000)]
    assert set(third) == {0, 1}
    assert sum(third) / 2000 == pytest.approx(0.3, abs=0.04), "no whole client: right in the mean"
    assert all(len(Clients(3, dropout=0.99).remaining(round, 0)) == 1 for round in range(100)), "one remains"
    assert Clients(1, dropout=0.9).draw_dropouts(0, 0) == []


def test_new_clients_are_never_asked():
    clients = Clients(10, per_round=4, new=3)
    assert {k for round in range(60) for k in clients.cohort(round, 0)} == set(range(7))
    assert Clients(10, new=3).cohort(0, 0) == list(range(7))


@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({"capability": "bel"}, "there is no profile 'bel'; did you mean 'bell'"),
        ({"capability": [1, 1]}, r"clients.capability is \[1, 1\]; it is .*four shares"),
        ({"capability": []}, "four shares"),
        ({"capability": [0, 0, 0, 0]}, "four shares"),
        ({"capability": [-1, 1, 1, 1]}, "four shares"),
        ({"capability": {}}, "four shares"),
        ({"capability": {"3/2": 1.0}}, "names the capability '3/2'; it lies above 0 and at most at 1"),
        ({"capability": {"weak": 1.0}}, "names the capability 'weak'"),
        ({"capability": "bell", "ranks": 4}, "scales the rank and clients.ranks sets it; keep one of them"),
        ({"capability": "bell", "capability_scales": ["steps"], "local_steps": 3}, "clients.local_steps sets it"),
        ({"local_steps": {"1": 3}}, "goes by capability, and there is none; set clients.capability"),
        ({"capability": "bell", "local_steps": {"1": 3}}, "no number for the capability 0.25; add it"),
        ({"local_steps": [3, 0]}, "each at least 1"),
        ({"local_steps": []}, "each at least 1"),
        ({"dropout": 1.0}, "clients.dropout is 1.0; it is a share, from 0 to below 1"),
        ({"dropout": float("nan")}, "clients.dropout is nan"),
        ({"stragglers": 1.5}, "clients.stragglers is 1.5; it is a share, from 0 to 1"),
        ({"straggler_work": 0.0}, "clients.straggler_work is 0.0; it is a share, above 0 and up to 1"),
        ({"new": 5}, "clients.new is 5; it lies between 0 and below clients.count, 5"),
        ({"new": 2, "per_round": 4}, "clients.per_round is 4; it lies between 1 and clients.count less clients.new, 3"),
        ({"new": 1, "partition": {"name": "own"}}, "clients.new holds out clients of a partition"),
    ],
)
def test_mistakes(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        Clients(5, **settings)
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


def test_a_method_of_one_rank_takes_unequal_steps_only():
    with pytest.raises(
        ConfigError, match="clients.capability gives the clients ranks .* but 'fedit' needs one rank for all"
    ):
        config("clients.capability='uniform'", "adapter.rank=4", "clients.count=4")
    config("clients.capability='uniform'", "clients.capability_scales=['steps']", "adapter.rank=4")
    with pytest.raises(ConfigError, match="clients.local_steps and training.local_epochs are both set"):
        fedlora.runs.config.build({**config().table, "clients": {"local_steps": 3}, "training": {"local_epochs": 1}})


def test_secure_aggregation_counts_on_who_stays():
    config("flower.secure_aggregation=true", "clients.count=4", "clients.dropout=0.25")
    with pytest.raises(ValueError, match="has rounds of 2 clients"):
        config("flower.secure_aggregation=true", "clients.count=4", "clients.dropout=0.3")


@pytest.mark.parametrize("epochs", [False, True])
def test_the_optimiser_really_makes_so_many_steps(epochs, monkeypatch):
    made: Counter = Counter()
    build = Training.build

    def counted(self, parameters):
        optimizer = build(self, parameters)
        optimizer.register_step_post_hook(lambda *_: made.update([len(made_for)]))
        made_for.append(optimizer)
        return optimizer

    made_for: list = []
    monkeypatch.setattr(Training, "build", counted)
    budget = ["training.batch_size=8"] + ([] if epochs else ["training.local_steps=6"])
    able = ("clients.capability='uniform'", "clients.capability_scales=['steps']", "clients.count=4")
    c = config(*able, *budget, "clients.stragglers=0.5", "rounds=2", "evaluation.measure=false")
    table = {**c.table, "training": {"local_epochs": 2, "batch_size": 8, "learning_rate": 1e-3}} if epochs else c.table
    federation = fedlora.runs.config.build(table).federation()
    list(InProcess().run(federation))
    shares, turn = federation.clients.capabilities(0), 0
    for number in range(2):
        for client in range(4):
            turn += 1
            usual = -(-2 * len(federation.shards[client].train) // 8) if epochs else 6
            wanted = max(1, round(usual * shares[client]))
            wanted = max(1, round(wanted / 2)) if client in federation.clients.draw_stragglers(number, 0) else wanted
            assert made[turn] == wanted, f"round {number}, client {client}"


def test_weights_are_those_of_who_stayed_and_the_others_do_not_move():
    """FFA-LoRA's and the head's mean is dense: computed here from the uploads of those who stayed."""
    f = config("method.name=ffa-lora", "clients.count=5", "clients.dropout=0.4", "rounds=3").federation()
    engine, sent = InProcess(), {}
    train = engine.train

    def spy(client_turn, *state):
        found = train(client_turn, *state)
        sent[client_turn.turn.round, client_turn.turn.client] = found.sent
        return found

    engine.train = spy
    for done in engine.run(f):
        stayed = f.clients.remaining(done.number, 0)
        assert len(stayed) == 3 and done.record["cohort"] == stayed
        assert done.record["absent"] == dict.fromkeys(f.clients.draw_dropouts(done.number, 0), DROPPED)
        assert {client for number, client in sent if number == done.number} == set(stayed)
        rows = {client: len(f.shards[client].train) for client in stayed}
        for part, layer in sent[done.number, stayed[0]].items():
            for leaf in layer:
                mean = sum(rows[k] / sum(rows.values()) * sent[done.number, k][part][leaf].double() for k in stayed)
                torch.testing.assert_close(done.shared[part][leaf].double(), mean, rtol=1e-5, atol=1e-7)


def test_private_state_does_not_move_and_the_ledger_has_the_download_only():
    f = config("method.name=fedsa-lora", "clients.dropout=0.34", "rounds=5").federation()
    before: dict = {}
    for done in InProcess().run(f):
        gone = f.clients.draw_dropouts(done.number, 0)
        for client, tree in done.kept.items():
            if client in before:
                assert (before[client] is tree) == (client in gone)
        before = dict(done.kept)
        rows = [row for row in done.ledger if row.round == done.number]
        assert {row.client for row in rows if row.direction == "up"} == set(f.clients.remaining(done.number, 0))
        assert {row.client for row in rows if row.direction == "down"} == (set(range(3)) if done.number else set())
        assert gone, "0.34 of three is at least one"


def test_a_dropped_client_is_sent_everything_again():
    """What it was sent in vain counts, and so does what it is sent next time."""
    once = fedlora.run(config("clients.dropout=0.34", "rounds=3", "method.name=rolora"))
    f = config("clients.dropout=0.34", "method.name=rolora").federation()
    half, head = LORA // 2, HEAD
    seen = dict.fromkeys(range(3), 0)  # the round before which it was last seen to hold all
    for number, record in enumerate(once.records):
        halves = sum(min(2, number - seen[k]) for k in range(3))
        assert record["bytes"]["down"].get("adapter", 0) == halves * half
        assert record["bytes"]["down"].get("head", 0) == sum(head for k in range(3) if number > seen[k])
        seen |= dict.fromkeys(f.clients.remaining(number, 0), number)


def test_groups_by_capability(reference):
    result = fedlora.run(
        config("clients.capability='uniform'", "clients.count=8", "method.name=hetlora", "adapter.rank=4", "rounds=1")
    )
    final, shares = result.summary["final"]["clients"], Clients(8, capability="uniform").capabilities(0)
    assert [group["capability"] for group in final["capability"]] == [0.25, 0.5, 0.75, 1.0]
    for group in final["capability"]:
        own = [x for x, share in zip(final["each"], shares) if share == group["capability"]]
        assert group["clients"] == len(own) == 2
        assert group["mean"] == pytest.approx(sum(own) / 2) and group["worst"] == min(own)
    assert "capability" not in reference("fedit").summary["final"]["clients"]


def test_nothing_moves_where_clients_are_equal():
    once = ("rounds=1", "evaluation.measure=false")
    plain = fedlora.run(config(*once))
    for setting in ("clients.capability={'1' = 1.0}", "clients.local_steps=3", "clients.straggler_work=0.1"):
        assert same(plain.shared, fedlora.run(config(*once, setting)).shared), setting


def test_comparison_carries_the_groups_and_centralised_does_the_cohorts_steps(tmp_path):
    from fedlora.api import compare
    from fedlora.runs.compare import for_label
    from fedlora.runs.comparison import comparison_rows
    from fedlora.runs.folder import read_json
    from tests.fixtures.federation import TABLE

    able = {"capability": "uniform", "capability_scales": ["steps"], "count": 4}
    table = {**TABLE, "rounds": 1, "clients": able, "training": {"local_steps": 8}}
    cells = compare(table, ["fedit"], [0, 1], tmp_path / "c")
    (row,) = read_json(tmp_path / "c" / "comparison.json")["rows"]
    assert row == comparison_rows(cells)[0]
    assert [group["capability"] for group in row["capability"]] == [0.25, 0.5, 0.75, 1.0]
    for i, group in enumerate(row["capability"]):
        own = [cell.summary["final"]["clients"]["capability"][i]["mean"] for cell in cells]
        assert group["mean"]["mean"] == pytest.approx(sum(own) / 2)
    assert for_label(table, "centralised")["training"]["local_steps"] == 2 + 4 + 6 + 8
    drops = {**table, "rounds": 4, "clients": {"count": 4, "dropout": 0.25}}
    assert for_label(drops, "centralised")["training"]["local_steps"] == 3 * 8
    heads = {
        **table,
        "clients": {"count": 4},
        "adapter": {"name": "multihead", "heads": 2},
        "method": {"name": "ravan"},
    }
    assert fedlora.runs.config.build(for_label(heads, "centralised")).method.adapter.rank == 8
