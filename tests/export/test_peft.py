"""A run's result as PEFT and transformers load it."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, BertTokenizerFast

import fedlora
from fedlora.export.aggregate import aggregate_adapters, build_method
from fedlora.export.peft import export_model
from fedlora.methods import METHODS
from fedlora.runs.build import attach_adapters
from fedlora.runs.folder import RunFolder
from tests.fixtures.federation import TABLE, TINY_VIT, WIDTH, config, settings


def finished(tmp_path, name, *more):
    """A run of settings that the reference run does not have."""
    fedlora.run(config(*settings(name), *more, "evaluation={every = 9, measure = false}"), tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


@pytest.fixture
def opened(reference):
    """The reference run of a method, opened."""
    return lambda name: RunFolder.open(reference(name).folder)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_methods_result_is_a_plain_lora(tmp_path, name, opened):
    run = opened(name)
    personal = run.config.method.personal
    found = export_model(run, tmp_path / "out", client=1 if personal else None)
    assert found["difference"] < 1e-4 and found["error"] == 0
    model = PeftModel.from_pretrained(run.network(), tmp_path / "out").eval()
    x = run.config.task.probe(run.network())
    with torch.no_grad():
        assert not torch.allclose(model(**x).logits, run.network()(**x).logits, atol=1e-3), "something was learnt"
    text = (tmp_path / "out" / "README.md").read_text()
    front, settings = text.split("---")[1], text.split("## Settings")[1]
    assert "base_model: tiny-vit\n" in front and 'name = "tiny-vit"' in settings, "no folders of this machine"
    assert run.summary["title"] in text and "PeftModel.from_pretrained" in text


@pytest.mark.parametrize("name", ["fedit", "flora", "ravan"])
def test_merged_models_are_whole(tmp_path, name, opened):
    from transformers import AutoModelForImageClassification

    run = opened(name)
    assert export_model(run, tmp_path / "out", merged=True)["difference"] < 1e-4
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label[3] == "3"


def test_cutting_the_rank_says_what_it_costs(tmp_path, opened):
    run = opened("fedex-lora")
    whole = export_model(run, tmp_path / "whole")
    less, least = (export_model(run, tmp_path / str(r), rank=r) for r in (4, 1))
    assert whole["error"] == 0 < less["error"] < least["error"] < 1
    assert least["ranks"] == [1] and max(whole["ranks"]) > 4


def test_clients_of_unequal_rank(tmp_path):
    run = finished(tmp_path, "flexlora", "clients.ranks=[1, 2, 3]", "adapter.rank=3")
    for client in run.clients():
        found = export_model(run, tmp_path / str(client), client=client)
        assert found["ranks"] == [client + 1]
        settings = json.loads((tmp_path / str(client) / "adapter_config.json").read_text())
        assert settings["r"] == client + 1 and settings["lora_alpha"] == run.config.method.adapter.alpha


def test_a_reloaded_model_that_differs_is_an_error(tmp_path, monkeypatch, opened):
    run = opened("fedit")
    monkeypatch.setattr("fedlora.export.peft._reload", lambda run, folder, merged, is_half: run.network())
    with pytest.raises(RuntimeError, match="the export's logits differ"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes(tmp_path, reference, opened):
    run = opened("fedsa-lora")
    for client, sentence in (
        (None, "a model for each client and none for all"),
        (7, "no client 7; the run has.* 0 to 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            export_model(run, tmp_path / "out", client)
    with pytest.raises(ValueError, match="not empty"):
        export_model(run, reference("fedsa-lora").folder, 0)
    with pytest.raises(ValueError, match="holds the folders of runs"):
        RunFolder.open(reference("fedsa-lora").folder.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no finished run"):
        RunFolder.open(tmp_path / "empty")


def test_a_run_goes_on_from_an_export(tmp_path, opened):
    run = opened("fedit")
    export_model(run, tmp_path / "out")
    for name in ("fedit", "svd", "fed-sb"):
        extra = ["adapter={name = 'lora-sb', core_rank = 7}"] if name == "fed-sb" else ["adapter.rank=3"]
        again = config(f"method.name={name}", *extra, f"model.start={tmp_path / 'out'}").federation()
        tree = again.model.initial(0)
        for part in run.shared:
            if "q_proj" in part:
                old, new = (
                    f.method.adapter.delta(t[part]).dense() for f, t in ((run.config, run.shared), (again, tree))
                )
                torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-4)
        assert torch.equal(tree["classifier"]["weight"], run.shared["classifier"]["weight"])
    with pytest.raises(ValueError, match="FLoRA begins every turn afresh and would lose model.start"):
        config("method.name=flora", f"model.start={tmp_path / 'out'}").federation()
    with pytest.raises(ValueError, match="a VeRA cannot start from an update"):
        config("adapter={name = 'vera', rank = 4}", f"model.start={tmp_path / 'out'}").federation()
    with pytest.raises(ValueError, match="it is not adapted here"):
        config("model.targets=['k_proj']", f"model.start={tmp_path / 'out'}").federation()


OTHERS = {  # what an adapter says of its base, and what is said of it; None: it goes on
    "the model's own name": (str(TINY_VIT), None),
    "a copy at another path": ("{place}/copy", None),
    "a name that is not here": ("google/vit", "was trained for the base model 'google/vit', and model.name is"),
    "another model": (
        "{place}/other",
        "was trained for other weights of '.*/other' than those of model.name, '",
    ),
    "nothing": (None, "does not say which base model it was trained for"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_start_of_another_base_is_refused(what, tmp_path, opened):
    """Without a digest beside its tensors, as PEFT writes an adapter."""
    said, sentence = OTHERS[what]
    export_model(opened("fedit"), tmp_path / "out")
    for name, factor in (("copy", 1.0), ("other", 1.5)):
        shutil.copytree(TINY_VIT, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        save_file({k: factor * x for k, x in weights.items()}, tmp_path / name / "model.safetensors", {"format": "pt"})
    (tmp_path / "copy" / "model.safetensors").write_bytes((TINY_VIT / "model.safetensors").read_bytes())
    forget_digest(tmp_path / "out", said and said.format(place=tmp_path))
    start = f"model.start={tmp_path / 'out'}"
    if sentence is None:
        config(start).federation()
    else:
        with pytest.raises(ValueError, match=f"{sentence}.*set model.same_base = true") as found:
            config(start).federation()
        assert str(tmp_path / "out") in str(found.value)
    config(start, "model.same_base=true").federation()


def forget_digest(folder, base):
    """An adapter as PEFT would have written it, of a base that is called so."""
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))


def test_a_start_of_changed_weights_under_the_same_name_is_refused(tmp_path, opened):
    """The digest that an export carries is of more weight than a name."""
    shutil.copytree(TINY_VIT, tmp_path / "vit")
    own = f"model.name={tmp_path / 'vit'}"
    fedlora.run(config(own, "rounds=1"), tmp_path / "run")
    export_model(RunFolder.open(tmp_path / "run"), tmp_path / "out")
    config(own, f"model.start={tmp_path / 'out'}").federation()
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    save_file({k: 1.5 * x for k, x in weights.items()}, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="was trained for other weights of .* than those of model.name"):
        config(own, f"model.start={tmp_path / 'out'}").federation()


def test_a_start_whose_base_has_two_names_goes_on_under_the_other(tmp_path, opened):
    """Whether two names are one model is no setting of a run's bits."""
    export_model(opened("fedit"), tmp_path / "out")
    forget_digest(tmp_path / "out", str(TINY_VIT))
    start = (f"model.start={tmp_path / 'out'}", "rounds=2", "training.local_steps=1")

    def broken_off(event):
        if event.kind == "turn" and event.round == 1:
            raise KeyboardInterrupt

    fedlora.run(config(*start), tmp_path / "run", broken_off)
    forget_digest(tmp_path / "out", "google/vit")
    with pytest.raises(ValueError, match=r"set model.same_base = true"):
        fedlora.resume(tmp_path / "run")
    again = fedlora.resume(tmp_path / "run", overrides=["model.same_base=true"])
    assert again.summary["rounds"] == 2


def test_base_updates_come_to_no_more_than_the_weights_sides(tmp_path, opened):
    found = export_model(opened("flora"), tmp_path / "out")
    assert found["ranks"] == [WIDTH] and found["difference"] < 1e-4, "4 rounds of three clients at rank 2 are 24"


@pytest.mark.parametrize("name", ["fedit", "fedsa-lora"])
def test_veras_vectors_are_multiplied_in(tmp_path, name):
    fedlora.run(config(f"method.name={name}", "adapter={name = 'vera', rank = 16}"), tmp_path / "run")
    found = export_model(RunFolder.open(tmp_path / "run"), tmp_path / "out", client=2 if name == "fedsa-lora" else None)
    assert found["ranks"] == [16] and found["difference"] < 1e-4


@pytest.mark.parametrize("name", ["base_update.safetensors", "shared.safetensors"])
def test_a_run_that_lost_a_file(tmp_path, name, reference):
    shutil.copytree(reference("flora").folder, tmp_path / "run")
    file = tmp_path / "run" / name
    content = file.read_bytes()
    for damage in (lambda: file.write_bytes(content[:-50]), file.unlink):
        damage()
        with pytest.raises(ValueError, match=f"{name}' cannot be read.*run it anew"):
            RunFolder.open(tmp_path / "run")


def test_a_summary_that_was_edited(tmp_path, reference):
    shutil.copytree(reference("fedit").folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'labels'"):
        RunFolder.open(tmp_path / "run")


# ------------------------------------------------------------------------------ adapters that say their labels
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "barks", "meows", "runs"]
SIZES = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
}


@pytest.fixture
def trained(tmp_path):
    """``trained(family, labels, *overrides)``: a run of a tiny encoder on three sentences, opened."""

    def run(family, labels, *overrides, name="run"):
        base = tmp_path / family
        if not base.exists():
            torch.manual_seed(0)
            shape = {**SIZES[family], "vocab_size": len(WORDS), "max_position_embeddings": 40, "pad_token_id": 0}
            AutoModel.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(base)
            (base / "vocab.txt").write_text("\n".join(WORDS))
            BertTokenizerFast(str(base / "vocab.txt")).save_pretrained(base)
        data = tmp_path / f"data-{name}"
        data.mkdir()
        rows = [f"it {verb},{label}" for verb, label in zip(["barks", "meows", "runs"], labels)] * 8
        for part in ("train", "test"):
            (data / f"{part}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        table = {**TABLE, "rounds": 1, "model": {"name": str(base)}}
        table["task"] = {"name": "text-classification", "data": str(data), "label_names": list(labels)}
        table["clients"] = {"count": 2, "partition": {"name": "iid"}}
        fedlora.run(config(*overrides, "evaluation={every = 9, measure = false}", table=table), tmp_path / name)
        return RunFolder.open(tmp_path / name)

    return run


def named(folder):
    """The names of an export's labels, as the model card reads them."""
    found = json.loads((folder / "labels.json").read_text())
    return {"id2label": {int(k): name for k, name in found["id2label"].items()}, "label2id": found["label2id"]}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("bert", []),
        ("distilbert", []),  # `pre_classifier` ends with a name that PEFT saves
        ("roberta", []),  # the classifier is two layers inside a module that PEFT saves whole
        ("roberta", ["model.head=['classifier.out_proj']"]),
        ("bert", ["model.head=[]"]),  # nobody trains the classifier, and no other is like it
    ],
)
def test_pefts_own_class_loads_a_classifier_with_its_labels(tmp_path, trained, family, overrides):
    run = trained(family, ["dog", "cat", "emu"], *overrides)
    export_model(run, tmp_path / "out")
    torch.manual_seed(7)  # what a checkpoint lacks is drawn anew by who loads it
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", **named(tmp_path / "out")).eval()
    assert model.config.id2label == {0: "dog", 1: "cat", 2: "emu"}
    x = run.config.task.probe(run.network())
    torch.testing.assert_close(
        model(**x).logits, PeftModel.from_pretrained(run.network(), tmp_path / "out").eval()(**x).logits
    )
    served = attach_adapters(run.config, run.network())
    served.load(run.tree(None))
    torch.testing.assert_close(model(**x).logits, served.network(**x).logits, rtol=1e-5, atol=1e-5)


def test_images_say_their_class_and_their_labels(tmp_path, opened):
    run = opened("fedit")
    export_model(run, tmp_path / "out")
    fits = {"ignore_mismatched_sizes": True}  # this checkpoint has a head of another size
    model = AutoPeftModel.from_pretrained(tmp_path / "out", **named(tmp_path / "out"), **fits).eval()
    assert type(model.get_base_model()).__name__ == "ViTForImageClassification" and model.config.id2label[3] == "3"
    x = run.config.task.probe(run.network())
    served = attach_adapters(run.config, run.network())
    served.load(run.tree(None))
    torch.testing.assert_close(model(**x).logits, served.network(**x).logits, rtol=1e-5, atol=1e-5)


def test_exports_of_other_labels_are_neither_combined_nor_gone_on_from(tmp_path, trained):
    orders = {"a": ["dog", "cat", "emu"], "b": ["cat", "dog", "emu"], "c": ["dog", "cat", "emu"]}
    for name, labels in orders.items():
        export_model(trained("bert", labels, name=name), tmp_path / f"out-{name}")
    with pytest.raises(ValueError, match="different labels: label 0 is 'dog' in .*out-a.* and 'cat' in .*out-b"):
        aggregate_adapters([tmp_path / "out-a", tmp_path / "out-b"], build_method("svd"), tmp_path / "both")
    aggregate_adapters([tmp_path / "out-a", tmp_path / "out-c"], build_method("svd"), tmp_path / "both")
    assert named(tmp_path / "both") == named(tmp_path / "out-a")
    table = RunFolder.open(tmp_path / "b").config.table
    with pytest.raises(
        ValueError, match="model.start was trained for the labels dog, cat, emu, and the run has cat, dog"
    ):
        config(f"model.start={tmp_path / 'out-a'}", table=table).federation()
    config(f"model.start={tmp_path / 'out-b'}", table=table).federation()


def test_the_cards_code_runs(tmp_path, trained):
    run = trained("bert", ["dog", "cat", "emu"])
    export_model(run, tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found = {}
    exec(code.replace("this folder", str(tmp_path / "out")), found)
    assert found["model"].config.id2label == {0: "dog", 1: "cat", 2: "emu"}


def test_exports_of_one_base_at_two_paths_are_known_by_the_digest_that_they_carry(tmp_path, trained):
    export_model(trained("bert", ["dog", "cat", "emu"]), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in "ab":  # on another machine, where neither base lies
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": f"/mnt/{name}/bert"}))
    aggregate_adapters([tmp_path / "a", tmp_path / "b"], build_method("svd"), tmp_path / "out")
    aggregate_adapters([tmp_path / "out", tmp_path / "b"], build_method("svd"), tmp_path / "again")
    with pytest.raises(ValueError, match="the weights of '/mnt/a/bert' in .* are not those of"):
        file = tmp_path / "b" / "adapter_model.safetensors"
        save_file(load_file(file), file, {"format": "pt", "base_digest": "0" * 32})
        aggregate_adapters([tmp_path / "a", tmp_path / "b"], build_method("svd"), tmp_path / "odd")
