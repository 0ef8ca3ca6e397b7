"""Flower's own simulation, really run: Ray starts, actors train, the bits are those of one process."""

import pytest

pytest.importorskip("ray", reason="needs the flower-simulation extra")

import fedlora
from fedlora import methods
from fedlora.config import ConfigError
from tests.flower.test_engine import trained
from tests.flower.world import config, overrides, same

pytestmark = [pytest.mark.flower, pytest.mark.slow]
