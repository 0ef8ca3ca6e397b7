"""What a name leads to, and one sentence for everything that it cannot lead to."""

import sys
from dataclasses import dataclass

import pytest

from fedlora.adapters import ADAPTERS, LoRA
from fedlora.engines.comm.codecs import CODECS
from fedlora.engines.in_process import InProcess
from fedlora.engines.loop import ENGINES
from fedlora.engines.partition import PARTITIONERS, Partitioner
from fedlora.methods import METHODS, Method
from fedlora.methods.fedit import FedIT
from fedlora.registry import Registry
from fedlora.runs.config import build
from fedlora.runs.trackers import TRACKERS
from fedlora.security.attacks import ATTACKS
from fedlora.security.robust import ROBUST_RULES
from fedlora.tasks import TASKS
from tests.fixtures.federation import TABLE
from tests.fixtures.plugins import NAMES, PATHS, importable, installed  # noqa: F401

REGISTRIES = {
    "method": METHODS, "adapter": ADAPTERS, "task": TASKS, "partitioner": PARTITIONERS, "codec": CODECS,
    "attack": ATTACKS, "robust": ROBUST_RULES, "tracker": TRACKERS, "engine": ENGINES,
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", REGISTRIES)
MISSPELT = {
    "method": ("fedrot", "fedrot-lora"), "adapter": ("lorra", "lora"), "task": ("text-regresion", "text-regression"),
    "partitioner": ("dirichle", "dirichlet"), "codec": ("int9", "int8"), "attack": ("sign_flop", "sign-flip"),
    "robust": ("krun", "krum"), "tracker": ("tensorbord", "tensorboard"), "engine": ("in-process", "inprocess"),
}  # fmt: skip
SETTINGS = {
    "method": lambda name: {"method": {"name": name}}, "adapter": lambda name: {"adapter": {"name": name}},
    "task": lambda name: {"task": {"name": name}}, "partitioner": lambda name: {"clients": {"partition": {"name": name}}},
    "codec": lambda name: {"compression": {"up": name}}, "attack": lambda name: {"attack": {"name": name}},
    "robust": lambda name: {"robust": {"name": name}}, "tracker": lambda name: {"track": {name: True}},
    "engine": lambda name: {"engine": {"name": name}},
}  # fmt: skip
MODULE = """
from dataclasses import dataclass
from fedlora.engines.partition import Partitioner
from fedlora.methods.fedit import FedIT
from fedlora.tasks._base import Task

VALUE = 3

class Plain:
    pass

class Unfinished(Partitioner):
    pass

class Undecorated(Task):
    load = network = known_labels = collate = loss = losses = outputs = scores = probe = preprocessor = None

@dataclass(frozen=True)
class Mine(FedIT):
    title = "Mine"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package(entry points)``: a package ``others`` with those, on the path."""

    def write(entries="", text=MODULE):
        (tmp_path / "others.py").write_text(text)
        notes = tmp_path / "others_package-1.0.dist-info"
        notes.mkdir()
        (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: others-package\nVersion: 1.0\n")
        (notes / "entry_points.txt").write_text(entries)
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    sys.modules.pop("others", None)


@KINDS
def test_an_unknown_name_is_said_with_the_nearest_and_all(kind):
    registry, (name, near) = REGISTRIES[kind], MISSPELT[kind]
    every = ", ".join([*registry.reserved, *registry.names()])
    sentence = f"there is no {registry.noun} {name!r}; did you mean {near!r}? The {registry.noun}s are {every}."
    with pytest.raises(ValueError) as error:
        registry.load(name)
    assert str(error.value) == sentence
    with pytest.raises(ValueError) as error:
        build({**TABLE, **SETTINGS[kind](name)})
    assert str(error.value) == sentence


@KINDS
def test_every_name_leads_to_a_class_and_back(kind, installed):  # noqa: F811
    registry = REGISTRIES[kind]
    assert NAMES[kind] in registry.names() and NAMES[kind] not in registry.builtin
    for name in registry.names():
        if name != "flower-simulation":  # which needs Ray
            assert registry.name_of(registry.load(name)) == name
    assert registry.load(PATHS[kind]) is registry.load(NAMES[kind])


@KINDS
def test_a_class_without_an_entry_point_has_its_path_for_a_name(kind, importable):  # noqa: F811
    registry = REGISTRIES[kind]
    assert registry.name_of(registry.load(PATHS[kind])) == PATHS[kind]
    assert NAMES[kind] not in registry.names()


@KINDS
def test_a_class_of_another_kind_is_said(kind):
    registry = REGISTRIES[kind]
    with pytest.raises(
        ValueError, match=rf"the {registry.noun} 'json:JSONDecoder' is not a fedlora\..*; name a class that"
    ):
        build({**TABLE, **SETTINGS[kind]("json:JSONDecoder")})


@pytest.mark.parametrize(
    ("registry", "path", "sentence"),
    [
        (METHODS, "nowhere:Mine", "the method 'nowhere:Mine' could not be loaded: No module named 'nowhere'."),
        (METHODS, "others:Mine.x.y", "the method 'others:Mine.x.y' could not be loaded: .* has no attribute 'x'."),
        (METHODS, "others:", "the method 'others:' could not be loaded: "),
        (METHODS, "others:VALUE", "the method 'others:VALUE' is not a fedlora.methods.Method; name a class that"),
        (PARTITIONERS, "others:Unfinished", "'others:Unfinished' does not define rows, which Partitioner asks for."),
        (TASKS, "others:Undecorated", "'others:Undecorated' is no dataclass; write @dataclass"),
    ],
)
def test_a_path_that_leads_to_no_such_class_is_said(registry, path, sentence, package):
    package()
    with pytest.raises(ValueError, match=sentence):
        registry.load(path)


def test_a_module_that_raises_is_said(package):
    package(text="raise RuntimeError('no licence')")
    with pytest.raises(ValueError, match="the method 'others:Mine' could not be loaded: no licence"):
        METHODS.load("others:Mine")


BROKEN = """[fedlora.methods]
gone = others.gone:Mine
good = others:Mine
wrong = others:Plain

[fedlora.codecs]
gone = nowhere:Codec
"""


def test_a_broken_entry_point_is_named_with_its_package_and_breaks_nothing_else(package):
    package(BROKEN)
    assert {"gone", "good", "wrong"} <= set(METHODS.names())
    gone = "the method 'gone' of the package 'others-package' could not be loaded: .*others.*"
    with pytest.raises(ValueError, match=gone):
        build({**TABLE, "method": {"name": "gone"}})
    with pytest.raises(
        ValueError, match="the method 'wrong' of the package 'others-package' is not a fedlora.methods.Method"
    ):
        METHODS.load("wrong")
    assert len(METHODS.errors()) == 2 and len(CODECS.errors()) == 1 and ADAPTERS.errors() == []
    assert METHODS.classes().keys() == {*METHODS.builtin, "good"}
    assert build({**TABLE, "method": {"name": "good"}}).method.title == "Mine"
    with pytest.raises(ValueError, match="take one of .*good"):
        build({**TABLE, "method": {"name": "flora"}, "flower": {"secure_aggregation": True}})


def test_the_list_of_methods_says_what_cannot_be_loaded(package, capsys):
    from fedlora.cli.methods import methods_command

    package(BROKEN)
    methods_command(name=None, as_json=True)
    out, err = capsys.readouterr()
    assert '"name": "good"' in out and '"name": "gone"' not in out
    assert err.count("fedlora: the method '") == 2 and "of the package 'others-package'" in err


def test_what_is_not_used_is_not_imported(package):
    package("[fedlora.methods]\nlate = others:Mine\n[fedlora.engines]\nlate = others:Engine\n")
    build(TABLE)
    assert "late" in METHODS.names() and "others" not in sys.modules


def test_no_package_takes_a_name_of_ours(package):
    package("[fedlora.methods]\nfedit = others:Mine\n[fedlora.codecs]\nfloat32 = others:Mine\n")
    assert METHODS.load("fedit") is FedIT and METHODS.name_of(FedIT) == "fedit"
    assert build({**TABLE, "compression": {"up": "float32"}}).compression.upward is None


def test_a_class_that_no_name_leads_to():
    @dataclass(frozen=True)
    class Here(FedIT):
        pass

    with pytest.raises(
        ValueError, match="Here cannot be imported by name, so the run could not be repeated; define it"
    ):
        METHODS.name_of(Here)


def test_a_registry_of_ones_own(package):
    """Files of a package, or a list; a file defines one class."""
    package()
    kinds = Registry(Method, "rule", group="others.rules", listed={"mine": "others:Mine"})
    assert kinds.names() == ["mine"] and kinds.load("mine").title == "Mine"
    wrong = Registry(Partitioner, "rule", group="others.rules", package="fedlora.engines")
    with pytest.raises(
        ValueError, match=r"fedlora.engines.partition defines \d+ rules; a rule's file defines exactly one"
    ):
        wrong.load("partition")
    assert ENGINES.load("inprocess") is InProcess and ADAPTERS.name_of(LoRA) == "lora"
