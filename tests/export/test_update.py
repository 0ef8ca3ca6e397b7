"""The update of a run on own objects as a file, and the function that applies it."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import fedlora as fl
from fedlora.export.update import FILE, compute_outputs
from fedlora.files import save_tree
from tests.fixtures.own_models import ConvNet, Mixer, Points, accuracy, cross_entropy

IMAGE = (1, 6, 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """FedEx-LoRA, which also updates the base."""
    return fl.run(
        model=ConvNet, train=[Points(12, IMAGE, k) for k in range(3)], test=Points(20, IMAGE, 9), loss=cross_entropy,
        metrics={"accuracy": accuracy}, targets=["fc1", "fc2"], head=["out"], method="fedex-lora", rounds=2,
        adapter=fl.LoRA(rank=2), training=fl.Training(local_steps=3, learning_rate=1e-2),
        out=tmp_path_factory.mktemp("update") / "run",
    )  # fmt: skip


def test_it_has_the_adapter_the_base_update_and_the_head(run, tmp_path):
    export = run.export(tmp_path / "export")
    update, opened = load_file(tmp_path / "export" / FILE), fl.open(run.folder)
    assert sorted(update) == ["fc1/A", "fc1/B", "fc2/A", "fc2/B", "out/bias", "out/weight"]
    for part in ("fc1", "fc2"):
        delta = opened.config.method.adapter.delta(run.shared[part]).dense() + opened.base_updates[part].dense()
        assert torch.allclose(update[f"{part}/B"] @ update[f"{part}/A"], delta, atol=1e-6)
    assert torch.equal(update["out/weight"], run.shared["out"]["weight"])
    net = fl.load_update(run.code.network(0), tmp_path / "export")
    batch = run.code.probe()
    assert export["difference"] < 1e-5
    assert not torch.allclose(
        compute_outputs(run.code, net, batch)[0], compute_outputs(run.code, run.code.network(0), batch)[0], atol=1e-3
    )


def test_the_score_of_the_reloaded_model_is_the_runs(run, tmp_path):
    run.export(tmp_path / "export")
    net, test = fl.load_update(run.code.network(0), tmp_path / "export").eval(), Points(20, IMAGE, 9)
    hits, rows = accuracy(net, (test.x, test.y))
    assert int(hits) / rows == run.summary["final"]["global"]["accuracy"]


def test_the_card_says_how_to_apply_it_without_fedlora(run, tmp_path, monkeypatch):
    run.export(tmp_path / "this folder")
    by_hand = re.findall(r"```python\n(.*?)```", (tmp_path / "this folder" / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    model = run.code.network(0)
    exec(by_hand, {"model": model})
    other = fl.load_update(run.code.network(0), tmp_path / "this folder")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_truncation(run, tmp_path):
    one, two = run.export(tmp_path / "one", rank=1), run.export(tmp_path / "whole", rank=99)
    assert one["ranks"] == [1] and one["error"] > 0 and one["difference"] < 1e-5 and two["error"] == 0
    with pytest.raises(ValueError, match="so no whole model can be written; export its update"):
        run.export(tmp_path / "merged", merged=True)


def test_wrong_networks_are_left_as_they_are(run, tmp_path):
    run.export(tmp_path / "export")
    with pytest.raises(ValueError, match="changes 'fc1', which the network does not have"):
        fl.load_update(Mixer(), tmp_path / "export")
    net = ConvNet(labels=4)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"has a bias of \(3,\) for 'out', whose own is \(4,\)"):
        fl.load_update(net, tmp_path / "export")
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    with pytest.raises(ValueError, match="has no update.safetensors"):
        fl.load_update(net, tmp_path)


def test_a_conv1d_is_transposed(tmp_path):
    net = torch.nn.Sequential(Conv1D(3, 2))
    before = net[0].weight.clone()
    factors = {"A": torch.randn(1, 2), "B": torch.randn(3, 1)}
    save_tree(tmp_path / FILE, {"0": factors}, {"about": '{"adapted": ["0"]}'})
    fl.load_update(net, tmp_path)
    assert torch.allclose(net[0].weight, before + (factors["B"] @ factors["A"]).mT)
