"""Whole runs with privacy: one set of bits on every engine, and what is said of ε."""

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import fedlora
from fedlora.cli import app
from fedlora.engines.in_process import InProcess
from fedlora.engines.loop import Event
from fedlora.export.peft import export_model
from fedlora.runs.config import build
from fedlora.runs.folder import RunFolder
from fedlora.runs.plan.plan import plan_run
from fedlora.schema import apply_overrides, dumps, merge_tables
from fedlora.security.privacy import Privacy
from fedlora.security.privacy.client_level import iterate_leaves, starting_leaves
from tests.fixtures.federation import ADAPTERS, TABLE, same

pytest.importorskip("opacus", reason="needs the dp extra")
CLIENT = ("privacy.level=client", "privacy.noise_multiplier=1.0", "method.weighting=uniform")
EXAMPLE = ("privacy.level=example", "privacy.noise_multiplier=1.0")
SMALL = {"rounds": 1, "task": {"train_rows": 60, "test_rows": 30}, "training": {"local_steps": 1, "batch_size": 4}}
SMALL |= {"clients": {"partition": {"name": "iid"}}}


def config(name, *overrides):
    table = merge_tables(merge_tables(TABLE, SMALL), {"method": {"name": name}})
    return build(apply_overrides(table, [*ADAPTERS.get(name, []), *overrides]))


def flat(tree):
    return torch.cat([x.double().flatten() for _, _, x in iterate_leaves(tree)])


GRID = [
    ("ravan", CLIENT),
    ("flora", (*CLIENT, "privacy.noise_on=upload")),
    ("fedsa-lora", (*EXAMPLE, "training.accumulation_steps=2")),
]


@pytest.mark.parametrize("name,settings", GRID, ids=["client", "upload", "example"])
def test_the_grid_has_the_bits_of_one_process(name, settings, tmp_path):
    pytest.importorskip("flwr", reason="needs the flower extra")
    from tests.fixtures.flower import World, records_agree, trained

    made = config(name, *settings, "rounds=2")
    here, again = fedlora.run(made), fedlora.run(made)
    assert same(here.shared, again.shared), "and of itself"
    world = World(tmp_path, made=made)
    rounds = world.run()
    assert same(rounds[-1].shared, here.shared) and records_agree(rounds, here.records)
    assert all(same(trained(world.kept(client)), trained(tree)) for client, tree in here.kept.items())
    bare = fedlora.run(config(name, *settings, "rounds=2", "privacy.noise_multiplier=0.0"))
    assert not same(bare.shared, here.shared) or name == "flora"


def test_no_engine_records_errors_that_show_single_uploads(tmp_path):
    pytest.importorskip("flwr", reason="needs the flower extra")
    from tests.fixtures.flower import World

    made = config("fedit", *CLIENT, "evaluation.measure=true", "rounds=1")
    records = [*fedlora.run(made).records, *(done.record for done in World(tmp_path, made=made).run())]
    assert len(records) == 2 and not any("weights" in record for record in records)


def test_a_rounds_change_is_the_clipped_mean_and_its_noise(tmp_path):
    settings = (*CLIENT, "privacy.clip=0.05")
    quiet = fedlora.run(config("fedit", *settings, "privacy.noise_multiplier=0.0", "privacy.figures=true"))
    noisy = fedlora.run(config("fedit", *settings))
    f = config("fedit", *settings).federation()
    start = starting_leaves(f.rules, f.model.initial(0), f.turn(0, 0))
    change = flat(quiet.shared) - flat({p: {**f.model.initial(0)[p]} for p in quiet.shared})
    assert 0 < float(change.norm()) <= 0.05 * (1 + 1e-4), "three clients, each moved further than its clip"
    assert quiet.summary["privacy"]["epsilon"] is None and Privacy.describe(quiet.summary["privacy"])[0][1].startswith(
        "none"
    )
    z = (flat(noisy.shared) - flat(quiet.shared)) * 3 / 0.05
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * len(flat(start)))
    assert quiet.records[0]["loss"] and "weights" in quiet.records[0]
    assert noisy.records[0]["loss"] == {} and "weights" not in noisy.records[0]


def test_epsilon_is_said_everywhere_and_grows(tmp_path):
    settings = ("rounds=2", *EXAMPLE, "training.local_steps=2")
    made, told = config("fedit", *settings), []
    result = fedlora.run(made, tmp_path / "run", lambda e: told.append(e))
    spent = [record["privacy"]["epsilon"] for record in result.records]
    assert 0 < spent[0] < spent[1] == result.summary["privacy"]["epsilon"]
    assert [e.epsilon for e in told if isinstance(e, Event) and e.kind == "round"] == spent
    assert spent[1] == max(result.summary["privacy"]["clients"].values())
    assert plan_run(made)["privacy"] == result.summary["privacy"]
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run")])
    figure = f"ε = {spent[1]:.3g}"
    assert shown.exit_code == 0 and figure in shown.stdout
    export_model(RunFolder.open(tmp_path / "run"), tmp_path / "out")
    assert figure in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "my.toml").write_text(dumps(made.table))
    assert figure in CliRunner().invoke(app, ["plan", str(tmp_path / "my.toml")]).stdout


def test_a_poisson_round_without_anybody_gets_noise_and_the_rate_counts():
    made = config("fedit", *CLIENT, "rounds=3", "clients.sampling=poisson", "clients.rate=0.3")
    f = made.federation()
    cohorts = [f.cohort(n) for n in range(3)]
    empty = cohorts.index([])
    rounds = list(InProcess().run(f))
    before = f.model.initial(0) if empty == 0 else rounds[empty - 1].shared
    z = (flat(rounds[empty].shared) - flat({p: dict(x) for p, x in before.items()})) * f.clients.mean_cohort_size
    assert f.clients.mean_cohort_size == pytest.approx(0.9)
    z = z[z != 0]  # frozen leaves
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * len(z))
    assert [r.record["cohort"] for r in rounds] == [[], [], []], "a sample that is known amplifies nothing"
    full = config("fedit", *CLIENT, "rounds=3").federation()
    assert rounds[-1].record["privacy"]["epsilon"] < next(iter(InProcess().run(full))).record["privacy"]["epsilon"] * 3


def test_a_secret_run_cannot_be_repeated_and_its_sample_not_be_told_from_the_seed():
    made = config("fedit", *CLIENT, "privacy.secret=true", "clients.sampling=poisson", "clients.rate=0.5", "clients.count=30")  # fmt: skip
    first, second = made.federation(), made.federation()
    assert first.key != second.key and first.cohort_seed != second.cohort_seed != made.seed
    assert [first.cohort(n) for n in range(5)] != [second.cohort(n) for n in range(5)]
    assert first.cohort(0) == first.cohort(0)
    plain = config("fedit", *CLIENT).federation()
    assert plain.key == config("fedit", *CLIENT).federation().key


def test_hidden_sums_have_the_clients_noise_in_them(tmp_path):
    pytest.importorskip("flwr", reason="needs the flower extra")
    from tests.fixtures.flower import HIDDEN, World

    settings = (*CLIENT, "clients.count=4", "privacy.clip=0.1")
    ends = {}
    for z in (0.0, 2.0):
        made = config("fedit", *settings, f"privacy.noise_multiplier={z}")
        [done] = World(tmp_path / str(z), made=made, network=HIDDEN).run()
        ends[z] = flat(done.shared)
    f = made.federation()
    start = flat({p: dict(x) for p, x in f.model.initial(0).items()})
    noise = (ends[2.0] - ends[0.0]) * 4 / (2.0 * 0.1)
    assert 0 < float((ends[0.0] - start).norm()) <= 0.1 * (1 + 1e-3)
    # Four clients with a threshold of three: each adds a third of the variance, so three are enough.
    assert float(noise.std()) == pytest.approx(math.sqrt(4 / 3), rel=4 / math.sqrt(2 * len(noise)))


def test_a_party_keeps_its_secret_key_for_a_run(tmp_path):
    pytest.importorskip("flwr", reason="needs the flower extra")
    from fedlora.flower.client_store import ClientStore

    store = ClientStore(tmp_path / "run")
    assert store.key(1) == ClientStore(tmp_path / "run").key(1) != store.key(2)
    assert len(store.key(1)) == 32 and (tmp_path / "run" / "clients" / "1.key").stat().st_mode & 0o077 == 0


def test_where_only_parties_know_their_rows_each_accounts_for_its_own():
    f = config("fedit", *EXAMPLE).federation()
    own = replace(f.clients, partition={"name": "own"})
    server, party = (replace(f, clients=own, shards=rows) for rows in ({}, {1: f.shards[1]}))
    assert server.privacy_ledger.report_spending(1) == {"privacy": {"epsilon": None, "delta": None}}
    said = server.privacy_ledger.report(1)["privacy"]
    assert said["epsilon"] is None and "each party" in Privacy.describe(said)[0][1]
    figure = f.privacy_ledger.report(1)["privacy"]["clients"]["1"]
    assert (
        party.privacy_ledger.spending_line(1)
        == f"fedlora: after round 1, ε = {figure} at δ = 1e-05 for this party's rows"
    )
    assert f.privacy_ledger.spending_line(1) == ""


def test_the_best_rounds_folder_says_the_guarantee_of_all_rounds(tmp_path):
    """Which round is the best was seen after the last."""
    made = config("fedit", *CLIENT, "privacy.figures=true", "rounds=3", "checkpoint.best='clients'")
    whole = fedlora.run(made, tmp_path / "run").summary["privacy"]
    best = json.loads((tmp_path / "run" / "best" / "summary.json").read_text())
    assert best["privacy"] == json.loads(json.dumps(whole)) and best["privacy"]["rounds"] == 3
