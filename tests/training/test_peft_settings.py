"""Whatever PEFT can write is combined exactly, or refused by the setting's name: generated over LoraConfig's fields."""

import contextlib
import json
import typing
import warnings
from dataclasses import MISSING, fields

import pytest
from peft import LoraConfig, TaskType
from peft.tuners.lora import config as settings_of_peft

from fedlora.export.aggregate import aggregate_adapters, build_method
from fedlora.training.peft_settings import CONFIG
from tests.fixtures.peft_adapters import assert_same, edited, reloaded, written

VALUES = {  # beside the default; a field that is not here is changed by its type
    "task_type": [kind.value for kind in TaskType],
    "peft_type": ["LORA", "IA3", "DORA"],
    "auto_mapping": [{"base_model_class": "BertModel", "parent_library": "transformers"}],
    "peft_version": ["0.99.0"],
    "base_model_name_or_path": ["somewhere/bert"],
    "revision": ["0f3c"],
    "r": [2, 16],
    "target_modules": [["query"], "all-linear", r".*\.(query|value)", "bert.encoder.layer.1.attention.self.key"],
    "exclude_modules": [["layer.0.attention.self.query"], r".*layer\.1.*"],
    "lora_alpha": [3, 2.5],
    "lora_dropout": [0.5],
    "modules_to_save": [None, ["pooler"], ["classifier", "word_embeddings"]],
    "init_lora_weights": ["OLoRA", "PiSSA", "pissa_niter_2", "lora_ga", "LoftQ", "Gaussian", "of next year"],
    "layers_to_transform": [[1], 0],
    "layers_pattern": ["layer", ["layer"]],
    "rank_pattern": [{"query": 2}, {r"^bert\.encoder\.layer\.0\..*": 7}],
    "alpha_pattern": [{"query": 3}, {r".*1\.output.dense": 32, "dense": 2.5}],
    "megatron_config": [{"tensor_model_parallel_size": 2}],
    "megatron_core": ["megatron.other"],
    "trainable_token_indices": [[5, 3], {"word_embeddings": [7]}],
    "loftq_config": [{"loftq_bits": 4}],
    "alora_invocation_tokens": [[3, 4]],
    "qalora_group_size": [8],
    "layer_replication": [[(0, 2), (1, 2)]],
    "target_parameters": [["attention.self.key.weight"]],
    "use_bdlora": [settings_of_peft.BdLoraConfig(target_modules_bd_a=["query"], nblocks=2)],
    "runtime_config": [settings_of_peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)],
    "monteclora_config": [settings_of_peft.MontecloraConfig()],
}
BESIDE = {  # what PEFT asks for beside a setting
    "layers_pattern": {"layers_to_transform": [0]},
    "eva_config": {"init_lora_weights": "eva"},
    "corda_config": {"init_lora_weights": "corda"},
    "lora_ga_config": {"init_lora_weights": "lora_ga"},
}
UNDERSTOOD = {  # settings that are not refused, whatever their value
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("task_type", "trainable_token_indices", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version", "eva_config", "qalora_group_size", "megatron_core", "runtime_config"),
    "ensure_weight_tying",
}
STARTS = {False, "gaussian", "Gaussian", "eva", "orthogonal", "mica"}


def changed(field):
    """Values of a setting beside its default: those of the table, and all that its type names."""
    kind = typing.get_type_hints(LoraConfig)[field.name]
    default = None if field.default is MISSING else field.default
    named = [x for part in (kind, *typing.get_args(kind)) for x in typing.get_args(part) if isinstance(x, str)]
    found = [x for x in named if x != default and "[" not in x] if typing.Literal in origins(kind) else []
    if isinstance(default, bool):
        found.append(not default)
    found += VALUES.get(field.name, [])
    own = [x for x in typing.get_args(kind) if isinstance(x, type) and x.__module__ == settings_of_peft.__name__]
    found += [x() for x in own] if not found else []
    assert found, f"PEFT has a new setting, {field.name} ({kind}): give VALUES one that is not its default"
    return found


def origins(kind):
    return {typing.get_origin(part) for part in (kind, *typing.get_args(kind))}


CASES = [(f.name, value) for f in fields(LoraConfig) for value in changed(f)]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of unusual settings
        yield


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda x: str(x)[:40])
def test_an_adapter_with_itself_is_itself_or_is_refused_by_name(tmp_path, name, value):
    logits, beside = written(tmp_path / "a", **{name: value, **BESIDE.get(name, {})}), BESIDE.get(name, {})
    why = None
    try:
        aggregate_adapters([tmp_path / "a"] * 2, build_method("svd"), tmp_path / "out")
    except ValueError as error:
        why = str(error)
    if why is not None:
        assert any(word in why for word in (name, *beside, *(["kind"] if name == "peft_type" else [])))
        assert name not in UNDERSTOOD and not (name == "init_lora_weights" and value in STARTS), why
        assert not (tmp_path / "out").exists()
        return
    if logits is None:
        with contextlib.suppress(Exception):  # PEFT may not load it either; then nothing can be compared
            logits = reloaded(tmp_path / "a")
    if logits is not None:
        assert_same(reloaded(tmp_path / "out"), logits)


@pytest.mark.parametrize("value", [True, 1, 0.5, "on", {"groups": 2}, [1], {"on": False}], ids=str)
def test_a_setting_of_peft_to_come_is_refused_where_it_is_set(tmp_path, value):
    written(tmp_path / "a")
    edited(tmp_path / "a", use_of_next_year=value)
    with pytest.raises(ValueError, match="sets use_of_next_year to .*, a setting of PEFT that is not understood"):
        aggregate_adapters([tmp_path / "a"] * 2, build_method("svd"), tmp_path / "out")


@pytest.mark.parametrize("value", [None, False, "", [], {}], ids=str)
def test_a_setting_of_peft_to_come_is_taken_where_it_is_not_set(tmp_path, value):
    logits = written(tmp_path / "a")
    edited(tmp_path / "a", use_of_next_year=value)
    aggregate_adapters([tmp_path / "a"] * 2, build_method("svd"), tmp_path / "out")
    assert_same(reloaded(tmp_path / "out"), logits)


def test_a_default_that_peft_has_is_no_setting(tmp_path, monkeypatch):
    """A next version's ``depth = 3`` by default, read where that version is installed."""
    written(tmp_path / "a")
    monkeypatch.setattr("fedlora.training.peft_settings._defaults", lambda: {"depth": 3, "careful": True})
    for good, bad in (({"depth": 3}, {"depth": 2}), ({"careful": True}, {"careful": False})):
        edited(tmp_path / "a", depth=3, careful=True)
        edited(tmp_path / "a", **good)
        aggregate_adapters([tmp_path / "a"], build_method("svd"), tmp_path / str(good))
        edited(tmp_path / "a", **bad)
        with pytest.raises(ValueError, match=f"sets {next(iter(bad))} to"):
            aggregate_adapters([tmp_path / "a"], build_method("svd"), tmp_path / "out")


TOGETHER = {  # settings of two adapters, each right by itself
    "tokens": ({"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [3, 6]}, "trainable_token_indices is"),
    "order": ({"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [5, 3]}, r"\[3, 5\] in .* \[5, 3\] in"),
    "tokens of one": ({"trainable_token_indices": [3, 5]}, {}, "trainable_token_indices"),
    "tasks": ({"task_type": "SEQ_CLS"}, {"task_type": "FEATURE_EXTRACTION"}, "different tasks: task_type is"),
    "tying": ({"ensure_weight_tying": True}, {}, "ensure_weight_tying is"),
}


@pytest.mark.parametrize(("one", "other", "sentence"), TOGETHER.values(), ids=TOGETHER)
def test_settings_that_must_be_alike_are_compared(tmp_path, one, other, sentence):
    for name, settings in (("a", one), ("b", other)):
        written(tmp_path / name, **settings)
    with pytest.raises(ValueError, match=sentence):
        aggregate_adapters([tmp_path / "a", tmp_path / "b"], build_method("svd"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_that_one_of_them_says_is_kept(tmp_path):
    for name, settings in (("a", {}), ("b", {"task_type": "SEQ_CLS"})):
        logits = written(tmp_path / name, **settings)
    aggregate_adapters([tmp_path / "a", tmp_path / "b"], build_method("svd"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["task_type"] == "SEQ_CLS"
    assert_same(reloaded(tmp_path / "out"), logits)


@pytest.mark.parametrize("alpha", [0, -8, float("nan"), float("inf"), True, "8"], ids=str)
def test_an_alpha_that_scales_nothing_is_refused(tmp_path, alpha):
    written(tmp_path / "a")
    edited(tmp_path / "a", lora_alpha=alpha)
    with pytest.raises(ValueError, match="sets lora_alpha to"):
        aggregate_adapters([tmp_path / "a"], build_method("svd"), tmp_path / "out")


def test_factors_of_another_rank_than_the_settings_are_refused(tmp_path):
    written(tmp_path / "a")
    edited(tmp_path / "a", rank_pattern={"query": 3})
    with pytest.raises(
        ValueError, match=r"holds factors of rank 4 for 'bert.*query', and its adapter_config.json says 3"
    ):
        aggregate_adapters([tmp_path / "a"], build_method("svd"), tmp_path / "out")
