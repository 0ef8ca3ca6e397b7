"""What all tests have in common: one thread, no network, and the real data where it is."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)  # two busy threads on one core wait for each other


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the project; FEDLORA_SHARED names another place."""
    folder = Path(os.environ.get("FEDLORA_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip("the real data and models do not lie beside the project (FEDLORA_SHARED names another place)")
    return folder
