"""Whole runs on the embedded digits: bits, bytes, evaluation and leaks."""

import json

import pytest
import torch

import fedlora
from fedlora.engines.in_process import InProcess
from fedlora.files import load_tree
from fedlora.methods import METHODS
from fedlora.runs.config import build
from fedlora.schema import ConfigError
from tests.fixtures.federation import DEMO, HEAD, LORA, REFERENCE, TABLE, WEIGHTS, WIDTH, config, same, settings


@pytest.mark.parametrize("name", METHODS.names())
def test_same_config_and_seed_same_bits_and_uploads_on_disk_change_none(name, reference):
    """A run that is repeated with its uploads on disk; that figures of uploads are the same, too, test_bits looks at."""
    first = reference(name)
    disk = ("engine.offload=true", "evaluation.measure=false")
    second = fedlora.run(config(*settings(name), *REFERENCE, *disk))
    assert same(first.shared, second.shared)
    assert first.kept.keys() == second.kept.keys()
    assert all(same(tree, second.kept[client]) for client, tree in first.kept.items())
    assert [told(record) for record in first.records] == [told(record) for record in second.records]
    assert first.summary["final"] == second.summary["final"] and first.summary["bytes"] == second.summary["bytes"]


def told(record):
    """A round's record without the clock and the figures that need uploads in memory."""
    return {key: value for key, value in record.items() if key not in ("seconds", "weights")}


@pytest.mark.parametrize("name", ["fedit", "fedsa-lora"])
def test_another_seed_other_bits(name, reference):
    other = fedlora.run(config(*settings(name), "seed=1"))
    assert other.records[1]["clients"] != reference(name).records[1]["clients"]
    assert not same(other.shared, reference(name).shared)


@pytest.mark.parametrize(
    "name,up,down",
    [
        # What the last round made goes down only when there is a next one: rounds - 1 deliveries of what changed.
        ("fedit", LORA + HEAD, LORA + HEAD),
        ("ffa-lora", LORA // 2 + HEAD, LORA // 2 + HEAD),
        ("rolora", LORA // 2 + HEAD, LORA // 2 + HEAD),
        ("fedsa-lora", LORA // 2, LORA // 2),
        ("flora-na", LORA + HEAD, LORA + HEAD),
        ("local", 0, 0),
        ("flexlora", LORA + HEAD, LORA + HEAD),
        ("flora", LORA + HEAD, 3 * LORA + HEAD),  # the stack of three clients goes down
        ("fedex-lora", LORA + HEAD, LORA + 3 * LORA + HEAD),
    ],
)
def test_bytes_against_the_closed_form(name, up, down, reference):
    records = reference(name).records
    assert [sum(r["bytes"]["up"].values()) for r in records] == [3 * up] * 4
    assert [sum(r["bytes"]["down"].values()) for r in records] == [0] + [3 * down] * 3


def test_a_client_that_was_away_gets_only_what_it_lacks():
    result = fedlora.run(config("clients.per_round=1", "rounds=6", "method.name=rolora"))
    seen: dict[int, int] = {}
    for record in result.records:
        client, number = record["cohort"][0], record["round"] - 1
        # Between its turns A changed in odd rounds, B in even ones, the head always; once is enough for each.
        missed = range(seen.get(client, 0), number)
        kinds = {round % 2 for round in missed}
        assert sum(record["bytes"]["down"].values()) == len(kinds) * LORA // 2 + (HEAD if missed else 0)
        seen[client] = number


def test_private_heads_reach_what_a_shared_one_cannot():
    """Every client calls the digits by names of its own; a B or a head that leaks from client to client shows."""
    shift = (
        "clients.permute_labels=true",
        "clients.partition={name = 'iid'}",
        "evaluation={every = 4, measure = false}",
    )
    full = ("task.train_rows=600", "rounds=4", "training={local_steps = 15, batch_size = 16, learning_rate = 1e-2}")
    personal, shared = (
        fedlora.run(config(f"method.name={name}", *shift, *full, table=DEMO)).summary["final"]["clients"]["mean"]
        for name in ("fedsa-lora", "fedit")
    )
    assert personal > 0.8 > 0.6 > shared


def test_personal_state_is_each_clients_own(reference):
    result = reference("fedsa-lora")
    part = next(p for p in result.shared if "q_proj" in p)
    trees = [result.kept[client][part]["B"] for client in range(3)]
    assert not torch.equal(trees[0], trees[1])
    assert not result.shared[part]["B"].any(), "the shared B never moved"


def test_evaluation_of_clients_is_the_global_model_on_their_rows(reference):
    federation, result = config().federation(), reference("fedit")
    federation.model.load(result.shared)
    for client, shard in enumerate(federation.shards):
        batch = federation.task.collate(federation.data.test, shard.test)
        with torch.inference_mode():
            right = federation.task.outputs(federation.model.network.eval(), batch).argmax(-1) == batch["labels"]
        assert result.records[-1]["clients"]["each"][client] == pytest.approx(float(right.float().mean()))


def test_errors_against_a_dense_oracle():
    federation = config("method.name=flora-na").federation()
    trained = []
    engine = InProcess()
    train = engine.train

    def spy(client_turn, *state):
        found = train(client_turn, *state)
        trained.append((client_turn.turn.client, found.sent))
        return found

    engine.train = spy
    first = next(iter(engine.run(federation)))
    rows = [len(shard.train) for shard in federation.shards]
    for part, figures in first.record["weights"].items():
        adapter = federation.method.adapter
        exact = sum(n / sum(rows) * adapter.delta(sent[part]).dense().double() for n, (_, sent) in zip(rows, trained))
        A, B = (sum(n / sum(rows) * sent[part][leaf].double() for n, (_, sent) in zip(rows, trained)) for leaf in "AB")
        for name, product in (("served", adapter.delta(first.shared[part]).dense().double()), ("fedit", 2 * B @ A)):
            assert figures[name] == pytest.approx(float((product - exact).norm() / exact.norm()), rel=1e-3)
        best = torch.linalg.svdvals(exact)[2:].norm() / exact.norm()
        assert figures["best"] == pytest.approx(float(best), rel=1e-3)
        assert figures["best"] - 1e-6 <= figures["served"] <= figures["fedit"] + 1e-6
        assert 1 / 3 <= figures["concentration"] <= 1


def test_the_run_folder(reference):
    result = reference("fedsa-lora")
    folder = result.folder
    assert same(load_tree(folder / "shared.safetensors"), result.shared)
    kept = load_tree(folder / "clients" / "2.safetensors")
    assert all(torch.equal(x, kept[p][leaf]) for p, layer in result.kept[2].items() for leaf, x in layer.items())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert json.loads((folder / "summary.json").read_text())["final"] == result.summary["final"]
    again = fedlora.run(fedlora.read(folder / "config.toml"))
    assert same(again.shared, result.shared)
    assert [{**r, "seconds": 0} for r in again.records] == [{**r, "seconds": 0} for r in result.records]


def test_ctrl_c_keeps_what_was_finished(tmp_path):
    def watch(event):
        if event.kind == "turn" and event.round == 1:
            raise KeyboardInterrupt

    result = fedlora.run(config(), tmp_path / "run", watch)
    assert result.summary["interrupted"]
    assert result.summary["rounds"] == 1
    assert same(load_tree(tmp_path / "run" / "shared.safetensors"), fedlora.run(config("rounds=1")).shared)


def test_a_rate_that_is_too_high_is_said():
    with pytest.raises(FloatingPointError, match=r"client \d's loss is .* in round \d; lower training.learning_rate"):
        fedlora.run(config("training.learning_rate=1e30", "training.optimizer=sgd", "training.max_grad_norm=1e30"))


@pytest.mark.parametrize(
    "several",
    [
        ("optimizer=sgd", "learning_rate=0.5", "schedule=linear", "accumulation_steps=2"),
        ("optimizer=adam", "schedule=cosine", "warmup=0.3", "max_grad_norm=0.1", "keep_optimizer=true"),
        ("precision=bf16", "gradient_checkpointing=true"),
        ("precision=bf16-autocast", "group_by_length=false"),
    ],
)
def test_every_training_setting_runs_and_learns(several):
    settings = ("learning_rate=2e-2", "local_steps=8", *several)
    result = fedlora.run(config("rounds=3", "evaluation.every=3", *(f"training.{setting}" for setting in settings)))
    losses = [sum(r["loss"].values()) for r in result.records]
    assert losses[-1] < losses[0]


def test_settings_change_what_they_say():
    few = ("clients.count=1", "training.batch_size=16", "evaluation.every=2")
    plain = fedlora.run(config(*few)).shared
    for setting in ("keep_optimizer=true", "schedule=linear", "max_grad_norm=0.01", "accumulation_steps=2"):
        assert not same(plain, fedlora.run(config(*few, f"training.{setting}")).shared), setting
    assert same(plain, fedlora.run(config(*few, "training.gradient_checkpointing=true")).shared)


def test_local_epochs_count_passes():
    training = build({**TABLE, "training": {"local_epochs": 2, "batch_size": 16}}).training
    assert training.steps(33) == 5  # 66 rows in batches of 16


@pytest.mark.parametrize("name", ["fedsa-lora", "fedit", "ffa-lora", "rolora", "local"])
def test_vera_runs_end_to_end(name):
    result = fedlora.run(config(f"method.name={name}", "adapter={name = 'vera', rank = 16}"))
    part = next(p for p in result.shared if "q_proj" in p)
    assert set(result.shared[part]) == {"A", "B", "d", "b"}
    sent = result.summary["bytes"]["up"].get("adapter", 0)
    both = 16 + WIDTH
    sizes = {"fedsa-lora": 16, "fedit": both, "ffa-lora": WIDTH, "rolora": both / 2, "local": 0}
    assert sent == 4 * WEIGHTS * 3 * 2 * sizes[name], "the frozen pair never travels"


def test_unequal_heads():
    ravan = ("method.name=ravan", "adapter={name = 'multihead', heads = 4, head_rank = 4}", "clients.ranks=[1, 2, 4]")
    result = fedlora.run(config(*ravan))
    up = {}
    assert result.summary["final"]["clients"]["mean"] > 0
    one = WEIGHTS * 4 * 4 * 4  # bytes of one head of every weight
    assert result.summary["bytes"]["up"]["adapter"] == 2 * (1 + 2 + 4) * one, up


@pytest.mark.parametrize("size", [1.0, 1e-5])  # float32 sums that are rounded apart lose a drift of 1e-5 altogether
@pytest.mark.parametrize("name", ["fedit", "ffa-lora", "ravan"])
def test_drift_against_a_dense_oracle(name, size):
    from fedlora.engines.aggregation_error import aggregation_errors
    from fedlora.rounds import Received, server_turn

    extra = ["adapter={name = 'multihead', heads = 2, head_rank = 4}"] if name == "ravan" else []
    f = config(f"method.name={name}", *extra).federation()
    start, adapter = f.model.initial(0), f.method.adapter
    g = torch.Generator().manual_seed(0)
    moved = {"fedit": {"A", "B"}, "ffa-lora": {"B"}, "ravan": {"H0", "H1"}}[name]
    part = next(p for p in start if "q_proj" in p)
    # All clients moved the same way, and each a little of its own.
    way = {p: {leaf: torch.randn(x.shape, generator=g) for leaf, x in layer.items()} for p, layer in start.items()}
    uploads = []
    for client, rows in enumerate((3, 5, 2)):
        tree = {
            p: {
                leaf: x + way[p][leaf] + size * torch.randn(x.shape, generator=g)
                for leaf, x in layer.items()
                if leaf in moved or p == "classifier"
            }
            for p, layer in start.items()
        }
        uploads.append(Received(f.turn(0, client), rows, tree))
    figures = aggregation_errors(f.rules, start, uploads, {0: {}, 1: {}, 2: {}}, server_turn(f.rules, start, uploads))[
        part
    ]
    w = [1 / 3] * 3 if name == "ravan" else [0.3, 0.5, 0.2]
    double = {leaf: x.double() for leaf, x in start[part].items()}
    trees = [{leaf: x.double() for leaf, x in u.tree[part].items()} for u in uploads]
    dense = [adapter.delta({**double, **tree}).dense() for tree in trees]
    exact = sum(x * d for x, d in zip(w, dense))
    wanted = sum(x * (d - exact).square().sum() for x, d in zip(w, dense)).sqrt() / exact.norm()
    assert figures["drift"] == pytest.approx(float(wanted), rel=1e-4 if size == 1 else 1e-2)
    if name == "fedit" and size == 1:
        assert figures["served"] > 0.05
    else:
        assert figures["served"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("adapter", ["{name = 'lora', rank = 2}", "{name = 'vera', rank = 2}"])
def test_local_clients_of_unequal_rank_have_their_own_and_are_measured(adapter):
    result = fedlora.run(config("method.name=local", f"adapter={adapter}", "clients.ranks=[1, 2]"))
    assert all("drift" in figures for figures in result.records[0]["weights"].values())
    if "lora" in adapter:
        part = next(p for p in result.shared if "q_proj" in p)
        assert [result.kept[client][part]["A"].shape[0] for client in range(3)] == [1, 2, 1]
    assert result.records[1]["loss"] != result.records[0]["loss"]


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora", "svd"])
def test_clients_of_unequal_rank(name):
    """Each sends its own rank and is sent its own rank; scales are each client's own."""
    unequal = (
        f"method.name={name}",
        "adapter.rank=4",
        "clients.ranks=[1, 2, 4]",
        "evaluation={every=2, measure=false}",
    )
    result = fedlora.run(config(*unequal, table=DEMO))
    one = 8 * (96 + 96) * 4
    up, down = ([r["bytes"][d] for r in result.records] for d in ("up", "down"))
    assert [x["adapter"] for x in up] == [7 * one] * 2
    if name == "flora":  # nothing but the stack, to each of three
        assert "adapter" not in down[1] and down[1]["base_update"] == 3 * 7 * one
    else:
        assert down[1]["adapter"] == 7 * one
    assert result.summary["final"]["clients"]["mean"] > 0.2


def test_measures_need_the_uploads_in_memory():
    with pytest.raises(ConfigError, match="set evaluation.measure = false"):
        config("engine.offload=true")


def test_a_run_says_similarity_phases_and_rows(reference):
    result = reference("ffa-lora")
    first = result.records[0]
    for figures in first["weights"].values():
        assert figures["cosine A"] == pytest.approx(1) and -1 <= figures["cosine B"] < 0.99, "A is frozen"
    assert {"train", "combine", "measure", "evaluate"} < first["seconds"].keys()
    parts = sum(seconds for phase, seconds in first["seconds"].items() if phase != "total")
    assert first["seconds"]["combine"] > 0 and parts <= first["seconds"]["total"]
    rows = json.loads((result.folder / "rows.json").read_text())
    federation = config().federation()
    for client, shard in enumerate(federation.shards):
        labels = federation.data.train.labels[shard.train]
        assert rows["clients"][str(client)]["labels"] == torch.bincount(labels, minlength=10).tolist()
        assert rows["clients"][str(client)]["test"] == len(shard.test)
    assert len(rows["labels"]) == 10


def test_rows_that_privacy_covers_are_not_told(tmp_path):
    private = ("method.weighting=uniform", "privacy={level='client', clip=1.0, noise_multiplier=1.0}")
    fedlora.run(config(*private, "rounds=1"), tmp_path / "run")
    assert not (tmp_path / "run" / "rows.json").exists()
