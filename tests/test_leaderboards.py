"""The leaderboards' protocols: every label of their command builds, and each runs at toy size with its own settings."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

import fedlora
from fedlora.runs.compare import for_label
from fedlora.runs.config import build, read
from fedlora.schema import read_table
from tests.fixtures.networks import write_decoder

PLACE = Path(__file__).parents[1] / "examples" / "leaderboards"
FILES = sorted(PLACE.glob("*.toml"))
CONVERTER = runpy.run_path(str(PLACE / "fed_aya.py"))
read_clients, write_splits = CONVERTER["read_clients"], CONVERTER["write_splits"]
by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def write_rows(folder, clients):
    row = {"instruction": "add the numbers", "input": "one and two", "output": "three", "response": "three"}
    (folder / "raw.json").write_text(json.dumps({str(k): [row] * 12 for k in range(clients)}))
    write_splits(read_clients(folder / "raw.json"), folder / "rows")


@by_name
def test_every_label_of_its_command_builds(path):
    table = read_table(path)
    words = shlex.split(re.match("# (fedlora compare .*)", path.read_text()).group(1))
    assert words[2].endswith(f"leaderboards/{path.name}")
    for label in words[words.index("--methods") + 1].split(","):
        config = build(for_label(table, label))
        assert config.rounds == 200 and config.clients.count == table["clients"]["count"]


@by_name
def test_it_runs_and_is_planned_at_toy_size(path, tmp_path):
    table = read_table(path)
    write_rows(tmp_path, table["clients"]["count"])
    write_decoder(tmp_path / "model")
    toy = [f"model.name={tmp_path / 'model'}", f"task.data={tmp_path / 'rows'}", "rounds=2", "training.local_steps=1",
           "training.batch_size=2", "engine.threads=1"]  # fmt: skip
    config = read(path, toy)
    table = {**config.table, "model": {"name": str(tmp_path / "model")}}
    plan = fedlora.plan(table)
    assert plan
    result = fedlora.run(table)
    record = result.records[-1]
    assert result.summary["rounds"] == 2 and len(record["cohort"]) == table["clients"]["per_round"]
    assert 1 < result.summary["final"]["clients"]["mean"] < float("inf")


def test_the_prompt_is_the_templates():
    config = build({k: v for k, v in read_table(PLACE / "flowertune-code.toml").items() if k != "compare"})
    prompt, response = config.task.prompt, config.task.response
    whole = (prompt + response).format(instruction="Sort this.", input="3 1", output="1 3")
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert whole == f"{head}\n### Instruction:\nSort this. 3 1\n### Response: 1 3"


def test_rows_of_fedllm_bench_keep_their_client(tmp_path):
    rows = [{"instruction": f"ask {i}", "response": "é"} for i in range(25)]
    for content in ([rows, rows[:3]], {"a": rows, "b": rows[:3]}):
        (tmp_path / "raw.json").write_text(json.dumps(content))
        write_splits(read_clients(tmp_path / "raw.json"), tmp_path / "out")
        train, test = (
            [json.loads(x) for x in (tmp_path / "out" / f"{s}.jsonl").read_text(encoding="utf-8").splitlines()]
            for s in ("train", "test")
        )
        assert [(r["client"], r["instruction"]) for r in test] == [("00", "ask 9"), ("00", "ask 19"), ("01", "ask 2")]  # fmt: skip
        assert len(train) == 25 and {r["client"] for r in train} == {"00", "01"}


@pytest.mark.parametrize("content", [{"a": 1}, [], [[{"x": 1}]], "text"])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "raw.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="raw.json"):
        read_clients(tmp_path / "raw.json")
