"""A run's result as PEFT and transformers load it."""

import json
import shutil

import pytest
import torch
from peft import PeftModel

import fedlora
from fedlora import methods
from fedlora.export import Run, export
from tests.fixtures.federation import WIDTH, config, settings


def finished(tmp_path, name, *more):
    """A run of settings that the reference run does not have."""
    fedlora.run(config(*settings(name), *more, "evaluation={every = 9, measure = false}"), tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture
def opened(reference):
    """The reference run of a method, opened."""
    return lambda name: Run.open(reference(name).folder)


@pytest.mark.parametrize("name", methods.names())
def test_every_methods_result_is_a_plain_lora(tmp_path, name, opened):
    run = opened(name)
    personal = run.config.method.personal
    found = export(run, tmp_path / "out", client=1 if personal else None)
    assert found["difference"] < 1e-4 and found["error"] == 0
    model = PeftModel.from_pretrained(run.network(), tmp_path / "out").eval()
    x = run.config.task.probe(run.network())
    with torch.no_grad():
        assert not torch.allclose(model(**x).logits, run.network()(**x).logits, atol=1e-3), "something was learnt"
    text = (tmp_path / "out" / "README.md").read_text()
    assert run.summary["title"] in text and "PeftModel.from_pretrained" in text


@pytest.mark.parametrize("name", ["fedit", "flora", "ravan"])
def test_merged_models_are_whole(tmp_path, name, opened):
    from transformers import AutoModelForImageClassification

    run = opened(name)
    assert export(run, tmp_path / "out", merged=True)["difference"] < 1e-4
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label[3] == "3"


def test_cutting_the_rank_says_what_it_costs(tmp_path, opened):
    run = opened("fedex-lora")
    whole = export(run, tmp_path / "whole")
    less, least = (export(run, tmp_path / str(r), rank=r) for r in (4, 1))
    assert whole["error"] == 0 < less["error"] < least["error"] < 1
    assert least["ranks"] == [1] and max(whole["ranks"]) > 4


def test_clients_of_unequal_rank(tmp_path):
    run = finished(tmp_path, "flexlora", "clients.ranks=[1, 2, 3]", "adapter.rank=3")
    for client in run.clients():
        found = export(run, tmp_path / str(client), client=client)
        assert found["ranks"] == [client + 1]
        settings = json.loads((tmp_path / str(client) / "adapter_config.json").read_text())
        assert settings["r"] == client + 1 and settings["lora_alpha"] == run.config.method.adapter.alpha


def test_a_reloaded_model_that_differs_is_an_error(tmp_path, monkeypatch, opened):
    run = opened("fedit")
    monkeypatch.setattr("fedlora.export._reloaded", lambda run, folder, merged: run.network())
    with pytest.raises(RuntimeError, match="the export's logits differ"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes(tmp_path, reference, opened):
    run = opened("fedsa-lora")
    for client, sentence in (
        (None, "a model for each client and none for all"),
        (7, "no client 7; the run has.* 0 to 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            export(run, tmp_path / "out", client)
    with pytest.raises(ValueError, match="not empty"):
        export(run, reference("fedsa-lora").folder, 0)
    with pytest.raises(ValueError, match="holds the folders of runs"):
        Run.open(reference("fedsa-lora").folder.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no finished run"):
        Run.open(tmp_path / "empty")


def test_a_run_goes_on_from_an_export(tmp_path, opened):
    run = opened("fedit")
    export(run, tmp_path / "out")
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
    with pytest.raises(ValueError, match="kind VeRA cannot start from an update"):
        config("adapter={name = 'vera', rank = 4}", f"model.start={tmp_path / 'out'}").federation()
    with pytest.raises(ValueError, match="it is not adapted here"):
        config("model.targets=['k_proj']", f"model.start={tmp_path / 'out'}").federation()


def test_folds_come_to_no_more_than_the_weights_sides(tmp_path, opened):
    found = export(opened("flora"), tmp_path / "out")
    assert found["ranks"] == [WIDTH] and found["difference"] < 1e-4, "4 rounds of three clients at rank 2 are 24"


@pytest.mark.parametrize("name", ["fedit", "fedsa-lora"])
def test_veras_vectors_are_multiplied_in(tmp_path, name):
    fedlora.run(config(f"method.name={name}", "adapter={name = 'vera', rank = 16}"), tmp_path / "run")
    found = export(Run.open(tmp_path / "run"), tmp_path / "out", client=2 if name == "fedsa-lora" else None)
    assert found["ranks"] == [16] and found["difference"] < 1e-4


@pytest.mark.parametrize("name", ["folds.safetensors", "shared.safetensors"])
def test_a_run_that_lost_a_file(tmp_path, name, reference):
    shutil.copytree(reference("flora").folder, tmp_path / "run")
    file = tmp_path / "run" / name
    content = file.read_bytes()
    for damage in (lambda: file.write_bytes(content[:-50]), file.unlink):
        damage()
        with pytest.raises(ValueError, match=f"{name}' cannot be read.*run it anew"):
            Run.open(tmp_path / "run")


def test_a_summary_that_was_edited(tmp_path, reference):
    shutil.copytree(reference("fedit").folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'labels'"):
        Run.open(tmp_path / "run")
