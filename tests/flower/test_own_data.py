"""Every party with data of its own, in files of its own with columns of its own: the bits of one split data set."""

import json
import shutil
from dataclasses import replace
from functools import lru_cache

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import datasets
from PIL import Image

import fedlora
from fedlora.flower import client_messages as parties
from fedlora.flower.client_messages import build_client_app, handle_message
from fedlora.flower.client_store import ClientStore
from fedlora.flower.deploy.node_config import apply_node_config
from fedlora.flower.serve import run_server
from fedlora.flower.server import FlowerLoop
from fedlora.runs.config import build, read
from fedlora.runs.file_names import TOKEN
from fedlora.runs.party_files import read_parties
from fedlora.schema import flatten_table, merge_tables, read_table
from tests.fixtures.federation import TABLE, TINY_VIT
from tests.fixtures.flower import QUICK, SERVED, DiedError, World, agree, dying, plain, same, trained
from tests.fixtures.hospitals import open_hospitals
from tests.fixtures.memory_grid import MemoryGrid

NAMES = [str(i) for i in range(10)]
SPLIT = merge_tables(TABLE, {"method": {"name": "fedsa-lora"}, "rounds": 2, "task": {"label_names": NAMES}})


def own_files(folder, shard, train, test, columns):
    """One party's rows, in a folder of its own."""
    folder.mkdir()
    for name, split, rows in (("train", train, shard.train), ("test", test, shard.test)):
        chosen = split.select(rows.tolist()).rename_columns(columns)
        chosen.to_parquet(folder / f"{name}.parquet")
    (folder / "meta.json").write_text(json.dumps({"image_shape": [8, 8, 1]}))
    return folder


def test_own_files_give_the_bits_of_one_data_set_that_is_split(tmp_path, monkeypatch):
    from fedlora.tasks.data import rows as source

    config = build(SPLIT)
    here = fedlora.run(config)
    task, seed = config.task, config.seed
    train, test = source.load_splits("digits", None, "train", ["test"], seed)
    train = source.draw_rows(train, task.train_rows, None, task.label, seed, "training")
    test = source.draw_rows(test, task.test_rows, None, task.label, seed, "test")
    names = [{"image": "scan", "label": "finding"}, {"image": "picture", "label": "y"}, {}]
    places = [
        own_files(tmp_path / f"hospital-{k}", shard, train, test, names[k])
        for k, shard in enumerate(config.federation().shards)
    ]
    table = {**SPLIT, "clients": {"count": 3, "partition": {"name": "own"}}}
    table["task"] = {"name": "image-classification", "data": "each party's own", "label_names": NAMES}
    nodes = {
        10 + k: {
            "client": k, "state": str(tmp_path / f"state-{k}"), "task.data": str(place),
            "task.image": names[k].get("image", "image"), "task.label": names[k].get("label", "label"),
        }
        for k, place in enumerate(places)
    }  # fmt: skip
    monkeypatch.setattr(parties, "load_base", lru_cache(parties.load_base.__wrapped__))

    def turns(kind, content, context):
        return handle_message(kind, content, lambda run: parties.load_node(table, context.node_config, run))

    f = build(table).federation(combines=True)
    assert f.data is None and not f.shards, "the server has no data"
    server = FlowerLoop(federation=f, network=QUICK, grid=MemoryGrid(build_client_app(turns), nodes))
    rounds = list(server.run(f))
    assert same(rounds[-1].shared, here.shared)
    for client, kept in here.kept.items():
        theirs = ClientStore(tmp_path / f"state-{client}" / "run").load(client).resolve_pending(1).kept
        assert same(trained(theirs), trained(kept))
    assert rounds[-1].record["clients"]["each"] == here.records[-1]["clients"]["each"]
    assert "global" not in rounds[-1].record


def test_a_party_whose_file_is_wrong_is_left_out_and_its_own_log_says_why(tmp_path, capfd):
    rows = datasets.Dataset.from_dict({"image": [bytes(64)] * 4, "label": [0, 1, 2, 3]})
    (tmp_path / "a").mkdir()
    rows.to_parquet(tmp_path / "a" / "train.parquet")
    rows.to_parquet(tmp_path / "a" / "test.parquet")
    table = {**SPLIT, "clients": {"count": 2, "partition": {"name": "own"}}, "rounds": 1}
    node = {"client": 0, "state": str(tmp_path / "s"), "task.data": str(tmp_path / "a"), "task.label": "lable"}

    def turns(kind, content, context):
        return handle_message(kind, content, lambda run: parties.load_node(table, context.node_config, run))

    f = build(table).federation(combines=True)
    told = []
    server = FlowerLoop(told.append, federation=f, network=QUICK, grid=MemoryGrid(build_client_app(turns), {10: node}))
    server.at = server.begin(f)
    server._registry.refresh()
    server._registry.refresh()
    assert [e.text for e in told] == [
        "node 10 is left out: client 0: it could not load its model and data (ValueError); its own log says why"
    ]
    assert "the data has no column 'lable' (task.label); did you mean 'label'?" in capfd.readouterr().err


def test_a_partys_own_model_is_exported_on_its_own_machine(tmp_path):
    """FedSA: the server's folder has no party's B, and says so; the party's state has all that its model needs."""
    pytest.importorskip("peft")
    from fedlora.export.peft import export_model
    from fedlora.flower.deploy.client_result import write_result
    from fedlora.runs.folder import RunFolder

    for name in ("fedsa-lora", "fedex-lora"):
        own = (
            f"method.name={name}",
            "rounds=2",
            *SERVED,
        )  # the export sums more rounds' base updates with rounding
        world = World(tmp_path / name / "state", *own)
        run_server(world.config, world.grid, tmp_path / name / "server")
        here = fedlora.run(world.config, tmp_path / name / "here")
        write_result(world.config, tmp_path / name / "state", 1, tmp_path / name / "mine")
        found = export_model(RunFolder.open(tmp_path / name / "mine"), tmp_path / name / "adapter", 1)
        wanted = export_model(RunFolder.open(here.folder), tmp_path / name / "wanted", 1)
        assert found["difference"] < 1e-4
        a, b = ((tmp_path / name / n / "adapter_model.safetensors").read_bytes() for n in ("adapter", "wanted"))
        assert a == b, name
        assert found["ranks"] == wanted["ranks"]
    with pytest.raises(fedlora.ConfigError, match="client 1's own part of FedSA-LoRA lies on its own machine"):
        export_model(RunFolder.open(tmp_path / "fedsa-lora" / "server"), tmp_path / "no", 1)
    with pytest.raises(fedlora.ConfigError, match="has no state of client 2 in the run 'nope'"):
        write_result(world.config, tmp_path / name / "state", 2, tmp_path / "nothing", "nope")
    assert not (tmp_path / "nothing").exists()


LABELS = ["benign", "cancer", "healthy"]


def scans(folder, kind, order=LABELS):
    """One party's ten scans of each label, which is called or numbered as ``kind`` says."""
    names = [name for name in LABELS for _ in range(10)]
    folder.mkdir()
    if kind == "folders":
        for split in ("train", "test"):
            for i, name in enumerate(names):
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), i).save(folder / split / name / f"{i}.png")
        return folder
    rows = datasets.Dataset.from_dict({"image": [bytes([i] * 64) for i in range(30)], "label": names})
    if kind == "ClassLabel":
        feature = datasets.ClassLabel(names=list(order))
        rows = rows.map(lambda row: {"label": feature.str2int(row["label"])}).cast_column("label", feature)
    if kind == "integers":
        rows = rows.remove_columns("label").add_column("label", [order.index(name) for name in names])
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    (folder / "meta.json").write_text(json.dumps({"image_shape": [8, 8, 1]}))
    return folder


def federation_of(tmp_path, monkeypatch, kinds, label_names=LABELS, rounds=1, **flower):
    """The configuration of parties with such files, and their grid."""
    places = [scans(tmp_path / f"party-{k}", *kind) for k, kind in enumerate(kinds)]
    table = {**TABLE, "rounds": rounds, "clients": {"count": len(kinds), "partition": {"name": "own"}}}
    table["task"] = {"name": "image-classification", "data": "own", "label_names": label_names}
    table["training"] = {"local_steps": 1, "batch_size": 4}
    table["flower"] = {"poll": 0.001, "join_timeout": 0.5, "retry": 0.05, "min_clients": 1} | flower
    nodes = {
        10 + k: {"client": k, "state": str(tmp_path / f"s-{k}"), "task.data": str(p)} for k, p in enumerate(places)
    }
    bases = lru_cache(parties.load_base.__wrapped__)
    monkeypatch.setattr(parties, "load_base", bases)

    def turns(kind, content, context):
        return handle_message(kind, content, lambda run: parties.load_node(table, context.node_config, run))

    def taught(client):
        """The label of each training row, by its name."""
        base = bases(json.dumps(apply_node_config(table, nodes[10 + client])), client)
        data = base.federation.data
        return [data.label_names[i] for i in data.train.labels.tolist()]

    return build(table), MemoryGrid(build_client_app(turns), nodes), taught


def test_parties_of_every_kind_have_the_same_labels_and_the_server_says_how(tmp_path, monkeypatch):
    kinds = [("strings",), ("ClassLabel", LABELS[::-1]), ("folders",), ("integers",)]
    config, grid, taught = federation_of(tmp_path, monkeypatch, kinds)
    events = []
    result = run_server(config, grid, tmp_path / "run", events.append)
    assert all(taught(client) == [name for name in LABELS for _ in range(10)] for client in range(4))
    by_name = "joined; its labels are matched by name"
    by_position = "joined; its labels are numbers and read as positions, 0 = benign, 1 = cancer, 2 = healthy"
    assert {e.client: e.text for e in events if e.kind == "node"} == {
        0: by_name,
        1: by_name,
        2: by_name,
        3: by_position,
    }
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["labels"] == LABELS and summary["label_maps"] == result.summary["label_maps"]
    assert summary["label_maps"] == [
        {"clients": [0, 1, 2], "by": "name", "classes": {name: name for name in LABELS}},
        {"clients": [3], "by": "position", "classes": {"0": "benign", "1": "cancer", "2": "healthy"}},
    ]


def test_what_a_party_writes_of_a_run_says_how_its_labels_were_read(tmp_path, monkeypatch):
    from fedlora.flower.deploy.client_result import write_result

    config, grid, _ = federation_of(tmp_path, monkeypatch, [("strings",), ("integers",)])
    config = replace(config, checkpoint=replace(config.checkpoint, best="clients"))
    maps = run_server(config, grid, tmp_path / "run").summary["label_maps"]
    for client in (0, 1):
        found = write_result(config, tmp_path / f"s-{client}", client, tmp_path / f"mine-{client}")
        assert found == json.loads((tmp_path / f"mine-{client}" / "summary.json").read_text())
        assert found["labels"] == LABELS and found["label_maps"] == [maps[client]]
    assert json.loads((tmp_path / "run" / "best" / "summary.json").read_text())["label_maps"] == maps
    assert [own["by"] for own in maps] == ["name", "position"]


def test_what_a_party_writes_where_one_data_set_is_split_has_the_runs_map(tmp_path):
    from fedlora.flower.deploy.client_result import write_result

    world = World(tmp_path / "state", "rounds=1", *SERVED)
    maps = run_server(world.config, world.grid, tmp_path / "run").summary["label_maps"]
    assert write_result(world.config, tmp_path / "state", 1, tmp_path / "mine")["label_maps"] == maps


def test_a_party_whose_labels_have_no_name_is_left_out_before_training(tmp_path, monkeypatch, capfd):
    numbers = ["0", "1", "2"]
    config, grid, taught = federation_of(tmp_path, monkeypatch, [("strings",), ("integers",)], numbers)
    events = []
    run_server(config, grid, tmp_path / "run", events.append)
    assert taught(1) == [name for name in numbers for _ in range(10)]
    assert {e.client for e in events if e.kind == "turn"} == {1}, "only the party whose labels are known has trained"
    assert (
        "holds 'benign', 'cancer', 'healthy' in the training rows, which match no label; the labels are 0, 1, 2;"
        in (capfd.readouterr().err)
    )


def test_a_party_that_does_not_say_how_it_reads_labels_is_left_out(tmp_path, monkeypatch):
    config, grid, _ = federation_of(tmp_path, monkeypatch, [("strings",), ("strings",)])
    post, events = grid.post, []

    def forged(message):
        if message.metadata.message_type == "query" and message.metadata.src_node_id == 11 and message.has_content():
            message.content["metrics"]["labels"] = 7
        return post(message)

    grid.post = forged
    run_server(config, grid, tmp_path / "run", events.append)
    assert "node 11 is left out: client 1 does not say how it reads its labels; its version of fedlora differs" in {
        e.text for e in events if e.kind == "node"
    }


def test_how_a_party_reads_labels_is_known_after_the_server_was_killed(tmp_path, monkeypatch):
    config, grid, _ = federation_of(tmp_path, monkeypatch, [("strings",), ("integers",)], rounds=2)
    with pytest.raises(DiedError):
        run_server(config, grid, tmp_path / "run", dying("turn", 1))
    grid.leave(11)
    found = run_server(config, grid, tmp_path / "run").summary
    assert [(own["clients"], own["by"]) for own in found["label_maps"]] == [([0], "name"), ([1], "position")]


def breaking(grid, *nodes):
    """Lets these nodes name a column that their files do not have. Returns the app that is mended."""
    sound = grid.app

    def answer(message, context):
        wrong = {"task.label": "lable"} if context.node_id in nodes else {}
        return sound(message, replace(context, node_config={**context.node_config, **wrong}))

    grid.app = answer
    return sound


def test_a_federation_that_too_few_parties_can_join_ends_and_names_each_and_its_log(tmp_path, monkeypatch, capfd):
    config, grid, _ = federation_of(tmp_path, monkeypatch, [("strings",)] * 3, min_clients=2, repair_timeout=0.3)
    sound, events = breaking(grid, 11, 12), []
    with pytest.raises(ValueError) as error:
        run_server(config, grid, tmp_path / "run", events.append)
    why = "it could not load its model and data (ValueError); its own log says why"
    assert str(error.value) == (
        "round 1 cannot be finished: 1 of 3 clients can take part, and it needs 2; left out: "
        f"node 11 (client 1: {why}), node 12 (client 2: {why}). The rounds before it are kept; mend this, and start "
        "the run again in the same folder."
    )
    assert {e.text for e in events if e.kind == "node"} == {
        "joined; its labels are matched by name", f"node 11 is left out: client 1: {why}",
        f"node 12 is left out: client 2: {why}",
    }  # fmt: skip
    assert "no column 'lable' (task.label)" in capfd.readouterr().err
    grid.app = sound
    result = run_server(config, grid, tmp_path / "run", events.append)
    assert result.records[0]["cohort"] == [0, 1, 2]


def test_a_party_that_is_mended_in_time_is_taken_in(tmp_path, monkeypatch):
    config, grid, _ = federation_of(tmp_path, monkeypatch, [("strings",)] * 3, min_clients=3, repair_timeout=60.0)
    sound, events = breaking(grid, 11), []

    def watch(event):
        events.append(event)
        if event.kind == "waiting":
            grid.app = sound

    assert run_server(config, grid, tmp_path / "run", watch).records[0]["cohort"] == [0, 1, 2]
    assert next(e.text for e in events if e.kind == "waiting").endswith(
        "the run ends if this lasts for 60 seconds (flower.repair_timeout)"
    )


def test_a_server_of_another_configuration_than_all_parties_ends(tmp_path, monkeypatch):
    config, grid, _ = federation_of(tmp_path, monkeypatch, [("strings",)] * 3, repair_timeout=0.1, retry=0.05)
    with pytest.raises(
        ValueError, match="0 of 3 clients can take part, and it needs 1; left out: node 10 .client 0 does not"
    ):
        run_server(build(merge_tables(config.table, {"seed": 7})), grid, tmp_path / "run")


CHANGED = {  # what a party's rows become, and what its own log says
    "rows added": ("train", lambda rows: [*rows, rows[0]], "there are 31 training rows, and were 30"),
    "other labels": ("train", lambda rows: [{**rows[0], "label": "healthy"}, *rows[1:]], "training rows have other la"),
    "another order": ("train", lambda rows: rows[::-1], "the training rows are in another order"),
    "other test rows": ("test", lambda rows: [{**rows[0], "image": bytes(64)[1:] + b"x"}, *rows[1:]], "test rows have"),
}


def another_session(monkeypatch):
    """Nodes that are started again: model and data are loaded anew."""
    monkeypatch.setattr(parties, "load_base", lru_cache(parties.load_base.__wrapped__))


@pytest.mark.parametrize("what", CHANGED)
def test_a_party_whose_rows_changed_in_a_run_is_left_out_and_its_own_log_says_how(what, tmp_path, monkeypatch, capfd):
    config, grid, _ = federation_of(tmp_path, monkeypatch, [("strings",)] * 2, rounds=3)
    sent, post = [], grid.post
    grid.post = lambda message: sent.append(message) or post(message)
    with pytest.raises(DiedError):
        run_server(config, grid, tmp_path / "run", dying("turn", 1))
    split, change, sentence = CHANGED[what]
    file = tmp_path / "party-1" / f"{split}.parquet"
    before = file.read_bytes()
    datasets.Dataset.from_list(change(datasets.Dataset.from_parquet(str(file)).to_list())).to_parquet(file)
    another_session(monkeypatch)
    events = []
    with pytest.raises(DiedError):
        run_server(config, grid, tmp_path / "run", lambda event: events.append(event) or dying("turn", 2)(event))
    assert (
        "node 11 is left out: client 1: its data are not those that it began this run with; its own log says what "
        in (" ".join(e.text for e in events if e.kind == "node"))
    )
    assert {e.client for e in events if e.kind == "turn"} == {0}
    assert f"fedlora: client 1 began this run with other data: {sentence}" in capfd.readouterr().err
    file.write_bytes(before)
    another_session(monkeypatch)
    assert run_server(config, grid, tmp_path / "run").records[2]["cohort"] == [0, 1]
    (place,) = tmp_path.glob("s-1/*/clients/1.rows.json")
    assert place.stat().st_mode & 0o077 == 0
    split_digests = json.loads(place.read_text())["rows"].values()
    digests = [x for own in split_digests for x in own.values() if isinstance(x, str)]
    assert len(digests) == 6 and not [
        x for x in digests if any(x in str(message.content) for message in sent if (message.has_content()))
    ], "no digest of a row leaves its machine"


def test_rows_that_change_while_the_server_waits_are_noticed_at_the_next_turn(tmp_path, monkeypatch, capfd):
    """The server does not ask a node that it knows who it is; its process may have been started anew all the same."""
    config, grid, _ = federation_of(tmp_path, monkeypatch, [("strings",)] * 2, rounds=2)

    def watch(event):
        if event.kind == "round" and event.round == 0:
            file = tmp_path / "party-1" / "train.parquet"
            datasets.Dataset.from_parquet(str(file)).select(range(29)).to_parquet(file)
            another_session(monkeypatch)

    records = run_server(config, grid, tmp_path / "run", watch).records
    assert [r["cohort"] for r in records] == [[0, 1], [0]]
    assert "there are 29 training rows, and were 30" in capfd.readouterr().err


def test_rows_may_change_before_a_partys_first_turn_and_in_another_run(tmp_path, monkeypatch):
    config, grid, _ = federation_of(tmp_path, monkeypatch, [("strings",)] * 2)
    with pytest.raises(DiedError):
        run_server(config, grid, tmp_path / "run", dying("node", 0))
    for out in ("run", "another"):
        file = tmp_path / "party-1" / "train.parquet"
        rows = datasets.Dataset.from_parquet(str(file))
        rows.select(range(1, len(rows))).to_parquet(file)
        another_session(monkeypatch)
        assert run_server(config, grid, tmp_path / out).records[0]["cohort"] == [0, 1]


def test_parties_whose_models_are_set_otherwise_do_not_train_together(tmp_path, monkeypatch):
    """The weights are the same, and the activation is another."""
    config, grid, _ = federation_of(tmp_path, monkeypatch, [("strings",)] * 2)
    shutil.copytree(TINY_VIT, tmp_path / "vit")
    settings = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**settings, "hidden_act": "relu"}))
    grid.leave(11)
    grid.join(11, {"client": 1, "state": str(tmp_path / "s-1"), "task.data": str(tmp_path / "party-1"),
                   "model.name": str(tmp_path / "vit")})  # fmt: skip
    events = []
    assert run_server(config, grid, tmp_path / "run", events.append).records[0]["cohort"] == [0]
    assert "its configuration, its pretrained model or its version" in " ".join(
        e.text for e in events if e.kind == "node"
    )


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("fedit", {"clients": {"count": 3, "per_round": 2, "partition": {"name": "own"}}}),
        ("fedsa-lora", {}),
        ("flora", {"clients": {"count": 3, "ranks": [1, 2, 2], "partition": {"name": "own"}}}),
        ("fedex-lora", {"compression": {"up": "int8"}}),
    ],
)
def test_a_rehearsal_of_the_parties_files_has_the_bits_of_the_deployment(method, more, tmp_path, monkeypatch):
    """Other columns, a semicolon, latin-1, and labels read by name and by position."""
    more = {"method": {"name": method}, "flower": {"poll": 0.001, "join_timeout": 2.0, "min_clients": 1}, **more}
    main, files = open_hospitals(tmp_path, **more)
    here = fedlora.run(read_parties(files, main), tmp_path / "here")
    monkeypatch.setattr(parties, "load_base", lru_cache(parties.load_base.__wrapped__))
    table, nodes = read_table(main), {}
    for client, file in enumerate(files):
        own = flatten_table(read_table(file)) | {"task.data": str(file.parent / "notes.csv")}
        nodes[10 + client] = {"client": client, "state": str(tmp_path / f"state-{client}"), **own}

    def turns(kind, content, context):
        return handle_message(kind, content, lambda run: parties.load_node(table, context.node_config, run))

    there = run_server(read(main), MemoryGrid(build_client_app(turns), nodes), tmp_path / "there")
    assert same(here.shared, there.shared)
    assert agree([plain(r) for r in here.records], [plain(r) for r in there.records])
    assert [r["loss"] for r in here.records] == [r["loss"] for r in there.records]
    assert [r["bytes"]["up"] for r in here.records] == [r["bytes"]["up"] for r in there.records]
    assert here.summary["label_maps"] == there.summary["label_maps"]
    token = json.loads((tmp_path / "there" / TOKEN).read_text())["run"]
    last = {client: r["round"] - 1 for r in there.records for client in r["cohort"]}
    for client, kept in here.kept.items():
        stored = ClientStore(tmp_path / f"state-{client}" / token).load(client).resolve_pending(last[client])
        assert same(trained(stored.kept), trained(kept))
