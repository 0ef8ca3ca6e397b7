"""A run's model writes programs for a benchmark, and they can be graded."""

import json

import pytest
from typer.testing import CliRunner

from fedlora.api import run
from fedlora.cli import app
from fedlora.runs.config import build

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    place = tmp_path_factory.mktemp("solving") / "run"
    table = {
        "rounds": 1,
        "model": {"name": str(shared / "models" / "stories260k-llama")},
        "task": {
            "name": "causal-lm", "data": str(shared / "data" / "shakespeare_roles"), "text": "text",
            "max_length": 32, "train_rows": 40, "test_rows": 10,
        },
        "clients": {"count": 2},
        "training": {"local_steps": 1, "batch_size": 4},
    }  # fmt: skip
    run(build(table), place)
    return place


@pytest.fixture
def data(shared, tmp_path):
    """Three problems, one of them with a prompt beyond what the model reads."""
    import gzip

    with gzip.open(shared / "data" / "humaneval" / "test.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][:3]
    rows[2]["prompt"] = rows[2]["prompt"] * 20
    place = tmp_path / "problems.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def asked(folder, data, out, *more):
    return CliRunner().invoke(
        app, ["solve", str(folder), "--data", str(data), "--out", str(out), "--max-new-tokens", "8", *more]
    )


def test_answers_are_written_and_graded(folder, data, tmp_path):
    out = tmp_path / "answers.jsonl"
    done = asked(folder, data, out)
    assert (
        done.exit_code == 0 and "2 answers to 3 problems" in done.stdout and "1 problems leave no room" in done.stderr
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["task_id"] for line in lines] and len({line["task_id"] for line in lines}) == 2
    again = asked(folder, data, tmp_path / "other.jsonl", "--batch-size", "1")
    other = [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()]
    assert again.exit_code == 0 and sorted(map(str, other)) == sorted(map(str, lines)), "a batch changes no answer"


def test_a_file_that_was_cut_off_is_gone_on_with(folder, data, tmp_path):
    out = tmp_path / "answers.jsonl"
    asked(folder, data, out)
    whole = out.read_text()
    out.write_text(whole[: whole.index("\n") + 5])
    assert asked(folder, data, out).exit_code == 0
    assert sorted(out.read_text().splitlines()) == sorted(whole.splitlines())


def test_several_samples_need_a_temperature(folder, data, tmp_path):
    wrong = asked(folder, data, tmp_path / "a.jsonl", "--samples", "2")
    assert wrong.exit_code != 0 and "--temperature 0 all are alike" in str(wrong.exception)
    assert not (tmp_path / "a.jsonl").exists()
    drawn = asked(folder, data, tmp_path / "b.jsonl", "--samples", "3", "--temperature", "1.0")
    assert drawn.exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    first = [line["completion"] for line in lines if line["task_id"] == lines[0]["task_id"]]
    assert len(first) == 3 and len(set(first)) > 1
