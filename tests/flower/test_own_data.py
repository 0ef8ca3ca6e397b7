"""Every party with data of its own, in files of its own with columns of its own: the bits of one split data set."""

import json
from functools import lru_cache

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import datasets

import fedlora
from fedlora.config import build, merged
from fedlora.engines.flower.memory import MemoryGrid
from fedlora.engines.flower.party import client_app, handled
from fedlora.engines.flower.server import Federated
from fedlora.engines.flower.store import Store
from fedlora.flower import parties
from tests.fixtures.federation import TABLE
from tests.flower.world import QUICK, SERVED, World, same, trained

NAMES = [str(i) for i in range(10)]
SPLIT = merged(TABLE, {"method": {"name": "fedsa-lora"}, "rounds": 2, "task": {"label_names": NAMES}})


def own_files(folder, shard, train, test, columns):
    """One party's rows, in a folder of its own."""
    folder.mkdir()
    for name, split, rows in (("train", train, shard.train), ("test", test, shard.test)):
        chosen = split.select(rows.tolist()).rename_columns(columns)
        chosen.to_parquet(folder / f"{name}.parquet")
    (folder / "meta.json").write_text(json.dumps({"image_shape": [8, 8, 1]}))
    return folder


def test_own_files_give_the_bits_of_one_data_set_that_is_split(tmp_path, monkeypatch):
    from fedlora.tasks import data as source

    config = build(SPLIT)
    here = fedlora.run(config)
    task, seed = config.task, config.seed
    train, test = source.splits("digits", None, "train", ["test"], seed)
    train = source.subset(train, task.train_rows, None, task.label, seed, "training")
    test = source.subset(test, task.test_rows, None, task.label, seed, "test")
    names = [{"image": "scan", "label": "finding"}, {"image": "picture", "label": "y"}, {}]
    places = [
        own_files(tmp_path / f"hospital-{k}", shard, train, test, names[k])
        for k, shard in enumerate(config.federation().shards)
    ]
    table = {**SPLIT, "clients": {"count": 3, "split": {"name": "own"}}}
    table["task"] = {"name": "image-classification", "data": "each party's own", "label_names": NAMES}
    nodes = {
        10 + k: {
            "client": k, "state": str(tmp_path / f"state-{k}"), "task.data": str(place),
            "task.image": names[k].get("image", "image"), "task.label": names[k].get("label", "label"),
        }
        for k, place in enumerate(places)
    }  # fmt: skip
    monkeypatch.setattr(parties, "base", lru_cache(parties.base.__wrapped__))

    def turns(kind, content, context):
        return handled(kind, content, lambda run: parties.party(table, context.node_config, run))

    f = build(table).federation(combines=True)
    assert f.data is None and not f.shards, "the server has no data"
    server = Federated(federation=f, network=QUICK, grid=MemoryGrid(client_app(turns), nodes))
    rounds = list(server.run(f))
    assert same(rounds[-1].shared, here.shared)
    for client, kept in here.kept.items():
        theirs = Store(tmp_path / f"state-{client}" / "run").load(client).settled(1).kept
        assert same(trained(theirs), trained(kept))
    assert rounds[-1].record["clients"]["each"] == here.records[-1]["clients"]["each"]
    assert "global" not in rounds[-1].record


def test_a_party_whose_file_is_wrong_is_left_out_and_its_own_log_says_why(tmp_path, capfd):
    rows = datasets.Dataset.from_dict({"image": [bytes(64)] * 4, "label": [0, 1, 2, 3]})
    (tmp_path / "a").mkdir()
    rows.to_parquet(tmp_path / "a" / "train.parquet")
    rows.to_parquet(tmp_path / "a" / "test.parquet")
    table = {**SPLIT, "clients": {"count": 2, "split": {"name": "own"}}, "rounds": 1}
    node = {"client": 0, "state": str(tmp_path / "s"), "task.data": str(tmp_path / "a"), "task.label": "lable"}

    def turns(kind, content, context):
        return handled(kind, content, lambda run: parties.party(table, context.node_config, run))

    f = build(table).federation(combines=True)
    told = []
    server = Federated(told.append, federation=f, network=QUICK, grid=MemoryGrid(client_app(turns), {10: node}))
    server.at = server.begin(f)
    server._directory.refresh()
    server._directory.refresh()
    assert [e.text for e in told] == [
        "node 10 is left out: it could not say who it is: its turn failed (ValueError); its own log says more"
    ]
    assert "the data has no column 'lable' (task.label); did you mean 'label'?" in capfd.readouterr().err


def test_a_partys_own_model_is_exported_on_its_own_machine(tmp_path):
    """FedSA: the server's folder has no party's B, and says so; the party's state has all that its model needs."""
    pytest.importorskip("peft")
    from fedlora.export import Run, export
    from fedlora.flower.result import result
    from fedlora.flower.server import serve

    for name in ("fedsa-lora", "fedex-lora"):
        own = (f"method.name={name}", "rounds=2", *SERVED)  # the export sums more rounds' folds with rounding
        world = World(tmp_path / name / "state", *own)
        serve(world.config, world.grid, tmp_path / name / "server")
        here = fedlora.run(world.config, tmp_path / name / "here")
        result(world.config, tmp_path / name / "state", 1, tmp_path / name / "mine")
        found = export(Run.open(tmp_path / name / "mine"), tmp_path / name / "adapter", 1)
        wanted = export(Run.open(here.folder), tmp_path / name / "wanted", 1)
        assert found["difference"] < 1e-4
        a, b = ((tmp_path / name / n / "adapter_model.safetensors").read_bytes() for n in ("adapter", "wanted"))
        assert a == b, name
        assert found["ranks"] == wanted["ranks"]
    with pytest.raises(fedlora.ConfigError, match="client 1's own part of FedSA-LoRA lies on its own machine"):
        export(Run.open(tmp_path / "fedsa-lora" / "server"), tmp_path / "no", 1)
    with pytest.raises(fedlora.ConfigError, match="has no state of client 2 in the run 'nope'"):
        result(world.config, tmp_path / name / "state", 2, tmp_path / "nothing", "nope")
    assert not (tmp_path / "nothing").exists()
