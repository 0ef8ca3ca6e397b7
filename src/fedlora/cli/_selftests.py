"""One small operation of each package that fedlora can use, for ``fedlora doctor``.

``python -m fedlora.cli._selftests NAME`` prints a line of JSON, ``{"said": ...}``, or fails with the package's error.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def try_torch() -> dict[str, Any]:
    """Compute a product and its gradient, and list the devices."""
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


def try_model() -> dict[str, Any]:
    """Build a Transformers network from a configuration, attach an adapter, and run one forward pass."""
    import torch
    from transformers import BertConfig, BertModel

    from fedlora.adapters import LoRA
    from fedlora.training.model import Model

    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )  # fmt: skip
    network = BertModel(config).eval()
    rows = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = network(rows).last_hidden_state
        attached = Model.attach(network, LoRA(rank=2), ["query", "value"], [])
        attached.load(attached.initial(0))
        after = network(rows).last_hidden_state
    assert torch.allclose(before, after), "a fresh adapter changes the network"
    return {"said": f"{len(attached.parts)} weights adapted"}


def try_figures() -> dict[str, Any]:
    """Draw a figure as SVG."""
    import altair as alt
    import vl_convert

    chart = alt.Chart(alt.Data(values=[{"x": 1, "y": 2}])).mark_point().encode(x="x:Q", y="y:Q")
    assert "<svg" in vl_convert.vegalite_to_svg(chart.to_json()), "no picture was drawn"
    return {"said": "a figure is drawn"}


def try_peft() -> dict[str, Any]:
    """Compare PEFT's LoRA with fedlora's on the same leaves."""
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


def try_dp() -> dict[str, Any]:
    """Run Opacus' accountants on one setting."""
    from fedlora.security.privacy.accounting import compute_epsilon

    values = {name: compute_epsilon(name, 1.0, 0.1, 10, 1e-5) for name in ("prv", "rdp")}
    assert 0 < values["prv"] <= values["rdp"] < math.inf, f"epsilon is {values}"
    return {"said": f"ε = {values['prv']:.2f}"}


def try_flower() -> dict[str, Any]:
    """Encode and decode a message's record, and check a signature."""
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


def try_simulation() -> dict[str, Any]:
    """Call a Ray actor once."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        assert ray.get(ray.remote(lambda: 2).remote()) == 2, "an actor answered wrongly"
    finally:
        ray.shutdown()
    return {"said": "an actor answers"}


def try_quantize() -> dict[str, Any]:
    """Quantise a matrix to four bits and back, on a GPU if there is one."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(64, 64, device=device)
    back = dequantize_4bit(*quantize_4bit(x, quant_type="nf4"))
    error = float((back - x).norm() / x.norm())
    assert error < 0.2, f"four bits lose {error:.2f} of a matrix"
    return {"said": f"four bits on {device}: relative error {error:.2f}"}


def try_tracker(name: str, **settings: Any) -> dict[str, Any]:
    """Log one round with a tracker's local backend, in a temporary folder."""
    with TemporaryDirectory(prefix="fedlora-", ignore_cleanup_errors=True) as folder:
        os.environ["TRACKIO_DIR"] = folder  # read when trackio is imported
        from fedlora.runs.trackers import TRACKERS, RunInfo

        options = {key: value.format(folder=folder) for key, value in settings.items()}
        session = TRACKERS.load(name)(**options).open(RunInfo("doctor", Path(folder), {"rounds": 1}, None))
        session.log(1, {"train/loss": 0.5})
        session.close("finished")
        assert any(path.is_file() and path.stat().st_size for path in Path(folder).rglob("*")), "nothing was written"
    return {"said": "a round is kept"}


def try_trl() -> dict[str, Any]:
    """Check that TRL's trainers are ones that ``fedlora.federate`` can hand a model and a turn's settings."""
    from transformers import Trainer
    from trl import DPOTrainer, SFTTrainer

    hooks = ("create_optimizer", "create_scheduler", "add_callback", "remove_callback", "train", "evaluate")
    for kind in (SFTTrainer, DPOTrainer):
        lacking = [name for name in hooks if not hasattr(kind, name)]
        assert issubclass(kind, Trainer) and not lacking, f"{kind.__name__} has no {', '.join(lacking) or 'Trainer'}"
    return {"said": "its trainers are Trainers of transformers"}


def try_grading() -> dict[str, Any]:
    """Grade an answer in LaTeX, and look for the model of lm-evaluation-harness that reads an export."""
    from lm_eval.api.registry import get_model

    from fedlora.tasks.metrics.answers import grade_answers

    assert grade_answers([r"$\frac{1}{2}$", "2"], ["0.5", "0.5"], "math") == [True, False], "1/2 is not 0.5"
    assert get_model("hf") is not None
    return {"said": "answers in LaTeX are compared, and lm-evaluation-harness is there"}


def try_zero() -> dict[str, Any]:
    """Read a configuration of ZeRO stage 2, and check that engines have what ``fedlora.federate`` calls."""
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed import DeepSpeedEngine

    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1})
    assert plugin.zero_stage == 2, f"stage 2 is read as {plugin.zero_stage}"
    assert hasattr(DeepSpeedEngine, "destroy"), "an engine has no destroy"
    return {"said": "ZeRO stage 2 is read"}


TESTS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": try_torch, "model": try_model, "figures": try_figures, "peft": try_peft,
    "trl": try_trl, "deepspeed": try_zero, "dp": try_dp, "llm": try_grading,
    "flower": try_flower, "flower-simulation": try_simulation, "quantize": try_quantize,
    "track-tensorboard": partial(try_tracker, "tensorboard"),
    "track-mlflow": partial(try_tracker, "mlflow", uri="sqlite:///{folder}/mlflow.db"),
    "track-wandb": partial(try_tracker, "wandb", mode="offline"),
    "track-trackio": partial(try_tracker, "trackio", project="doctor"),
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(TESTS[sys.argv[1]]()))
