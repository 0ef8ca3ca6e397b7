"""Adapter folders as people have them: keys under other names, bases at other paths, labels, files among the folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.export.aggregate import aggregate_adapters, build_method
from fedlora.training.base_model import BaseModel, is_same_base
from fedlora.training.peft_folder import LABELS, WEIGHTS, AdapterFolder, save_labels
from fedlora.training.peft_settings import CONFIG
from tests.fixtures.peft_adapters import assert_same, edited, reloaded, written

OURS = "base_model.model."


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT adapter that tests copy, and its logits."""
    folder = tmp_path_factory.mktemp("adapter") / "plain"
    return folder, written(folder, alpha_pattern={"query": 5}, rank_pattern={"dense": 2})


def renamed(source, folder, name):
    """A copy of an adapter whose keys are ``name(key)``."""
    shutil.copytree(source, folder)
    save_file({name(key): x for key, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def with_a_name(key):
    key = key.replace(".weight", ".mine.weight") if ".lora_" in key else key
    return key.replace(".classifier.", ".classifier.modules_to_save.mine.")


NAMES = {
    "compiled before PEFT": lambda key: key.replace(OURS, f"{OURS}_orig_mod."),
    "compiled after PEFT": lambda key: f"_orig_mod.{key}",
    "compiled layer by layer": lambda key: key.replace("attention.self", "attention._orig_mod.self"),
    "FSDP": lambda key: key.replace("layer.0.", "layer.0._fsdp_wrapped_module."),
    "activations recomputed": lambda key: key.replace("layer.1.", "layer.1._checkpoint_wrapped_module."),
    "DDP": lambda key: f"module.{key}",
    "no prefix": lambda key: key.removeprefix(OURS),
    "an adapter's name": with_a_name,
    "an adapter's name and no prefix": lambda key: with_a_name(key).removeprefix(OURS),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_keys_under_other_names_give_an_adapter_that_peft_loads(tmp_path, adapter, name):
    folder, logits = adapter
    other = renamed(folder, tmp_path / "other", name)
    aggregate_adapters([other, folder], build_method("svd"), tmp_path / "out")
    assert_same(reloaded(tmp_path / "out"), logits)
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(folder / WEIGHTS).keys()


def test_patterns_count_for_the_path_that_peft_knew(tmp_path):
    """With the network compiled before PEFT, ``^bert`` was no beginning of any path, and the default was taken."""
    pattern = {r"^bert.*query": 32}
    plain = written(tmp_path / "plain")
    folder = renamed(tmp_path / "plain", tmp_path / "compiled", NAMES["compiled before PEFT"])
    edited(folder, alpha_pattern=pattern, target_modules=["_orig_mod.bert.encoder.layer.0.attention.self.query"])
    aggregate_adapters([folder], build_method("svd"), tmp_path / "out")
    assert_same(reloaded(tmp_path / "out"), plain)


def added(key):
    return lambda folder: save_file({**load_file(folder / WEIGHTS), key: torch.ones(4, 4)}, folder / WEIGHTS)


QUERY = "bert.encoder.layer.0.attention.self.query"
REFUSED = {
    "two names for one factor": (added(f"{QUERY}.lora_A.weight"), "two adapters on one weight; save one"),
    "two adapters": (added(f"{OURS}x.lora_A.other.weight"), "of two adapters; save one|do not fit together"),
    "a weight of the base": (
        added(f"{OURS}{QUERY}.base_layer.weight"),
        "base model's weight; save the result of PEFT's",
    ),
    "the original head": (added(f"{OURS}classifier.original_module.weight"), "a base model's weight"),
    "an adapter on an adapted model": (added(f"{OURS}{OURS}{QUERY}.lora_A.weight"), "an adapter on an adapted model"),
    "factors of another program": (added("lora_unet_q.lora_down.weight"), "which is no part of s B A"),
    "a magnitude": (added(f"{OURS}{QUERY}.lora_magnitude_vector"), "which is no part of s B A"),
}


@pytest.mark.parametrize(("damage", "sentence"), REFUSED.values(), ids=REFUSED)
def test_keys_that_are_not_understood_are_refused_by_name(tmp_path, adapter, damage, sentence):
    folder = shutil.copytree(adapter[0], tmp_path / "a")
    damage(folder)
    with pytest.raises(ValueError, match=sentence):
        aggregate_adapters([folder], build_method("svd"), tmp_path / "out")


def test_a_file_among_the_folders_is_one_sentence(tmp_path, adapter):
    (tmp_path / "notes.txt").write_text("x")
    for file in (adapter[0] / CONFIG, adapter[0] / WEIGHTS, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=f"{file.name}' is a file; name the folder that holds {CONFIG}"):
            AdapterFolder.open(file)


def test_a_folder_of_folders_says_which_to_name(tmp_path, adapter):
    shutil.copytree(adapter[0], tmp_path / "out" / "mine")
    with pytest.raises(ValueError, match="out' holds no adapter_config.json, but .*out/mine' does; name that folder"):
        AdapterFolder.open(tmp_path / "out")
    shutil.copytree(adapter[0], tmp_path / "out" / "checkpoint-8")
    with pytest.raises(ValueError, match="but .*checkpoint-8', .*mine' do; name one of these"):
        AdapterFolder.open(tmp_path / "out")
    with pytest.raises(ValueError, match="holds no adapter_config.json; name a folder that PEFT's save_pretrained"):
        AdapterFolder.open(tmp_path / "nowhere")


def test_a_head_keeps_its_precision_beside_factors_in_half(tmp_path, adapter):
    for name in "ab":
        shutil.copytree(adapter[0], tmp_path / name)
        file = tmp_path / name / WEIGHTS
        save_file({k: x.half() if "lora" in k else x for k, x in load_file(file).items()}, file, {"format": "pt"})
    aggregate_adapters([tmp_path / "a", tmp_path / "b"], build_method("svd"), tmp_path / "out")
    before, after = (load_file(folder / WEIGHTS) for folder in (tmp_path / "a", tmp_path / "out"))
    assert {k: x.dtype for k, x in after.items()} == {k: x.dtype for k, x in before.items()}
    key = f"{OURS}classifier.weight"
    torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=0)


def test_counts_are_kept_where_they_agree_and_refused_where_not(tmp_path, adapter):
    key, counts = f"{OURS}classifier.steps", torch.tensor([2**40 + 1, 3])
    for name, x in (("a", counts), ("b", counts), ("c", counts + 1)):
        shutil.copytree(adapter[0], tmp_path / name)
        file = tmp_path / name / WEIGHTS
        save_file({**load_file(file), key: x}, file, {"format": "pt"})
    aggregate_adapters([tmp_path / "a", tmp_path / "b"], build_method("svd"), tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[key], counts)
    with pytest.raises(ValueError, match="classifier.steps' holds torch.int64 and differs between"):
        aggregate_adapters([tmp_path / "a", tmp_path / "c"], build_method("svd"), tmp_path / "out2")


# ------------------------------------------------------------------------------ one base under two names
@pytest.fixture
def bases(tmp_path):
    """Folders of a base model: ``one``, its copy ``two``, and another, ``odd``."""
    for name, value in (("one", 1.0), ("two", 1.0), ("odd", 2.0)):
        (tmp_path / "home" / name / "bert").mkdir(parents=True)
        save_file({"w": torch.full((4,), value)}, tmp_path / "home" / name / "bert" / "model.safetensors")
    return {name: str(tmp_path / "home" / name / "bert") for name in ("one", "two", "odd", "gone")}


def of_bases(tmp_path, adapter, *names, **settings):
    found = []
    for k, name in enumerate(names):
        found.append(shutil.copytree(adapter[0], tmp_path / str(k)))
        edited(found[-1], base_model_name_or_path=name, **settings)
    return found


def test_one_base_at_two_paths_is_known_by_its_weights(tmp_path, adapter, bases):
    folders = of_bases(tmp_path, adapter, bases["one"], bases["two"])
    aggregate_adapters(folders, build_method("svd"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == bases["one"]


@pytest.mark.parametrize("other", ["odd", "gone"])
def test_another_base_is_refused_unless_it_is_said_to_be_the_same(tmp_path, adapter, bases, other):
    folders = of_bases(tmp_path, adapter, bases["one"], bases[other])
    with pytest.raises(ValueError, match=f"different base models: .*one/bert.*{other}/bert.*say --same-base"):
        aggregate_adapters(folders, build_method("svd"), tmp_path / "out")
    aggregate_adapters(folders, build_method("svd"), tmp_path / "out", one_base=True)
    assert_same(reloaded(tmp_path / "out"), adapter[1])


def test_the_command_takes_same_base(tmp_path, adapter, bases, commands):
    folders = of_bases(tmp_path, adapter, bases["gone"], "/mnt/models/bert")
    arguments = ["fedlora", "aggregate", *map(str, folders), "--out", "out"]
    refused = commands.call(arguments, tmp_path)
    assert refused.returncode == 2 and "say --same-base" in " ".join(refused.stderr.split())
    assert "2 adapters combined" in commands.call([*arguments, "--same-base"], tmp_path).stdout
    alone = commands.call(["fedlora", "aggregate", str(folders[0]), "--out", "alone"], tmp_path)
    assert "1 adapter combined" in alone.stdout


@pytest.mark.parametrize(
    ("one", "other", "known"),
    [
        (BaseModel("bert", None), BaseModel("bert", None), True),
        (BaseModel("bert", None), BaseModel("bert", "v1"), None),
        (BaseModel("bert", None), BaseModel("roberta", None), None),
        (
            BaseModel("bert", None, "aa"),
            BaseModel("bert", None, "bb"),
            False,
        ),  # one path on two machines, and two models
        (BaseModel("/home/a/bert", None, "aa"), BaseModel("/home/b/bert", None, "aa"), True),
        (BaseModel("/home/a/bert", None, "aa"), BaseModel("/home/b/bert", None), None),
        (BaseModel("bert", None, "aa"), BaseModel("bert", None), True),
        (BaseModel(None, None), BaseModel(None, None), True),
    ],
)
def test_digests_count_for_more_than_names(one, other, known):
    assert is_same_base(one, other) is known and is_same_base(other, one) is known


def test_a_folder_of_the_hubs_cache_is_its_name_and_revision():
    def named(path, **more):
        return BaseModel.from_config({"base_model_name_or_path": path, **more})

    here, there = (f"{home}/hub/models--org--bert/snapshots/0f3c" for home in ("/home/a", "/data/b"))
    assert named(here) == named(there) == named("org/bert", revision="0f3c")
    assert named("org/bert", revision="main") == named("org/bert")
    assert is_same_base(named(here), named("org/bert")) is None, "another revision may have come since"


# ------------------------------------------------------------------------------ labels
def labelled(tmp_path, adapter, *names):
    folders = of_bases(tmp_path, adapter, *["bert"] * len(names))
    for folder, labels in zip(folders, names):
        if labels:
            save_labels(folder, labels)
    return folders


DIFFER = {
    "another": (["cat", "dog", "emu"], ["cat", "eel", "emu"], "label 1 is 'dog' in .* and 'eel' in"),
    "turned round": (["cat", "dog", "emu"], ["dog", "cat", "emu"], "label 0 is 'cat' in .* and 'dog' in"),
    "one more": (["cat", "dog", "emu"], ["cat", "dog"], "label 2 is 'emu' in .* and none in"),
}


@pytest.mark.parametrize(("one", "other", "sentence"), DIFFER.values(), ids=DIFFER)
def test_other_labels_are_refused(tmp_path, adapter, one, other, sentence):
    folders = labelled(tmp_path, adapter, None, one, other)
    with pytest.raises(ValueError, match=sentence):
        aggregate_adapters(folders, build_method("svd"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_labels_go_along(tmp_path, adapter):
    names = ["chat", "été", "7"]
    aggregate_adapters(labelled(tmp_path, adapter, names, None, names), build_method("svd"), tmp_path / "out")
    assert AdapterFolder.open(tmp_path / "out").labels == tuple(names)


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"id2label": {"1": "a"}}', '{"id2label": 3}'])
def test_labels_that_were_edited_are_refused(tmp_path, adapter, text):
    folder = shutil.copytree(adapter[0], tmp_path / "a")
    (folder / LABELS).write_text(text)
    with pytest.raises(ValueError, match="labels.json' does not say what the labels are called"):
        AdapterFolder.open(folder)


# ------------------------------------------------------------------------------ names of methods
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fedsalora", "no method 'fedsalora', and the nearest, 'fedsa-lora', cannot be .*: it leaves every client"),
        ("ravna", "the nearest, 'ravan', cannot be .*: it trains an adapter of another kind; take one of .*svd"),
        ("ffalora", "the nearest, 'ffa-lora', cannot be .*: it changes which factors"),
        ("fedits", "did you mean 'fedit'"),
    ],
)
def test_no_method_is_suggested_that_is_then_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_method(name)


@pytest.mark.parametrize("name", ["fedsb", "ravna", "feddp"])
def test_nor_in_somebody_elses_loop(name):
    from fedlora.training.recipe import Recipe

    with pytest.raises(ValueError, match=f"no method '{name}', and the nearest, .*, trains an adapter of kind .*take"):
        Recipe(name, 8.0).build()
