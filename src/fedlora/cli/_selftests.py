"""One small operation of each package that fedlora can use, for ``fedlora doctor``: each in a process of its own.

``python -m fedlora.cli._selftests NAME`` prints a line of JSON, ``{"said": ...}``, or fails as the package does.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

VALUES = {"train/loss": 0.5}


def torch() -> dict[str, Any]:
    """A product and its gradient, and the devices that there are."""
    import torch

    x = torch.arange(6.0).reshape(2, 3).requires_grad_()
    (x @ x.T).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[6.0, 10.0, 14.0]] * 2, "a gradient is wrong"
    devices = [{"name": "cpu", "threads": torch.get_num_threads()}]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        y = torch.ones(8, 8, device=f"cuda:{number}")
        assert float((y @ y).sum()) == 512.0, f"cuda:{number} multiplies wrongly"
        devices.append(
            {"name": f"cuda:{number}", "kind": torch.cuda.get_device_name(number), "free": free, "bytes": total}
        )
    return {"said": "a gradient is right", "devices": devices}


def model() -> dict[str, Any]:
    """A Transformers network from a configuration, its adapter, and one pass through it."""
    import torch
    from transformers import BertConfig, BertModel

    from fedlora.adapters import LoRA
    from fedlora.training.model import Model

    sizes = {
        "vocab_size": 16,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    network = BertModel(BertConfig(**sizes)).eval()
    rows = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = network(rows).last_hidden_state
        attached = Model.attach(network, LoRA(rank=2), ["query", "value"], [])
        attached.load(attached.initial(0))
        after = network(rows).last_hidden_state
    assert torch.allclose(before, after), "a fresh adapter changes the network"
    return {"said": f"{len(attached.parts)} weights adapted"}


def figures() -> dict[str, Any]:
    """A figure as SVG."""
    import altair as alt
    import vl_convert

    chart = alt.Chart(alt.Data(values=[{"x": 1, "y": 2}])).mark_point().encode(x="x:Q", y="y:Q")
    drawn = vl_convert.vegalite_to_svg(chart.to_json())
    assert "<svg" in drawn, "no picture was drawn"
    return {"said": "a figure is drawn"}


def peft() -> dict[str, Any]:
    """PEFT's LoRA and ours on the same leaves."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    from fedlora.adapters import LoRA

    layer = inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=4, target_modules=["0"]), nn.Sequential(nn.Linear(5, 3))
    )[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(4, 5)
    leaves = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    ours = layer.base_layer(x) + LoRA(rank=2, alpha=4.0).forward(x, leaves)
    assert torch.allclose(layer(x), ours, atol=1e-6), "PEFT's LoRA is not ours"
    return {"said": "its LoRA is ours"}


def dp() -> dict[str, Any]:
    """Opacus' accountants on one setting."""
    from fedlora.security.privacy.accounting import compute_epsilon

    found = {name: compute_epsilon(name, 1.0, 0.1, 10, 1e-5) for name in ("prv", "rdp")}
    assert 0 < found["prv"] <= found["rdp"] < math.inf, f"epsilon is {found}"
    return {"said": f"ε = {found['prv']:.2f}"}


def flower() -> dict[str, Any]:
    """A message's record there and back, and a signature."""
    import torch
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.app import Array, ArrayRecord, RecordDict
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

    sent = RecordDict({"leaves": ArrayRecord({"a": Array(torch.arange(3.0).numpy())})})
    back = recorddict_from_proto(recorddict_to_proto(sent))
    assert back["leaves"]["a"].numpy().tolist() == [0.0, 1.0, 2.0], "a record came back changed"
    key = ec.generate_private_key(ec.SECP384R1())
    key.public_key().verify(key.sign(b"fedlora", ec.ECDSA(hashes.SHA256())), b"fedlora", ec.ECDSA(hashes.SHA256()))
    return {"said": "a record and a signature hold"}


def simulation() -> dict[str, Any]:
    """One call on a Ray actor."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        assert ray.get(ray.remote(lambda: 2).remote()) == 2, "an actor answered wrongly"
    finally:
        ray.shutdown()
    return {"said": "an actor answers"}


def quantize() -> dict[str, Any]:
    """A matrix to four bits and back, on a GPU where there is one."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(64, 64, device=device)
    back = dequantize_4bit(*quantize_4bit(x, quant_type="nf4"))
    error = float((back - x).norm() / x.norm())
    assert error < 0.2, f"four bits lose {error:.2f} of a matrix"
    return {"said": f"four bits on {device}: relative error {error:.2f}"}


def _tracked(name: str, **settings: Any) -> dict[str, Any]:
    """A run of one round at a tracker's local backend, in a folder that is thrown away."""
    from fedlora.runs.trackers import TRACKERS, RunInfo

    with TemporaryDirectory(prefix="fedlora-", ignore_cleanup_errors=True) as place:
        named = {key: value.format(place=place) for key, value in settings.items()}
        session = TRACKERS.load(name)(**named).open(RunInfo("doctor", Path(place), {"rounds": 1}, None))
        session.log(1, VALUES)
        session.close("finished")
        files = sum(1 for path in Path(place).rglob("*") if path.is_file() and path.stat().st_size)
    assert files, "nothing was written"
    return {"said": "a round is kept"}


def tensorboard() -> dict[str, Any]:
    """Event files."""
    return _tracked("tensorboard")


def mlflow() -> dict[str, Any]:
    """A SQLite store."""
    return _tracked("mlflow", uri="sqlite:///{place}/mlflow.db")


def wandb() -> dict[str, Any]:
    """Offline files."""
    return _tracked("wandb", mode="offline")


def trackio() -> dict[str, Any]:
    """Its SQLite files, by ``TRACKIO_DIR`` in a folder that is thrown away."""
    with TemporaryDirectory(prefix="fedlora-", ignore_cleanup_errors=True) as place:
        os.environ["TRACKIO_DIR"] = place
        from fedlora.runs.trackers import TRACKERS, RunInfo

        session = TRACKERS.load("trackio")(project="doctor").open(RunInfo("doctor", None, {"rounds": 1}, None))
        session.log(1, VALUES)
        session.close("finished")
        assert list(Path(place).glob("doctor*.db")), "nothing was written"
    return {"said": "a round is kept"}


TESTS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch, "model": model, "figures": figures, "peft": peft, "dp": dp, "flower": flower,
    "flower-simulation": simulation, "quantize": quantize, "track-tensorboard": tensorboard, "track-mlflow": mlflow,
    "track-wandb": wandb, "track-trackio": trackio,
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(TESTS[sys.argv[1]]()))
