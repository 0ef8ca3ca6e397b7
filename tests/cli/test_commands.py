"""The command line as a user meets it: in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedlora.cli.run import DEMO_METHODS
from tests.fixtures.toml import TOML


@pytest.fixture
def cli(commands, tmp_path):
    (tmp_path / "my.toml").write_text(TOML)

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return commands.call(["fedlora", *arguments], tmp_path, {**os.environ, **environment})

    return call


def test_help_and_version_import_nothing_heavy(cli):
    found = cli("--help")
    assert found.returncode == 0
    assert all(name in found.stdout for name in ("run", "compare", "methods", "show", "personal", "demo", "new-method"))
    code = "import sys, fedlora.cli; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert cli("--version").stdout.startswith("fedlora 0.")


def test_run_show_and_json(cli, tmp_path):
    first = cli("run", "my.toml", "--out", "runs/a", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["final"]["global"]["accuracy"] > 0
    assert first.stderr == "", "quiet where nobody watches"
    assert "global accuracy" in cli("show", "runs/a").stdout
    assert json.loads(cli("show", "runs/a", "--json").stdout)["records"][0]["round"] == 1
    second = cli("run", "my.toml", "--out", "runs/a")
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr == (
        "fedlora: 'runs/a' holds a run already; `fedlora resume runs/a` goes on with it, or choose another folder "
        "with --out.\n"
    )


def test_compare_draws_and_tabulates(cli, tmp_path):
    found = cli("compare", "my.toml", "--methods", "fedit,ravan,centralised", "--seeds", "0,1", "--out", "c")
    assert found.returncode == 0, found.stderr
    assert all(name in found.stdout for name in ("fedit", "ravan", "centralised", "±"))
    for name in ("accuracy-by-round", "accuracy-by-megabyte"):
        assert (tmp_path / "c" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (tmp_path / "c" / f"{name}.svg").read_text()
    rows = json.loads(cli("show", "c", "--json").stdout)["rows"]
    assert [row["method"] for row in rows] == ["fedit", "ravan", "centralised"]
    assert rows[0]["mb_up"]["mean"] > 0


# Jobs begin as processes that import everything anew. These begin as forks, so that everything is there.
FORKED = """
import multiprocessing, sys
from fedlora.runs import compare
compare.get_context = lambda kind: multiprocessing.get_context({"spawn": "fork"}[kind])
from fedlora.cli import main
main()
"""


def test_two_jobs_come_to_what_one_does(cli, commands, tmp_path):
    arguments = ["compare", "my.toml", "--methods", "fedit,local,ravan", "--json", "--out"]
    one = cli(*arguments, "one")
    two = commands.call(["python", "-c", FORKED, *arguments, "two", "--jobs", "2"], tmp_path)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    rows = [json.loads(found.stdout)["rows"] for found in (one, two)]
    assert [row["method"] for row in rows[0]] == ["fedit", "local", "ravan"]
    assert [{**row, "seconds": None} for row in rows[0]] == [{**row, "seconds": None} for row in rows[1]]
    for name in ("fedit", "ravan"):
        folders = [tmp_path / kind / f"{name}-seed0" / "shared.safetensors" for kind in ("one", "two")]
        assert folders[0].read_bytes() == folders[1].read_bytes(), name


@pytest.mark.slow
def test_the_demo(tmp_path):
    """What ``make demo`` runs, as it is: eight methods, two jobs in processes of their own, one to three minutes."""
    command = [sys.executable, "-m", "fedlora", "demo", "--jobs", "2", "--out", "demo"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "demo" / "comparison.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(DEMO_METHODS) and all(name in found.stdout for name in DEMO_METHODS)
    assert all(row["diverged"] == 0 and row["clients"]["mean"] > 0.5 for row in rows), "chance is a tenth"
    for name in ("accuracy-by-round", "accuracy-by-megabyte"):
        assert (tmp_path / "demo" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "demo" / "demo.toml").exists()


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["run", "my.toml", "-o", "method.name=fedditt"], "there is no method 'fedditt'; did you mean 'fedit'"),
        (["run", "none.toml"], "there is no configuration file 'none.toml'"),
        (["run", "my.toml", "-o", "task.label=lable"], "the data has no column 'lable'"),
        (["run", "my.toml", "--out", "my.toml/x"], "cannot write to 'my.toml/x'"),
        (["compare", "my.toml", "--methods", "fedit", "--seeds", "a"], "--seeds is 'a'"),
        (["compare", "my.toml", "--methods", "fedit,flora-nb"], "did you mean 'flora-na'"),
        (["methods", "ravann"], "did you mean 'ravan'"),
        (["show", "."], "holds no finished run"),
    ],
)
def test_mistakes_end_with_2_and_one_sentence(cli, arguments, sentence):
    found = cli(*arguments)
    assert found.returncode == 2
    assert found.stdout == ""
    assert sentence in found.stderr
    assert found.stderr.count("\n") == 1, found.stderr


def test_methods(cli):
    table = cli("methods").stdout
    assert all(name in table for name in ("fedit", "flora-na", "fedsa-lora", "ravan"))
    found = {one["name"]: one for one in json.loads(cli("methods", "--json").stdout)}
    assert found["ffa-lora"]["claims"] == {
        "exact": True,
        "lossy": False,
        "any_rank": False,
        "personal": False,
        "secure_aggregation": True,
    }
    assert found["fedit"]["bytes"] == {"up": 8 * (768 + 768) * 4, "down": 8 * (768 + 768) * 4}
    assert found["fedsa-lora"]["bytes"]["up"] == 8 * 768 * 4
    assert "FLoRA-NA" in cli("methods", "flora-na").stdout


@pytest.fixture
def interrupted(cli):
    """Runs a command and presses Ctrl-C once in it when the run in ``folder`` has finished so many rounds."""

    def call(folder: Path, rounds: int, *arguments: str) -> subprocess.CompletedProcess:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(cli, *arguments)
            until = time.monotonic() + 120
            while _rounds(folder) < rounds:
                assert not waiting.done() and time.monotonic() < until, waiting.done() and waiting.result()
                time.sleep(0.02)
            os.kill(json.loads((folder / "progress.json").read_text())["pid"], signal.SIGINT)
            return waiting.result()

    return call


def _rounds(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if (folder / "progress.json").exists() and path.exists() else 0


def test_ctrl_c_keeps_finished_rounds(interrupted, tmp_path):
    folder = tmp_path / "r"
    stopped = interrupted(folder, 2, "run", "my.toml", "-o", "rounds=5000", "--out", "r")
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    assert "what was finished is in r" in stopped.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["rounds"] == _rounds(folder) >= 2
    assert (folder / "shared.safetensors").exists()


def test_ctrl_c_in_a_comparison_says_what_is_left(cli, interrupted, tmp_path):
    stopped = interrupted(
        tmp_path / "c" / "svd-seed0", 1, "compare", "my.toml", "--methods", "fedit,svd", "-o", "rounds=3000",
        "-o", "compare.fedit.rounds=1", "--out", "c",
    )  # fmt: skip
    assert stopped.returncode == 130 and stopped.stdout == ""
    assert stopped.stderr.endswith(
        "The runs that were finished are in c, each in a folder of its own; the same command with --out c goes on.\n"
        "Stopped.\n"
    )
    assert "stopping after this step; Ctrl-C again leaves at once" in stopped.stderr
    found = cli("show", "c")
    assert found.returncode == 2 and "holds the folders of runs and no comparison of them" in found.stderr
    assert cli("show", "c/fedit-seed0").returncode == 0


def test_a_run_that_could_not_begin_leaves_no_folder(cli, tmp_path):
    assert cli("run", "my.toml", "-o", "task.label=lable", "--out", "r").returncode == 2
    assert not (tmp_path / "r").exists()


def test_settings_of_one_method_only(cli, tmp_path):
    (tmp_path / "my.toml").write_text(TOML + "\n[compare.ravan.training]\nlearning_rate = 0.25\n")
    found = cli("compare", "my.toml", "--methods", "fedit,ravan", "--out", "c", "--json")
    assert found.returncode == 0, found.stderr
    assert "learning_rate = 0.25" in (tmp_path / "c" / "ravan-seed0" / "config.toml").read_text()
    assert "learning_rate = 0.001" in (tmp_path / "c" / "fedit-seed0" / "config.toml").read_text()


def test_personal_and_groups_by_capability(cli, tmp_path):
    unequal = ["clients.count=8", "clients.new=1", "clients.capability=uniform", "clients.dropout=0.25"]
    settings = [x for item in [*unequal, "method.name=hetlora"] for x in ("-o", item)]
    ran = cli("run", "my.toml", "--out", "run", *settings)
    assert ran.returncode == 0 and ran.stderr == "", "what the configuration asks for is no news"
    assert "capability 0.25, " in cli("show", "run").stdout
    found = cli("personal", "run", "--steps", "2")
    assert found.returncode == 0, found.stderr
    for word in ("what it holds", "after 2 steps of its own", "alone", "centralised", "that never took part"):
        assert word in found.stdout
    written = json.loads((tmp_path / "run" / "personal.json").read_text())
    assert json.loads(cli("personal", "run", "--steps", "2", "--json").stdout) == written
    cli("compare", "my.toml", "--methods", "hetlora,local", "--out", "c", *settings[:-2])
    assert "by the clients' capability" in cli("show", "c").stdout
    assert len(json.loads((tmp_path / "c" / "comparison.json").read_text())["rows"][1]["capability"]) == 4


def test_aggregate_and_export(cli, tmp_path):
    cli("run", "my.toml", "--out", "run", "-o", "clients.count=3", "-o", "method.name=fedsa-lora")
    exported = cli("export", "run", "--out", "own", "--all-clients", "--json")
    assert exported.returncode == 0, exported.stderr
    rows = json.loads(exported.stdout)
    assert [row["client"] for row in rows] == [0, 1, 2] and max(row["difference"] for row in rows) < 1e-4
    merged = cli("aggregate", "own/0", "own/1", "own/2", "--weights", "2,1,1", "--out", "merged")
    assert merged.returncode == 0, merged.stderr
    assert "error against the exact mean" in merged.stdout
    assert (tmp_path / "merged" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["aggregate", "nowhere", "--out", "o"], "holds no adapter_config.json"),
        (["aggregate", ".", "--out", "o", "--weights", "a,b"], "--weights is 'a,b'; it should be numbers with commas"),
        (["aggregate", ".", "--out", "o", "--method", "fedsa-lora"], "a model of its own"),
        (["export", ".", "--out", "o"], "holds no finished run"),
        (["personal", "."], "holds no finished run"),
        (["run", "my.toml", "-o", "clients.capability=bel"], "did you mean 'bell'"),
        (["export", ".", "--out", "o", "--client", "1", "--all-clients"], "exclude each other"),
        (["compare", "my.toml"], "--methods names no method"),
    ],
)
def test_mistakes_with_folders(cli, arguments, sentence):
    done = cli(*arguments)
    assert done.returncode == 2 and sentence in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
