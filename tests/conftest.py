"""What all tests have in common: one thread, no network, reference runs, commands, and the real data where it is."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits leaves its core to the other workers

import pytest
import torch

from tests.fixtures import commands as command_server
from tests.fixtures.federation import REFERENCE, config, settings
from tests.fixtures.schedule import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401
from tests.fixtures.times import pytest_addoption, pytest_configure  # noqa: F401

# Two busy threads on one core wait for each other. FEDLORA_TEST_THREADS=2 runs the same tests with sums that are split
# over two threads; what tests assert holds for them, too.
os.environ["OMP_NUM_THREADS"] = os.environ.get("FEDLORA_TEST_THREADS", "1")  # child processes inherit it
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the project; FEDLORA_SHARED names another place."""
    folder = Path(os.environ.get("FEDLORA_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip("the real data and models do not lie beside the project (FEDLORA_SHARED names another place)")
    return folder


@pytest.fixture(scope="session")
def commands(testrun_uid):
    """Runs ``fedlora`` and ``python`` as forked processes that have everything imported."""
    with command_server.lease(testrun_uid[:12]) as client:
        yield client


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """``reference(method)``: the finished run of ``settings(method)`` with ``REFERENCE``, made once a worker.

    Its result holds trees, records, ledger and folder; tests of other engines, plans, exports and resumed runs compare
    with it and leave it as it is.
    """
    import fedlora

    folder, runs = tmp_path_factory.mktemp("reference"), {}

    def run(name: str):
        if name not in runs:
            runs[name] = fedlora.run(config(*settings(name), *REFERENCE), folder / name)
        return runs[name]

    return run
