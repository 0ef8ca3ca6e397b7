"""Quantised bases: packed weights whose shape says nothing, that take no fold and no cast."""

import types

import pytest
import torch
from torch import nn

from fedlora.adapters import LoRA
from fedlora.runs.config import build
from fedlora.schema import ConfigError
from fedlora.tasks.networks.pretrained import quantization_options
from fedlora.training.model import Model
from fedlora.training.parts import AdaptedLinear, weight_shape
from fedlora.types import Factors


class Packed(nn.Linear):
    """As bitsandbytes' Linear4bit: a linear layer whose weight is one column of bytes."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.scale = float(base.weight.detach().abs().max()) / 127
        bytes_ = (base.weight.detach() / self.scale).round().add(128).to(torch.uint8).reshape(-1, 1)
        self.weight = nn.Parameter(bytes_, requires_grad=False)

    def forward(self, x):
        return x @ ((self.weight.reshape(self.out_features, -1).to(x.dtype) - 128) * self.scale).mT


class Net(nn.Module):
    is_quantized = True
    put_on_top = ()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.v_proj, self.norm = Packed(nn.Linear(6, 4)), Packed(nn.Linear(4, 8)), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.v_proj(self.q_proj(x)))

    def to(self, *args):
        raise ValueError("a quantised network refuses to be cast or moved")


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_adapters_on_packed_weights(precision):
    network = Net()
    before = network(X)
    model = Model.attach(network, LoRA(2, 4), precision=precision)
    assert [weight_shape(part.module.base) for part in model.parts.values()] == [(4, 6), (8, 4)]
    assert network.q_proj.base.weight.dtype == torch.uint8
    assert network.norm.weight.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)
    tree = model.initial(0)
    assert tree["q_proj"]["A"].shape == (2, 6) and tree["v_proj"]["B"].shape == (8, 2)
    model.load(tree)
    packed = [part.module.base.weight.clone() for part in model.parts.values()]
    draws = torch.Generator().manual_seed(2)
    update = Factors(torch.randn(4, 1, generator=draws), torch.randn(1, 6, generator=draws))
    with model.running(), torch.no_grad():
        base = network(X)
        torch.testing.assert_close(base.float(), before, atol=0.1 if precision == "bf16" else 1e-5, rtol=0.1)
        model.fold({"q_proj": (update,)})
        moved = network(X)
        y = network.q_proj(X).float()
    away = network.q_proj.base(X) + X @ update.dense().mT
    torch.testing.assert_close(y, away, atol=0.1 if precision == "bf16" else 1e-5, rtol=0.05)
    assert not torch.allclose(moved, base, atol=1e-2)
    assert all(torch.equal(part.module.base.weight, x) for part, x in zip(model.parts.values(), packed)), (
        "beside, not in it"
    )
    model.unfold()
    with model.running(), torch.no_grad():
        assert torch.equal(network(X), base)


def test_gradients_reach_the_adapters():
    model = Model.attach(Net(), LoRA(2, 4))
    model.load(model.initial(0))
    found = model.gradient(lambda network: network(X).square().sum())
    assert found["q_proj"]["B"].abs().sum() > 0
    assert isinstance(model.network.q_proj, AdaptedLinear)


def test_a_packed_weight_is_not_trained_in_full():
    with pytest.raises(ValueError, match="model.head names 'v_proj', which is quantised and cannot be trained"):
        Model.attach(Net(), LoRA(2, 4), targets=["q_proj"], head=["v_proj"])


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_without_a_gpu_or_bitsandbytes(kind, monkeypatch):
    with pytest.raises(
        ValueError, match=f"model.quantize is '{kind}', which needs a CUDA device, but engine.device comes to 'cpu'"
    ):
        quantization_options(kind, torch.device("cpu"))
    monkeypatch.setattr(
        "fedlora.tasks.networks.pretrained.find_spec", lambda name: None if name == "bitsandbytes" else 1
    )
    with pytest.raises(ValueError, match="needs bitsandbytes; run `pip install bitsandbytes`"):
        quantization_options(kind, torch.device("cuda"))


def test_what_is_asked_of_transformers(monkeypatch):
    monkeypatch.setattr("fedlora.tasks.networks.pretrained.find_spec", lambda name: types)
    for capability, half in (((8, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        asked = quantization_options("4bit", torch.device("cuda:1"))
        settings = asked["quantization_config"]
        assert (
            settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4" and settings.bnb_4bit_compute_dtype == half
        )
        assert asked["device_map"] == {"": torch.device("cuda:1")}
    assert quantization_options("8bit", torch.device("cuda"))["quantization_config"].load_in_8bit


def test_tasks_with_a_head_of_their_own_refuse():
    table = {
        "model": {"name": "demo-vit", "quantize": "4bit"},
        "task": {"name": "image-classification", "data": "digits"},
    }
    with pytest.raises(ConfigError, match="model.quantize is '4bit', but 'image-classification' .* 'causal-lm'"):
        build(table)


@pytest.mark.shared
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes holds bases on a GPU, and there is none")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_run_on_a_quantised_base(kind, shared, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    import fedlora
    from fedlora.export.peft import export_model
    from fedlora.runs.folder import RunFolder

    table = {
        "rounds": 2,
        "model": {"name": str(shared / "models" / "stories260k-llama"), "quantize": kind},
        "task": {
            "name": "causal-lm",
            "data": str(shared / "data" / "shakespeare_roles"),
            "max_length": 48,
            "test_rows": 60,
        },
        "clients": {"count": 2},
        "method": {"name": "flora"},
        "training": {"local_steps": 8, "learning_rate": 5e-3, "gradient_checkpointing": True},
        "adapter": {"name": "lora", "rank": 2, "alpha": 4},
    }
    config = build(table)
    base = next(iter(config.federation().model.parts.values())).module.base
    assert not base.weight.is_floating_point() and weight_shape(base) == (64, 64)
    run = fedlora.run(config, tmp_path / "run")
    found = [record["global"]["perplexity"] for record in run.records]
    assert found[1] < found[0] and run.summary["base_updates"] == 2
    assert export_model(RunFolder.open(tmp_path / "run"), tmp_path / "out")["difference"] < 1e-4
