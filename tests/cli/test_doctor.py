"""``fedlora doctor``: what works, what is broken, what is missing; and each self-test really runs."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from fedlora.cli import _selftests as selftests
from fedlora.cli import doctor
from fedlora.cli.doctor import BROKEN, MISSING, WORKS
from fedlora.reporting.terminal import show


def test_every_test_has_its_packages_and_every_extra_is_tested():
    import tomllib
    from pathlib import Path

    assert list(doctor.PACKAGES) == list(selftests.TESTS)
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(extras) - {"dev", "track", "docs", "report"} <= set(doctor.PACKAGES)


def test_what_is_found_and_said(capsys):
    heard = []

    def run(name):
        return {"state": BROKEN, "said": "[red]no\x1b[2J"} if name == "peft" else {"state": WORKS, "said": "well"}

    found = doctor.examine(run, heard.append)
    assert found["broken"] == ["peft"] and "torch" in heard
    missing = [one for one in found["tests"] if one["state"] == MISSING]
    assert all(one["said"] == f"pip install 'fedlora[{one['name']}]'" and one["name"] not in heard for one in missing)
    assert json.loads(json.dumps(found)) == found and found["memory"]["free"] > 0
    show(*doctor.describe(found))
    out = capsys.readouterr().out
    assert "Broken: peft." in out and "[red]no" in out and "\x1b" not in out


def test_a_missing_core_package_is_broken_not_optional(monkeypatch):
    monkeypatch.setattr(doctor, "find_version", lambda package: None)
    found = doctor.examine(lambda name: {"state": BROKEN, "said": "No module named 'torch'"})
    assert found["broken"] == list(doctor.CORE)
    assert {one["state"] for one in found["tests"] if one["name"] not in doctor.CORE} == {MISSING}


@pytest.mark.parametrize(
    "code, said",
    [
        ("import os; os._exit(3)", "it ended with status 3"),
        ("raise OSError('libx.so.1: no such file')", "OSError: libx.so.1: no such file"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it ended with status -11"),
    ],
)
def test_a_package_that_crashes_only_says_that_it_is_broken(code, said, monkeypatch):
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: real([sys.executable, "-c", code], **more))
    assert doctor.run_in_process("peft") == {"state": BROKEN, "said": said}


def test_one_that_never_answers(monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT", 0.2)
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **more: real([sys.executable, "-c", "import time; time.sleep(60)"], **more)
    )
    assert "did not answer" in doctor.run_in_process("peft")["said"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["torch", "model", "figures", "peft", "dp", "flower"])
def test_the_operations_work_here(name):
    needs = {"peft": "peft", "dp": "opacus", "flower": "flwr"}
    if name in needs and find_spec(needs[name]) is None:
        pytest.skip(f"{needs[name]} is not installed")
    found = selftests.TESTS[name]()
    assert found["said"] and (name != "torch" or found["devices"][0]["name"] == "cpu")


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_package_fails_its_test(monkeypatch):
    import torch

    monkeypatch.setattr(torch.Tensor, "T", property(lambda self: self.mT * 2), raising=False)
    with pytest.raises(AssertionError, match="a gradient is wrong"):
        selftests.try_torch()


def test_exit_status_1_where_something_is_broken(monkeypatch):
    import typer

    for broken, leaves in ((["peft"], True), ([], False)):
        monkeypatch.setattr(doctor, "examine", lambda begin, broken=broken: {"broken": broken})
        if leaves:
            with pytest.raises(typer.Exit) as left:
                doctor.doctor_command(as_json=True)
            assert left.value.exit_code == 1
        else:
            doctor.doctor_command(as_json=True)


TRACKERS = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = ["selftests", name]
    runpy.run_module("fedlora.cli._selftests", run_name="__main__")
"""


@pytest.mark.parametrize(
    "packages",
    [("tensorboard",), pytest.param(("mlflow", "wandb", "trackio"), marks=pytest.mark.slow)],
    ids=lambda packages: "-".join(packages),
)
def test_each_tracker_keeps_a_round_and_says_nothing_on_stdout(packages):
    """A word on stdout, also at exit, would spoil the answer of a command with --json."""
    names = [f"track-{one}" for one in packages if find_spec(one) is not None]
    if not names:
        pytest.skip("not installed")
    done = subprocess.run([sys.executable, "-c", TRACKERS, *names], capture_output=True, text=True, check=False)
    assert done.stdout == '{"said": "a round is kept"}\n' * len(names), done.stderr
