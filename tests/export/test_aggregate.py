"""Finished PEFT adapters, combined without a base model: PEFT itself says whether the result is right."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fedlora.export.aggregate import aggregate_adapters, build_method
from fedlora.methods import merging_methods
from fedlora.training.device import Engine
from fedlora.training.peft_folder import AdapterFolder
from tests.fixtures.networks import network

IDS = torch.arange(3, 27).reshape(2, 12)
TARGETS = {"bert": ["query", "intermediate.dense"], "gpt2": ["c_attn", "c_fc"]}


def trained(folder, family, seed, head=True, pattern=None, **settings):
    """A PEFT adapter with something in it, written by PEFT; ``pattern`` is another rank and alpha for some weights."""
    folder.mkdir(parents=True)
    for name, content in files_of(family, seed, head, pattern, *settings.items()).items():
        (folder / name).write_bytes(content)
    return folder


@functools.cache
def files_of(family, seed, head, pattern, *settings):
    """The files of such an adapter, which many tests begin with."""
    settings = {"r": 4, "lora_alpha": 8, **dict(settings)}
    if pattern:
        of = "query" if family == "bert" else "c_fc"
        settings |= {"rank_pattern": {of: pattern[0]}, "alpha_pattern": {of: pattern[1]}}
    model = get_peft_model(
        network(family),
        LoraConfig(
            target_modules=TARGETS[family],
            fan_in_fan_out=family == "gpt2",
            modules_to_save=["classifier" if family == "bert" else "score"] if head else None,
            **settings,
        ),
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                x.add_(0.2 * torch.randn(x.shape, generator=g))
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place, save_embedding_layers=False)
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def loaded(folder, family):
    return PeftModel.from_pretrained(network(family), folder).eval()


def merged_mean(folders, family, weights):
    """The oracle: every adapter merged by PEFT, and the merged models' weights averaged."""
    states = [loaded(f, family).merge_and_unload().state_dict() for f in folders]
    mean = {k: sum(w * s[k].double() for w, s in zip(weights, states)).to(x.dtype) for k, x in states[0].items()}
    model = network(family)
    model.load_state_dict(mean)
    return model


KINDS = {
    "plain": [{}, {}, {}],
    "rslora": [{"use_rslora": True}] * 3,
    "ranks": [{"r": 4}, {"r": 8}, {"r": 16}],
    "rslora and ranks": [{"r": 4, "use_rslora": True}, {"r": 8, "use_rslora": True}, {"r": 16}],
    "alphas": [{"lora_alpha": 8}, {"lora_alpha": 3}, {"lora_alpha": 16}],
    "patterns": [{"pattern": (2, 5)}, {}, {"r": 3}],
}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_the_mean_of_the_merged_models(tmp_path, family, kind):
    weights = [3, 1, 1]
    folders = [trained(tmp_path / str(i), family, i, **settings) for i, settings in enumerate(KINDS[kind])]
    report = aggregate_adapters(folders, build_method("flora"), tmp_path / "out", weights, exact=True)
    wanted = merged_mean(folders, family, [w / 5 for w in weights])(IDS).logits
    torch.testing.assert_close(loaded(tmp_path / "out", family)(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert report.total("served") < 1e-6


@pytest.mark.parametrize("name", merging_methods())
def test_what_the_report_says_is_what_was_written(tmp_path, name):
    folders = [trained(tmp_path / str(i), "bert", i) for i in range(3)]
    method = build_method(name)
    report = aggregate_adapters(folders, method, tmp_path / "out", exact=name in ("flora", "fedex-lora"))
    opened = [AdapterFolder.open(f) for f in (*folders, tmp_path / "out")]
    away = norm = 0.0
    for part in opened[0].shapes:
        dense = [a.lora(part).delta(a.layer(part)).dense().double() for a in opened]
        exact = sum(dense[:3]) / 3
        error, size = float((dense[3] - exact).norm()), float(exact.norm())
        assert report.weights[part]["served"] == pytest.approx(error / size, abs=1e-6)
        away, norm = away + error**2, norm + size**2
    assert report.total("served") == pytest.approx((away / norm) ** 0.5, abs=1e-6)
    heads = [load_file(f / "adapter_model.safetensors") for f in (*folders, tmp_path / "out")]
    key = "base_model.model.classifier.weight"
    torch.testing.assert_close(heads[3][key], sum(h[key] for h in heads[:3]) / 3)


def test_a_residual_is_a_second_adapter(tmp_path):
    folders = [trained(tmp_path / str(i), "bert", i) for i in range(2)]
    aggregate_adapters(folders, build_method("fedex-lora"), tmp_path / "out", residual=tmp_path / "rest")
    model = loaded(tmp_path / "out", "bert")
    model.load_adapter(tmp_path / "rest", "rest")
    model.base_model.set_adapter(["default", "rest"])
    wanted = merged_mean(folders, "bert", [0.5, 0.5])(IDS).logits
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_is_combined_in_float32(tmp_path, dtype):
    folders = [trained(tmp_path / str(i), "bert", i) for i in range(3)]
    for folder in folders:
        file = folder / "adapter_model.safetensors"
        save_file({k: x.to(dtype) for k, x in load_file(file).items()}, file, {"format": "pt"})
    report = aggregate_adapters(folders, build_method("flora"), tmp_path / "out", exact=True)
    assert {x.dtype for x in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {dtype}
    assert report.total("served") < (2e-3 if dtype == torch.float16 else 2e-2)


def test_rank_truncates_and_the_best_is_least(tmp_path):
    folders = [trained(tmp_path / str(i), "bert", i) for i in range(3)]
    errors = {}
    for name in ("fedit", "svd", "flexlora"):
        report = aggregate_adapters(folders, build_method(name), tmp_path / name, rank=2)
        assert report.ranks == {2}
        errors[name] = report.total("served")
    assert errors["svd"] == pytest.approx(errors["flexlora"], rel=1e-5)
    assert errors["svd"] < errors["fedit"]


def test_one_mix_for_all_weights(tmp_path):
    folders = [trained(tmp_path / str(i), "bert", i) for i in range(3)]
    per_weight = aggregate_adapters(folders, build_method("flora-na"), tmp_path / "a").total("served")
    for_all = aggregate_adapters(folders, build_method("flora-na", ["scope=model"]), tmp_path / "b").total("served")
    assert per_weight <= for_all


def edited(folder, config=None, tensors=None):
    if config:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(config(json.loads(file.read_text()))))
    if tensors:
        file = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(file)), file, {"format": "pt"})


def nan(tensors):
    key = next(k for k in tensors if "lora_B" in k)
    return {**tensors, key: tensors[key] * float("nan")}


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"x")


EMBEDDING = "base_model.model.bert.embeddings.word_embeddings.lora_embedding_A"
MISTAKES = {
    "other base": (lambda f: edited(f, lambda c: {**c, "base_model_name_or_path": "other"}), "different base models"),
    "other weights": (
        lambda f: edited(f, None, lambda t: {k: x for k, x in t.items() if "layer.0.attention" not in k}),
        "do not adapt the same weights.*layer.0.attention.self.query",
    ),
    "nan": (lambda f: edited(f, None, nan), r"NaN or infinite values in 'base_model.*lora_B.weight'"),
    "cut off": (cut, "cannot be read, it may be cut off"),
    "pickle": (pickled, "a pickle, which can run code.*safe_serialization=True"),
    "dora": (lambda f: edited(f, lambda c: {**c, "use_dora": True}), "sets use_dora, which cannot be used"),
    "pissa": (lambda f: edited(f, lambda c: {**c, "init_lora_weights": "pissa_niter_4"}), "a base that PEFT changed"),
    "bias": (lambda f: edited(f, lambda c: {**c, "bias": "all"}), "trains biases"),
    "embedding": (lambda f: edited(f, None, lambda t: {**t, EMBEDDING: torch.zeros(4, 60)}), "adapts an embedding"),
    "kind": (lambda f: edited(f, lambda c: {**c, "peft_type": "IA3"}), "adapter of kind 'IA3'"),
    "list of settings": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no table of settings"),
    "text for alpha": (lambda f: edited(f, lambda c: {**c, "lora_alpha": "x"}), "sets lora_alpha to 'x'"),
    "list of patterns": (lambda f: edited(f, lambda c: {**c, "alpha_pattern": [1]}), r"sets alpha_pattern to \[1\]"),
    "no pattern": (lambda f: edited(f, lambda c: {**c, "rank_pattern": {"(": 2}}), "which is no pattern"),
    "nan in the head": (
        lambda f: edited(f, None, lambda t: {k: x * float("nan") if "classifier" in k else x for k, x in t.items()}),
        "NaN or infinite values in 'base_model.model.classifier",
    ),
    "another head": (
        lambda f: edited(f, None, lambda t: {k: x[:2].clone() if "classifier" in k else x for k, x in t.items()}),
        "is 3 in .* but 2 in .*of one model and task",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), "no valid JSON"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "other rank": (
        lambda f: (shutil.rmtree(f), trained(f, "bert", 5, r=2)),
        r"have ranks \[2, 4\].*FedIT needs one rank.*take one of",
    ),
    "other size": (
        lambda f: edited(f, None, lambda t: {k: x[:, :-1].clone() if "lora_A" in k else x for k, x in t.items()}),
        "is 48 x 48 in .* but 48 x 47 in",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_adapters_that_do_not_belong_together(tmp_path, damage, sentence):
    folders = [trained(tmp_path / str(i), "bert", i) for i in range(2)]
    damage(folders[1])
    with pytest.raises(ValueError, match=sentence) as caught:
        aggregate_adapters(folders, build_method("fedit"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weights": [1, 1]}, "there are 2 weights for 1 adapters"),
        ({"weights": [0]}, "their sum must be above zero"),
        ({"weights": [-1]}, "cannot be negative"),
        ({"weights": [float("inf")]}, "above zero and finite"),
        ({"method": "fedex-lora"}, "leaves a residual of rank 4 .*--residual DIR.*--exact"),
        ({"method": "svd", "residual": "r"}, "leaves nothing over for --residual"),
        ({"method": "fedit", "exact": True}, "leaves nothing over for --exact"),
        ({"method": "fedit", "rank": 9}, "--rank is 9, but FedIT makes no more than rank 4"),
        ({"method": "flora", "rank": 2, "exact": True}, "keep one of them"),
        ({"method": "ffa-lora"}, "changes which factors the clients train; take one of"),
        ({"method": "local"}, "a model of its own"),
        ({"method": "ravan"}, "an adapter of another kind"),
        ({"method": "fedits"}, "did you mean 'fedit'"),
    ],
)
def test_wrong_requests(tmp_path, settings, sentence):
    folder = trained(tmp_path / "a", "bert", 0)
    with pytest.raises(ValueError, match=sentence):
        rest = {k: tmp_path / x if k == "residual" else x for k, x in settings.items() if k != "method"}
        aggregate_adapters([folder], build_method(settings.get("method", "fedit")), tmp_path / "out", **rest)
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="engine.device is 'abacus'"):
        aggregate_adapters(
            [trained(tmp_path / "a", "bert", 0)], build_method("fedit"), tmp_path / "o", engine=Engine(device="abacus")
        )


def test_an_existing_folder_is_left_alone(tmp_path):
    folder = trained(tmp_path / "a", "bert", 0)
    with pytest.raises(ValueError, match="exists already and is not empty"):
        aggregate_adapters([folder], build_method("fedit"), folder)
    with pytest.raises(ValueError, match="no adapters were named"):
        aggregate_adapters([], build_method("fedit"), tmp_path / "out")


@pytest.mark.parametrize("name", ["fedit", "svd", "flexlora", "hetlora", "lora-fair", "fedrot-lora", "flora-na"])
def test_reading_anew_at_every_pass_changes_nothing(tmp_path, name, monkeypatch):
    """The streaming form: nothing is held between passes, neither files nor stacks of them."""
    folders = [trained(tmp_path / str(i), "bert", i) for i in range(5)]
    settings = ["residual_rank=2"] if name == "fedex-lora" else []
    held = aggregate_adapters(folders, build_method(name, settings), tmp_path / "held")
    for module in ("export.aggregate", "linalg.sums"):
        monkeypatch.setattr(f"fedlora.{module}.CACHE_LIMIT", 0)
    streamed = aggregate_adapters(folders, build_method(name, settings), tmp_path / "streamed")
    one, two = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("held", "streamed"))
    assert all(torch.equal(x, two[key]) for key, x in one.items())
    assert {**held.as_table(), "folder": ""} == {**streamed.as_table(), "folder": ""}


@pytest.mark.shared
def test_exact_on_a_real_model(tmp_path, shared):
    from transformers import AutoModelForSequenceClassification

    def real():
        torch.manual_seed(0)
        name = str(shared / "models" / "minilm-l6-h384")
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=5).eval()

    folders, states = [], []
    for i, (rank, rslora) in enumerate(((4, True), (8, False), (16, True))):
        model = get_peft_model(real(), LoraConfig(r=rank, use_rslora=rslora, target_modules=["query", "value"]))
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for key, x in model.named_parameters():
                if "lora_B" in key:
                    x.add_(0.02 * torch.randn(x.shape, generator=g))
        model.save_pretrained(tmp_path / str(i))
        folders.append(tmp_path / str(i))
        states.append(model.merge_and_unload().state_dict())
    aggregate_adapters(folders, build_method("flora"), tmp_path / "out", [5, 2, 1], exact=True)
    oracle = real()
    mean = {k: sum(w * s[k].double() for w, s in zip((5, 2, 1), states)) / 8 for k in states[0]}
    oracle.load_state_dict({k: x.to(states[0][k].dtype) for k, x in mean.items()})
    ids = torch.randint(100, 20000, (4, 20), generator=torch.Generator().manual_seed(0))
    ours = PeftModel.from_pretrained(real(), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, oracle(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours(ids).logits, real()(ids).logits, atol=1e-3)


def test_one_folder_for_both_is_refused(tmp_path):
    folders = [trained(tmp_path / str(i), "bert", i) for i in range(2)]
    with pytest.raises(ValueError, match="name two folders"):
        aggregate_adapters(
            folders, build_method("fedex-lora"), tmp_path / "out", residual=tmp_path / "x" / ".." / "out"
        )


def test_the_error_of_plain_means_is_fedits_whatever_the_method(tmp_path):
    folders = [trained(tmp_path / str(i), "bert", i) for i in range(3)]
    errors = [
        aggregate_adapters(folders, build_method(n), tmp_path / n).total("fedit") for n in ("fedit", "fedrot-lora")
    ]
    assert errors[0] == errors[1]


def test_a_residual_of_adapters_for_a_task_loads_alone(tmp_path):
    folders = [trained(tmp_path / str(i), "bert", i, task_type="SEQ_CLS") for i in range(2)]
    aggregate_adapters(folders, build_method("fedex-lora"), tmp_path / "out", residual=tmp_path / "rest")
    assert loaded(tmp_path / "rest", "bert")(IDS).logits.isfinite().all()


def test_names_that_end_alike_keep_their_ranks(tmp_path):
    from fedlora.training.peft_folder import save_folder

    g = torch.Generator().manual_seed(0)
    for k in range(2):
        layers = {
            name: {"A": torch.randn(r, 6, generator=g), "B": torch.randn(6, r, generator=g)}
            for name, r in (("fc", 4), ("sub.fc", 2), ("sub.other", 2))
        }
        like = {"peft_type": "LORA", "target_modules": ["fc", "other"], "bias": "none"}
        save_folder(tmp_path / str(k), like, layers, {"fc": 8.0, "sub.fc": 3.0, "sub.other": 3.0})
    aggregate_adapters([tmp_path / "0", tmp_path / "1"], build_method("svd"), tmp_path / "out")

    def base():
        torch.manual_seed(0)
        net = torch.nn.Module()
        net.fc, net.sub = torch.nn.Linear(6, 6), torch.nn.Module()
        net.sub.fc, net.sub.other = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        return net

    made = PeftModel.from_pretrained(base(), tmp_path / "out")
    own = AdapterFolder.open(tmp_path / "out")
    for name in ("fc", "sub.fc", "sub.other"):
        there = made.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(there, own.lora(name).delta(own.layer(name)).dense())


def test_nothing_is_made_or_taken_where_it_fails(tmp_path):
    folders = [trained(tmp_path / "a", "bert", 0)]
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        with pytest.raises(ValueError, match="leaves a residual"):
            aggregate_adapters(folders, build_method("fedex-lora"), out)
    assert (tmp_path / "empty").is_dir() and not (tmp_path / "new").exists()
