"""`fedlora flower` and what a user gets wrong with it: one sentence, exit status 2, nothing written."""

import sys
import tomllib

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

from typer.testing import CliRunner

from fedlora import cli
from fedlora.flower.deploy.local import build_node_configs
from fedlora.flower.deploy.node_config import apply_node_config, state_folder
from fedlora.runs.config import build, read
from fedlora.schema import ConfigError, dumps
from tests.fixtures.federation import TABLE


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "fed.toml"
    path.write_text(dumps(TABLE))
    return path


def said(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err.strip()


def test_init_writes_an_app_that_flower_accepts(toml, tmp_path):
    from flwr.common.config import get_project_config  # Flower's own reading of an app

    found = CliRunner().invoke(cli.app, ["flower", "init", str(tmp_path / "My app"), "--config", str(toml)])
    assert found.exit_code == 0, found.output
    app = get_project_config(str(tmp_path / "My app"))["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "my_app.server_app:app", "clientapp": "my_app.client_app:app"}
    assert app["config"]["out"] == "runs/My app"
    config = read(tmp_path / "My app" / "my_app" / "config.toml")
    assert config.table == read(toml).table
    text = (tmp_path / "My app" / "pyproject.toml").read_text()
    assert tomllib.loads(text)["project"]["dependencies"] == []


@pytest.mark.parametrize(
    "words,sentence",
    [
        (["init", "{there}", "--config", "{toml}"], "exists already and is not empty; name another folder"),
        (["init", "{new}", "--config", "{missing}"], "there is no configuration file"),
        (["init", "{new}", "--config", "{toml}", "-o", "method.name=fedsalora"], "did you mean 'fedsa-lora'"),
        (["local", "{toml}", "--insecure", "--tls"], "--insecure and --tls exclude each other"),
        (["local", "{toml}", "--parties", "{missing}"], "there is no configuration file"),
        (["local", "{toml}", "-o", "flower.secure_aggregation=true", "--nodes", "2"], "it needs 3 clients"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, toml, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    places = {"toml": toml, "there": tmp_path / "there", "new": tmp_path / "new", "missing": tmp_path / "missing.toml"}
    code, text = said(capsys, monkeypatch, "flower", *(word.format(**places) for word in words))
    assert code == 2
    assert sentence in text and "Traceback" not in text and len(text.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_flower_that_is_not_installed_is_said(toml, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    code, text = said(capsys, monkeypatch, "flower", "init", tmp_path / "new", "--config", toml)
    assert code == 2 and "pip install 'fedlora[flower]'" in text
    monkeypatch.setitem(sys.modules, "fedlora.flower.simulation", None)
    code, text = said(capsys, monkeypatch, "run", toml, "--engine", "flower-simulation", "--out", tmp_path / "run")
    assert code == 2 and "install fedlora[flower-simulation]" in text


def test_a_wrong_engine_is_said(toml, tmp_path, capsys, monkeypatch):
    code, text = said(capsys, monkeypatch, "run", toml, "--engine", "flower", "--out", tmp_path / "run")
    assert (
        code == 2
        and "there is no engine 'flower'; did you mean 'flower-simulation'? The engines are flower-simulation, inprocess."
        in text
    )


def test_a_node_may_say_what_is_its_own_machines_and_nothing_else():
    own = {"client": 1, "state": "x", "task.data": "mine.csv", "task.text": "first, second", "engine.threads": 2}
    found = apply_node_config({**TABLE, "task": {**TABLE["task"], "name": "text-classification"}}, own)
    assert found["task"]["data"] == "mine.csv" and found["task"]["text"] == ["first", "second"]
    assert found["engine"] == {"threads": 2} and found["clients"] == TABLE["clients"]
    pairs = {"client": 1, "state": "x", "task.source": "question", "task.target": "answer"}  # a party's own columns
    found = apply_node_config({**TABLE, "task": {"name": "seq2seq", "data": "x"}}, pairs)
    assert (found["task"]["source"], found["task"]["target"]) == ("question", "answer")
    for key in ("training.learning_rate", "task.daat", "method.name"):
        with pytest.raises(ConfigError, match=f"there is no setting '{key}'"):
            apply_node_config(TABLE, {"client": 0, key: 1})
    with pytest.raises(ConfigError, match="client = None; start the node with its number, from 0"):
        state_folder({})
    assert state_folder({"client": 3}).name == "client-3"


def test_parties_of_a_file(tmp_path):
    path = tmp_path / "parties.toml"
    path.write_text('[[party]]\nclient = 1\ntask.data = "b.csv"\n[[party]]\nclient = 0\n"task.data" = "a.csv"\n')
    config = build({**TABLE, "clients": {"count": 2}})
    found = build_node_configs(config, tmp_path / "out", path)
    assert [(own["client"], own["task.data"]) for own in found] == [(1, "b.csv"), (0, "a.csv")]
    assert found[0]["state"].endswith("out/nodes/0")
    with pytest.raises(ConfigError, match=r"has 2 \[\[party\]\] tables, but clients.count is 3"):
        build_node_configs(build(TABLE), tmp_path / "out", path)
    path.write_text("[[party]]\nclient = 1\n[[party]]\nclient = 1\n")
    with pytest.raises(ConfigError, match=r"the parties are clients \[1, 1\]; each of 0 to 1 is needed"):
        build_node_configs(config, tmp_path / "out", path)


OWN = {**TABLE, "clients": {"count": 2, "partition": {"name": "own"}}}


def test_parties_with_data_of_their_own_need_labels_and_flower():
    with pytest.raises(
        ConfigError, match="every client has its own data on its own machine; run it with `fedlora flower"
    ):
        build({**OWN, "task": {**TABLE["task"], "label_names": [str(i) for i in range(10)]}}).federation()
    with pytest.raises(ConfigError, match="the labels must be agreed beforehand; set task.label_names"):
        build(OWN).federation(combines=True)
