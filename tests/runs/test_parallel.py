"""Clients that train in two processes equal one: DDP and FSDP2, in a plain loop and in Trainers, and DeepSpeed."""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedlora.runs.folder import RunFolder
from tests.fixtures import parallel_clients as cases

ROOT = Path(__file__).parents[2]
PROCESSES = 2
pytestmark = pytest.mark.xdist_group("parallel")  # two processes are as many as a small machine has


def start(case, folder, timeout=240):
    """Start a case in two processes, and return what came of it."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    return subprocess.run(
        [*launch, "--module", "tests.fixtures.parallel_clients", case, str(folder)],
        env={**os.environ, **settings, "PYTHONPATH": path}, cwd=folder, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def start_well(case, folder):
    done = start(case, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    return start_well("sessions", tmp_path_factory.mktemp("sessions"))


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    return start_well("trainers", tmp_path_factory.mktemp("trainers"))


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    if find_spec("deepspeed") is None:  # not imported here: it would change other tests of this process
        pytest.skip("DeepSpeed is not installed; pip install 'fedlora[deepspeed]'")
    return start_well("deepspeed", tmp_path_factory.mktemp("deepspeed"))


def read(folder, name):
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def check_equal_to(expected, folder, name):
    """Compare both processes' leaves, losses and scores with those of one process, to 1e-5 of the largest value."""
    first, second = read(folder, name)
    assert first["leaves"].keys() == second["leaves"].keys() == expected["leaves"].keys()
    for key, x in expected["leaves"].items():
        assert torch.equal(first["leaves"][key], second["leaves"][key]), key
        torch.testing.assert_close(first["leaves"][key], x, rtol=0, atol=1e-5 * max(1.0, float(x.abs().max())))
    assert first["records"] == second["records"]
    for mine, theirs in zip(first["records"], expected["records"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["scores"] == pytest.approx(theirs["scores"], rel=1e-5)


def alone(tmp_path, result):
    cases.save(tmp_path, "alone", result)
    return torch.load(tmp_path / "alone-0.pt", weights_only=True)


def refusal(folder, name):
    """Return the sentence that both processes ended with."""
    first, second = ((folder / f"{name}-{rank}.txt").read_text() for rank in range(PROCESSES))
    assert first.split("Error: ")[-1] == second.split("Error: ")[-1]
    return min(first, second, key=len)


# ------------------------------------------------------------------------------------------------ plain loops
@pytest.mark.parametrize("wrapper", cases.WRAPPERS)
@pytest.mark.parametrize("method", cases.METHODS)
def test_session_in_two_processes_equals_one(sessions, tmp_path, method, wrapper):
    expected = alone(tmp_path, cases.run_session(method).result)
    check_equal_to(expected, sessions, f"{wrapper}-{method}")


@pytest.mark.parametrize("wrapper", cases.WRAPPERS)
def test_session_goes_on_from_a_folder_in_two_processes(sessions, tmp_path, wrapper):
    check_equal_to(alone(tmp_path, cases.run_session("flora").result), sessions, f"{wrapper}-resumed")
    assert len(RunFolder(sessions / f"{wrapper}-saved").records) == 1  # of one process, after its one round


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("apart", "2 processes have trained this client, each by itself"),
        ("ranks", "a weight that is divided over processes keeps its shape; give all clients one rank, or use DDP"),
        ("fsdp1", "is flattened by FSDP version 1, so adapters cannot be read from it; use FSDP2"),
        ("examples", "client 0's number of examples is not the same on ranks 0 and 1"),
    ],
)
def test_session_refuses_what_would_be_wrong(sessions, name, sentence):
    assert sentence in refusal(sessions, name)


# --------------------------------------------------------------------------------------------------- Trainers
def run_alone(tmp_path, method, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return alone(tmp_path, cases.run_trainers(method, tmp_path, **options))


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", cases.WRAPPERS)
@pytest.mark.parametrize("method", cases.METHODS)
def test_trainers_in_two_processes_equal_one(trainers, tmp_path, method, wrapper):
    check_equal_to(run_alone(tmp_path, method), trainers, f"{wrapper}-{method}")


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", cases.WRAPPERS)
def test_trainers_go_on_in_two_processes(trainers, tmp_path, wrapper):
    check_equal_to(run_alone(tmp_path, "flora"), trainers, f"{wrapper}-resumed")
    run = RunFolder(trainers / f"{wrapper}-run")
    assert run.is_finished(2)
    assert [record["round"] for record in run.records] == [1, 2]


@pytest.mark.slow
def test_moments_are_kept_under_ddp(trainers, tmp_path):
    expected = run_alone(tmp_path, "fedit", **cases.ADAM)
    check_equal_to(expected, trainers, "moments")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("moments", "keep_optimizer needs an optimizer whose moments are whole in each process"),
        ("scale", "BertForSequenceClassification is a mean over each process's rows"),
        ("fsdp1", "the Trainer uses FSDP version 1"),
    ],
)
def test_trainers_refuse_what_would_be_wrong(trainers, name, sentence):
    assert sentence in refusal(trainers, name)


# -------------------------------------------------------------------------------------------------- DeepSpeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", cases.STAGES)
@pytest.mark.parametrize("method", cases.METHODS)
def test_trainers_under_deepspeed_equal_one_process(deepspeed, tmp_path, method, stage):
    check_equal_to(run_alone(tmp_path, method, **cases.UNEQUAL), deepspeed, f"{stage}-{method}")


@pytest.mark.slow
def test_trainers_go_on_under_deepspeed(deepspeed, tmp_path):
    check_equal_to(run_alone(tmp_path, "flora", **cases.UNEQUAL), deepspeed, "resumed")


@pytest.mark.slow
def test_no_engine_of_deepspeed_outlives_its_turn(deepspeed):
    assert (deepspeed / "engines-0.txt").read_text() == "[0, 0]"  # after each round


@pytest.mark.slow
def test_moments_are_not_kept_under_deepspeed(deepspeed):
    assert "keep_optimizer needs an optimizer whose moments are whole in each process" in refusal(deepspeed, "moments")


# ----------------------------------------------------------------------------------------------------- errors
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("failure_in_training", "rank 1 has ended: ZeroDivisionError: division by zero"),
        ("failure_in_recording", "the screen is broken"),
    ],
)
def test_an_error_of_one_process_ends_both(tmp_path, case, sentence):
    done = start(case, tmp_path, timeout=120)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert (tmp_path / "run" / "config.toml").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
