"""Clients with their own trainers between a real SuperLink and SuperNodes: the bits of one process."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")
pytest.importorskip("peft", reason="needs the peft extra")

import fedlora
from fedlora.files import load_tree
from fedlora.flower.deploy import local
from tests.fixtures.flower import same
from tests.fixtures.flower_deployment import SECONDS, write_programs
from tests.fixtures.flower_trainers import build_trainer

pytestmark = [
    pytest.mark.flower,
    pytest.mark.slow,
    pytest.mark.xdist_group("flower"),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for left processes in /proc"),
]

APP = {
    "pyproject.toml": """
[project]
name = "own"
version = "1.0.0"
description = "Clients with their own trainers."
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedlora"
[tool.flwr.app.components]
serverapp = "own.server_app:app"
clientapp = "own.client_app:app"
[tool.flwr.app.config]
out = ""
clients = 3
""",
    "own/__init__.py": "",
    "own/client_app.py": """
from fedlora.flower import client_app


def trainer(client):
    from tests.fixtures.flower_trainers import build_trainer

    assert client.config["data"] == f"site-{client.number}"
    print("BUILT", client.number, flush=True)
    return build_trainer(client)


app = client_app(trainer, requires={"method.name": "fedex-lora"})
""",
    "own/server_app.py": """
from fedlora.flower import server_app

app = server_app(method="fedex-lora", rounds=2, flower={"poll": 0.1})
""",
}


def test_a_run_has_the_bits_of_one_process_and_loads_each_model_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    for name, text in APP.items():
        (tmp_path / "app" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "app" / name).write_text(text)
    programs = write_programs(tmp_path / "programs")
    monkeypatch.setattr(local, "find_commands", lambda: programs)
    nodes = {
        f"party-{k}": {"client": k, "state": str(tmp_path / f"state-{k}"), "engine.threads": 1, "data": f"site-{k}"}
        for k in range(3)
    }
    lines, out = [], tmp_path / "out"
    with local.Loopback(nodes, tmp_path / "logs", deadline=SECONDS) as flower:
        code = flower.run(tmp_path / "app", {"out": str(out)}, lines.append, timeout=SECONDS)
        logs = [(tmp_path / f"state-{k}" / "host.log").read_text() for k in range(3)]
        assert code == 0, (flower.outcome, lines[-30:], [log[-2000:] for log in logs])
    here = fedlora.federate(build_trainer, 3, "fedex-lora", 2, engine={"threads": 1})
    assert same(load_tree(out / "shared.safetensors"), here.shared)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in records] == json.loads(json.dumps([r["loss"] for r in here.records]))
    assert [log.count("BUILT") for log in logs] == [1, 1, 1], "the base stays loaded between messages"
