"""A comparison's labels: methods by name, variants by a table of their own."""

import pytest

from fedlora.runs.compare import for_label, plan_cells
from fedlora.runs.config import build
from fedlora.schema import ConfigError

TABLE = {
    "rounds": 2,
    "model": {"name": "demo-vit"},
    "task": {"name": "image-classification", "data": "digits"},
    "adapter": {"name": "lora", "rank": 4, "alpha": 8},
    "compare": {
        "half": {"method": {"name": "fedrot-lora", "strength": 0.5}},
        "full": {"method": {"name": "fedrot-lora", "strength": 1.0}, "training": {"learning_rate": 0.5}},
        "rotated-vera": {"method": {"name": "fedsa-lora"}, "adapter": {"name": "vera"}},
        "nameless": {"training": {"learning_rate": 0.1}},
    },
}


def test_a_label_of_ones_own_is_a_variant_of_the_method_that_it_names():
    half, full = (build(for_label(TABLE, label)) for label in ("half", "full"))
    assert (half.method.strength, full.method.strength) == (0.5, 1.0)
    assert full.training.learning_rate == 0.5 and half.training.learning_rate != 0.5
    assert half.method.adapter.rank == 4
    assert type(build(for_label(TABLE, "rotated-vera")).method.adapter).__name__ == "VeRA"


def test_variants_are_cells_of_their_own():
    cells = plan_cells(TABLE, ["half", "full", "fedit"], [0, 1], None)
    assert [(cell.label, cell.seed) for cell in cells][:3] == [("half", 0), ("half", 1), ("full", 0)]
    assert len({str(cell.table) for cell in cells}) == 6


def test_a_label_that_names_no_method_is_one_sentence():
    with pytest.raises(ConfigError, match="compare.nameless.*give it method.name"):
        for_label(TABLE, "nameless")
    with pytest.raises(ValueError, match="no method 'halv'"):
        for_label(TABLE, "halv")
