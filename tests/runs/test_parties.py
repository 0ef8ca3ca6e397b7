"""A rehearsal of parties with their own files: rows, resumption, refusals, and what is computed of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedlora
from fedlora.runs.chat import Chat
from fedlora.runs.config import read
from fedlora.runs.folder import RunFolder
from fedlora.runs.party_files import read_parties
from fedlora.runs.personalization import evaluate_personalization
from fedlora.schema import dumps, read_table
from tests.fixtures.chat_templates import THINKER
from tests.fixtures.federation import TINY_VIT, same
from tests.fixtures.hospitals import LABELS, open_hospitals, write_rows
from tests.fixtures.networks import write_decoder, write_encoder


@pytest.fixture
def hospitals(tmp_path):
    return open_hospitals(tmp_path)


def test_each_party_has_its_own_rows_and_the_server_has_none(hospitals, tmp_path):
    main, files = hospitals
    result = fedlora.run(read_parties(files, main), tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "rows.json").read_text())
    assert rows["labels"] == LABELS
    sizes = {client: (own["train"], own["test"]) for client, own in rows["clients"].items()}
    assert sizes == {"0": (16, 4), "1": (19, 5), "2": (22, 6)}
    assert all(sum(own["labels"]) == own["train"] for own in rows["clients"].values())
    assert [set(record) & {"global", "clients"} for record in result.records] == [{"clients"}] * 2
    assert len(result.summary["final"]["clients"]["each"]) == 3
    assert [(own["clients"], own["by"]) for own in result.summary["label_maps"]] == [
        ([0, 1], "name"),
        ([2], "position"),
    ]
    assert all(note.startswith(f"{files[2]}: the labels of column 'Klasse'") for note in result.summary["notes"])
    assert result.summary["notes"]


def test_a_run_is_repeated_and_resumed_from_any_folder(hospitals, tmp_path, monkeypatch):
    main, files = hospitals
    whole = fedlora.run(read_parties(files, main, ["rounds=3", "clients.per_round=2"]), tmp_path / "whole")
    fedlora.run(read_parties(files, main, ["rounds=1", "clients.per_round=2"]), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = fedlora.resume(tmp_path / "run", 3)
    again = fedlora.run(read(tmp_path / "whole" / "config.toml"))
    for result in (resumed, again):
        assert same(result.shared, whole.shared)
        assert [r["clients"] for r in result.records] == [r["clients"] for r in whole.records]
    assert [len(record["cohort"]) for record in whole.records] == [2] * 3
    assert resumed.summary["label_maps"] == whole.summary["label_maps"]


def test_run_takes_the_files_of_parties_and_says_what_it_does_not_use(hospitals):
    main, files = hospitals
    tables = [read_table(file) for file in files]
    for file, table in zip(files, tables):
        table["task"]["data"] = str(file.parent / "notes.csv")
    tables[1]["engine"] = {"threads": 77}
    events = []
    result = fedlora.run(main, parties=tables, overrides={"rounds": 1}, watch=events.append)
    assert same(result.shared, fedlora.run(read_parties(files, main, ["rounds=1"])).shared)
    said = "party 1 sets engine.threads = 77; a rehearsal runs on one machine, with that of " + str(main) + "."
    assert next(event.text for event in events if event.kind == "note") == said
    config = read_parties(tables, fedlora.read(main), {"rounds": 1})
    assert config == read_parties(tables, main, ["rounds=1"])
    with pytest.raises(fedlora.ConfigError, match="party is .*; it should be a tuple of Party"):
        replace(config, party=3)
    with pytest.raises(fedlora.ConfigError, match="the configuration is None"):
        fedlora.run()


def test_a_party_whose_rows_changed_cannot_be_resumed(hospitals, tmp_path):
    main, files = hospitals
    fedlora.run(read_parties(files, main, ["rounds=1"]), tmp_path / "run")
    file = tmp_path / "b" / "notes.csv"
    file.write_text(file.read_text() + '"fever";"urgent"\n')
    with pytest.raises(ValueError, match="other data or another model: client 1: there are 20 training rows, and were"):
        fedlora.resume(tmp_path / "run", 2)


def test_data_that_have_moved_can_be_named_in_the_configuration(hospitals, tmp_path):
    main, files = hospitals
    fedlora.run(read_parties(files, main, ["rounds=1"]), tmp_path / "run")
    (tmp_path / "moved").mkdir()
    (tmp_path / "b" / "notes.csv").rename(tmp_path / "moved" / "notes.csv")
    with pytest.raises(fedlora.ConfigError, match=rf"{files[1]}: there is no data at"):
        fedlora.resume(tmp_path / "run", 2)
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(tmp_path / "b" / "notes.csv"), str(tmp_path / "moved/notes.csv")))
    assert len(fedlora.resume(tmp_path / "run", 2).records) == 2
    config.write_text(config.read_text().replace('text = "message"', 'text = "triage_class"'))
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        fedlora.resume(tmp_path / "run", 3)


def empty(place: Path) -> None:
    (place / "notes.csv").write_bytes(b"")


def no_test_rows(place: Path) -> None:
    write_rows(place / "train.csv", ["message", "triage_class"], [["fever", "urgent"]], ";")
    (place / "test.csv").write_bytes(b"message;triage_class\n")
    (place / "party.toml").write_text((place / "party.toml").read_text().replace("notes.csv", "."))


def setting(old: str, new: str):
    return lambda place: (place / "party.toml").write_text((place / "party.toml").read_text().replace(old, new))


UNREADABLE = {
    "empty": (empty, r"the file '.*b/notes.csv' is empty; it needs rows"),
    "no test rows": (no_test_rows, "holds no rows below its header"),
    "missing file": (lambda place: (place / "notes.csv").unlink(), r"there is no data at '.*b/notes.csv'"),
    "missing column": (setting("message", "mesage"), r"no column 'mesage' \(task.text\); did you mean 'message'"),
    "encoding": (setting("delimiter", 'encoding = "ascii"\ndelimiter'), "line 3 is not ascii"),
    "delimiter": (setting('delimiter = ";"', 'delimiter = ","'), "is not the header|could not be read|has no column"),
    "label": (setting("triage_class", "message"), "which match no label; the labels are 'urgent', 'routine', 'office'"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_party_whose_data_cannot_be_read_is_named(kind, hospitals):
    main, files = hospitals
    change, sentence = UNREADABLE[kind]
    change(files[1].parent)
    with pytest.raises(fedlora.ConfigError, match=rf"^{files[1]}: .*{sentence}"):
        read_parties(files, main).federation()


def test_a_copy_of_the_model_is_compared_and_another_model_is_refused(hospitals, tmp_path):
    main, files = hospitals
    before = fedlora.run(read_parties(files, main))
    shutil.copytree(tmp_path / "encoder", tmp_path / "b" / "encoder")
    files[1].write_text(files[1].read_text() + "[model]\nname = 'encoder'\n")
    config = read_parties(files, main)
    assert config.party[1].model == {"name": str(tmp_path / "b" / "encoder")}
    assert same(fedlora.run(config).shared, before.shared)
    shutil.rmtree(tmp_path / "b" / "encoder")
    write_encoder(tmp_path / "b" / "encoder", seed=1)
    with pytest.raises(fedlora.ConfigError, match=rf"{files[1]}: its model, .* the pretrained model has other weights"):
        config.federation()


def test_the_base_model_is_loaded_once(hospitals, monkeypatch):
    from fedlora.runs import build

    main, files = hospitals
    loaded, load = [], build.load_network
    monkeypatch.setattr(build, "load_network", lambda *args: loaded.append(args) or load(*args))
    f = read_parties(files, main).federation()
    assert len(loaded) == 1 and all(own.model is f.model for own in f.parties.values())


@pytest.mark.parametrize("method", ["fedit", "fedsa-lora"])
def test_personal_scores_each_party_on_its_own_rows(method, hospitals, tmp_path):
    main, files = hospitals
    result = fedlora.run(read_parties(files, main, [f"method.name={method}"]), tmp_path / "run")
    columns = evaluate_personalization(RunFolder.open(tmp_path / "run"), 1)["columns"]
    assert columns["held"]["each"] == result.records[-1]["clients"]["each"]
    assert (columns["global"] is None) == (method == "fedsa-lora")
    assert columns["centralised"] is None and len(columns["local"]["each"]) == len(columns["tuned"]["each"]) == 3


def test_a_comparison_has_all_methods_but_the_centralised_one(hospitals, tmp_path):
    main, files = hospitals
    table = read_parties(files, main, ["rounds=1"]).table
    cells = fedlora.compare(table, ["fedit", "local"], out=tmp_path / "compare")
    assert len(list(cells)) == 2
    with pytest.raises(fedlora.ConfigError, match="'centralised' trains on the rows of all clients together"):
        fedlora.compare(table, ["centralised"])


def test_the_privacy_of_rows_is_that_of_the_party_with_the_least(hospitals):
    pytest.importorskip("opacus")
    main, files = hospitals
    privacy = "privacy={level='example', noise_multiplier=1.0, delta=1e-3}"
    report = fedlora.run(read_parties(files, main, [privacy])).summary["privacy"]
    assert set(report["clients"]) == {"0", "1", "2"}
    assert report["epsilon"] == max(report["clients"].values()) == report["clients"]["0"], "it has the fewest rows"


def test_no_distribution_is_written_where_privacy_forbids_it(hospitals, tmp_path):
    pytest.importorskip("opacus")
    main, files = hospitals
    privacy = "privacy={level='client', noise_multiplier=1.0, delta=1e-3, clip=1.0}"
    fedlora.run(read_parties(files, main, [privacy, "method.weighting=uniform"]), tmp_path / "run")
    assert not (tmp_path / "run" / "rows.json").exists()


def test_flower_refuses_the_tables_of_parties(hospitals, tmp_path):
    pytest.importorskip("flwr")
    from fedlora.flower.deploy.app_template import write_app

    main, files = hospitals
    config = read_parties(files, main)
    with pytest.raises(fedlora.ConfigError, match=r"\[\[party\]\] tables are for a rehearsal in one process"):
        fedlora.run(read_parties(files, main, ["engine.name=flower-simulation"]), tmp_path / "run")
    with pytest.raises(fedlora.ConfigError, match=r"has \[\[party\]\] tables"):
        write_app(tmp_path / "app", config)
    assert not (tmp_path / "run").exists() and not (tmp_path / "app").exists()


def test_a_rehearsal_of_pictures(tmp_path):
    """Parties of another task: embedded data, by tables in place of files."""
    table = {
        "rounds": 1, "model": {"name": str(TINY_VIT)}, "adapter": {"name": "lora", "rank": 2},
        "task": {"name": "image-classification", "data": "own", "label_names": list(map(str, range(10))),
                 "train_rows": 20, "test_rows": 9},
        "training": {"local_steps": 1, "batch_size": 4},
    }  # fmt: skip
    notes = []
    config = read_parties([{"task": {"data": "digits"}}] * 2, table, note=notes.append)
    assert notes == ["party 0 and party 1 name the same data, 'digits'."]
    result = fedlora.run(config, tmp_path / "run")
    assert torch.tensor(result.records[0]["clients"]["each"]).isfinite().all()
    assert "file" not in read_table(tmp_path / "run" / "config.toml")["party"][0]


def test_the_command_line(hospitals, tmp_path, commands):
    main, files = hospitals

    def call(*words):
        return commands.call(["fedlora", "run", *map(str, words)], tmp_path)

    names = "a/party.toml,b/party.toml,c/party.toml"
    done = call(main, "--parties", names, "--out", "run", "-o", "rounds=1")
    assert done.returncode == 0 and "all their rows" in done.stdout, done.stderr
    files[1].write_text("task.lable = 'x'\n")
    done = call(main, "--parties", names, "--out", "no")
    assert done.returncode == 2 and "fedlora: b/party.toml: there is no setting 'task.lable'" in done.stderr
    done = call("--out", "no")
    assert done.returncode == 2 and "no configuration is named" in done.stderr
    assert not (tmp_path / "no").exists()


def test_parties_with_chats_in_forms_of_their_own(tmp_path):
    """ShareGPT, and a prompt with a completion, give the bits of messages everywhere; chat reads what training did."""
    write_decoder(tmp_path / "decoder")
    (tmp_path / "federation.toml").write_text(
        dumps({
            "rounds": 1,
            "model": {"name": str(tmp_path / "decoder")},
            "task": {"name": "causal-lm", "data": "own", "chat_template": THINKER, "messages": "messages"},
            "clients": {"count": 3, "partition": {"name": "own"}},
            "adapter": {"name": "lora", "rank": 2, "alpha": 4},
            "training": {"local_steps": 2, "batch_size": 2, "learning_rate": 1e-2},
        })
    )  # fmt: skip
    talks = [[("user", f"Say {i}."), ("assistant", f"<think>easy</think>{i}."), ("user", "Again."), ("assistant", str(i))] for i in range(10)]  # fmt: skip
    messages = [[{"role": role, "content": text} for role, text in talk] for talk in talks]
    shared = [
        [{"from": {"user": "human", "assistant": "gpt"}[who], "value": text} for who, text in talk] for talk in talks
    ]
    rows = {
        "alike": [{"messages": x} for x in messages],
        "sharegpt": [{"talk": x, "conversations": 3} for x in shared],
        "pairs": [{"ask": x[:-1], "say": x[-1:]} for x in messages],
    }
    files = {}
    for name, column in (("alike", {}), ("sharegpt", {"messages": "talk"}), ("pairs", {"messages": ["ask", "say"]})):
        place = tmp_path / name
        place.mkdir()
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (place / "party.toml").write_text(dumps({"task": {"data": "rows.jsonl", **column}}))
        files[name] = place / "party.toml"
    main = tmp_path / "federation.toml"
    mixed = fedlora.run(
        read_parties([files["alike"], files["sharegpt"]] * 2, main, ["clients.count=4"]), tmp_path / "run"
    )
    alike = fedlora.run(read_parties([files["alike"]] * 4, main, ["clients.count=4"]))
    assert same(mixed.shared, alike.shared)
    sizes = json.loads((tmp_path / "run" / "rows.json").read_text())["clients"]
    assert [(own["train"], own["test"]) for own in sizes.values()] == [(16, 4)] * 4, "two samples a row"
    assert sum("in samples of their own, 16 in all" in note for note in mixed.summary["notes"]) == 4
    last = ["clients.count=1", "task.turns=last"]
    pair, whole = (fedlora.run(read_parties([files[name]], main, last)) for name in ("pairs", "alike"))
    assert same(pair.shared, whole.shared) and "notes" not in pair.summary
    chat = Chat.open(RunFolder.open(tmp_path / "run"), system="Be brief.")
    talk = [{"role": "user", "content": "Say 3."}, {"role": "assistant", "content": "<think>easy</think>3."}]
    asked = chat.prompt([*talk, {"role": "user", "content": "Again."}])
    assert asked == "[sys]Be brief.[end]\n[usr]Say 3.[end]\n[bot]3.[end]\n[usr]Again.[end]\n[bot]"
