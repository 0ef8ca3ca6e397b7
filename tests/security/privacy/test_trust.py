"""Privacy beside validation and robust rules: no client's upload may decide about another's."""

import pytest
import torch

from fedlora.adapters import LoRA
from fedlora.methods.fedit import FedIT
from fedlora.rounds import Received
from fedlora.runs.config import build
from fedlora.schema import ConfigError
from fedlora.security.validation import UploadScreen, Validation
from fedlora.types import Turn

TABLE = {
    "model": {"name": "demo-vit"},
    "task": {"name": "image-classification", "data": "digits"},
    "clients": {"count": 5},
    "method": {"name": "fedit", "weighting": "uniform"},
    "privacy": {"level": "client", "noise_multiplier": 1.0},
}


def test_a_robust_rule_needs_noise_on_every_upload():
    table = {**TABLE, "robust": {"name": "krum"}}
    with pytest.raises(ConfigError, match="privacy.noise_on = 'sum' cannot bound"):
        build(table)
    build({**table, "privacy": {**TABLE["privacy"], "noise_on": "upload"}})


@pytest.mark.parametrize("alone", [False, True])
def test_an_upload_that_is_odd_beside_the_others_stays_in_where_each_is_judged_alone(alone):
    rules, draws = {"w": FedIT(LoRA(rank=2))}, torch.Generator().manual_seed(0)
    shared = {"w": rules["w"].adapter.init(6, 5, 0)}
    screen = UploadScreen(Validation(), rules, shared, {}, alone=alone)

    def upload(client, size):
        tree = {"w": {leaf: x + size * torch.randn(x.shape, generator=draws) for leaf, x in shared["w"].items()}}
        return Received(Turn(0, client, 2), 10, tree)

    arrived = [screen.check(upload(client, 50.0 if client == 3 else 0.1)) for client in range(4)]
    assert None not in arrived
    good = {found.turn.client for found in screen.compare(arrived, lambda upload: 10)}
    assert good == ({0, 1, 2, 3} if alone else {0, 1, 2})
