"""What has no sound analysis is refused, with its reason, in one sentence."""

import re

import pytest

from fedlora.methods import METHODS
from fedlora.reporting.method_catalog import describe_privacy
from fedlora.runs.compare import compare_aggregation, for_label
from fedlora.runs.config import build
from fedlora.runs.plan.plan import find_problems
from fedlora.schema import apply_overrides, merge_tables
from tests.fixtures.federation import ADAPTERS, TABLE

pytest.importorskip("opacus", reason="needs the dp extra")
CLIENT = ["privacy.level=client", "privacy.noise_multiplier=1.0", "method.weighting=uniform"]
EXAMPLE = ["privacy.level=example", "privacy.noise_multiplier=1.0"]


def made(name, *overrides):
    table = merge_tables(TABLE, {"method": {"name": name}})
    return build(apply_overrides(table, [*ADAPTERS.get(name, []), *overrides]))


@pytest.mark.parametrize(
    "name,overrides,text",
    [
        ("fedit", [*CLIENT, "method.weighting=examples"], "method.weighting is 'examples'"),
        ("fedit", ["privacy.level=client"], "set one of privacy.noise_multiplier, target_epsilon"),
        ("fedit", [*CLIENT, "privacy.target_epsilon=3.0"], "set one of privacy.noise_multiplier, target_epsilon"),
        ("fedit", ["privacy.noise_multiplier=1.0"], "privacy.level is 'none', but noise is set"),
        ("fedit", [*CLIENT, "privacy.clip=0.0"], "privacy.clip is 0.0; it must be a positive number"),
        ("fedit", [*EXAMPLE, "privacy.noise_multiplier=-1.0"], "it cannot be negative"),
        ("fedit", [*CLIENT, "privacy.delta=1.5"], "privacy.delta is 1.5; it lies between 0 and 1"),
        ("fedit", [*CLIENT, "privacy.delta=0.4"], "but there are 3 clients: publishing one of them outright"),
        ("flora", CLIENT, "FLoRA's server is no sum of what is sent"),
        ("hetlora", [*CLIENT, "method.decay=0.9"], "set method.decay = 1.0"),
        ("ravan", [*CLIENT, "method.score=gradient"], "by a gradient on the client's rows that gets no noise"),
        ("ravan", [*EXAMPLE, "method.score=gradient"], "by a gradient on the client's rows that gets no noise"),
        ("ravan", [*CLIENT, "clients.ranks=[1, 2, 2]"], "clients train 1 to 2 of 2 ranks or heads"),
        ("local", CLIENT, "Local sends nothing"),
        ("fedit", [*CLIENT, "clients.sampling=poisson", "clients.rate=0.5", "clients.dropout=0.4"], "dropout and stragglers are drawn as shares"),
        ("fedit", [*EXAMPLE, "privacy.noise_on=upload"], "which belongs to privacy.level = 'client'"),
        ("fedit", ["clients.sampling=poisson"], "a rate goes with 'poisson'"),
        ("fedit", ["clients.sampling=poisson", "clients.rate=0.5", "clients.per_round=2"], "are both set"),
        ("fedit", ["clients.sampling=poisson", "clients.rate=1.5"], "clients.rate is 1.5"),
        ("fedit", [*CLIENT, "clients.sampling=poisson", "clients.rate=0.5", "flower.secure_aggregation=true"], "rounds of 0 clients"),
    ],
)  # fmt: skip
def test_one_sentence(name, overrides, text):
    with pytest.raises(ValueError, match=re.escape(text)) as found:
        made(name, *overrides)
    assert str(found.value).endswith(".") and "\n" not in str(found.value)


@pytest.mark.parametrize("name", [n for n in METHODS.names() if n != "local"])
def test_every_other_method_has_a_guarantee_one_way_or_the_other(name):
    kind = METHODS.load(name)
    assert made(name, *CLIENT, "privacy.noise_on=upload").privacy.by_client
    assert made(name, *EXAMPLE).privacy.by_example
    if kind.sums:
        assert made(name, *CLIENT).privacy.noise_on == "sum"
    else:
        with pytest.raises(ValueError, match="is no sum of what is sent"):
            made(name, *CLIENT)


def test_without_opacus_it_is_said(monkeypatch):
    monkeypatch.setattr("fedlora.security.privacy.accounting.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'fedlora[dp]'")):
        made("fedit", *CLIENT)


def test_packing_is_refused():
    table = {
        "model": {"name": "x"}, "task": {"name": "causal-lm", "data": "x", "text": "t", "packing": True},
        "privacy": {"level": "example", "noise_multiplier": 1.0},
    }  # fmt: skip
    with pytest.raises(ValueError, match="rows in one sequence have no gradients of their own"):
        build(table)


def test_a_run_without_privacy_says_nothing_of_it():
    assert "privacy" not in made("fedit").table
    assert made("fedit", *CLIENT).table["privacy"]["clip"] == 1.0
    assert build(made("fedit", *CLIENT).table).privacy == made("fedit", *CLIENT).privacy


def test_a_comparison_gives_every_method_equal_weights_and_the_upper_line_no_client_to_hide():
    table = made("fedit", *CLIENT).table
    assert build(for_label(table, "ffa-lora")).method.weighting == "uniform"
    upper = build(for_label(table, "centralised"))
    assert not upper.privacy.on and upper.clients.count == 1
    with pytest.raises(ValueError, match=r"the oracle looks at every upload"):
        compare_aggregation(table)


def test_a_methods_page_says_what_is_covered():
    said = {name: describe_privacy(METHODS.load(name)) for name in METHODS.names()}
    assert "noise on a round's sum or each upload, for A, clipped" in said["fedsa-lora"]
    assert "; B, parts trained in full stay with a client, uncovered" in said["fedsa-lora"]
    assert "for A, B and the parts trained in full, clipped" in said["rolora"] and "stay" not in said["rolora"]
    assert "noise on each upload, for A, B and" in said["flora"] and said["local"].startswith("Whole clients: nothing")


def test_a_plan_lists_what_is_wrong_and_not_what_is_right():
    table = {**made("fedit", *CLIENT).table, "rounds": 0}
    assert find_problems(table) == ["rounds is 0; a run needs at least 1."]
