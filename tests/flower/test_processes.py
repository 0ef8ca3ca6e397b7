"""A federation of real processes on loopback: TLS, registered keys, and what goes wrong."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

from fedlora.flower.certs import certificates
from fedlora.flower.processes import Loopback

pytestmark = [
    pytest.mark.flower,
    pytest.mark.slow,
    pytest.mark.xdist_group("flower"),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for left processes in /proc"),
]

PYPROJECT = """
[project]
name = "tiny"
version = "1.0.0"
description = "Adds a number at each node and averages."
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedlora"
[tool.flwr.app.components]
serverapp = "tiny.server:app"
clientapp = "tiny.client:app"
[tool.flwr.app.config]
text = ""
fail = false
nap = 0.0
timeout = 60.0
rounds = 2
nodes = 2
"""
CLIENT = """
import time
import fedlora
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def train(message, context):
    print("TRAINING", sorted(context.node_config.items()), fedlora.__file__, flush=True)
    time.sleep(context.run_config["nap"])
    arrays = [x + context.node_config["add"] for x in message.content["arrays"].to_numpy_ndarrays()]
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)
"""
SERVER = """
import time
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    print("TEXT", repr(config["text"]), flush=True)
    if config["fail"]:
        raise RuntimeError("broken on purpose")
    start = time.monotonic()
    result = FedAvg(fraction_evaluate=0.0, min_train_nodes=config["nodes"], min_available_nodes=config["nodes"]).start(
        grid=grid, initial_arrays=ArrayRecord([np.zeros(3)]), num_rounds=config["rounds"], timeout=config["timeout"]
    )
    print("RESULT", result.arrays.to_numpy_ndarrays()[0].tolist(), f"{time.monotonic() - start:.1f}s", flush=True)
"""
AWKWARD = 'it\'s "quoted" = yes, \\ #é\n[x]'


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "tiny").mkdir()
    for name, text in {
        "pyproject.toml": PYPROJECT, "tiny/__init__.py": "", "tiny/client.py": CLIENT, "tiny/server.py": SERVER
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    before = time.monotonic()
    nodes = {"a": {"add": 1.0, "text": AWKWARD, "on": True, "n": 3}, "b": {"add": 3.0}}
    with Loopback(nodes, tmp_path_factory.mktemp("logs")) as running:
        running.lines = []
        print(f"\nstart-up, registration and two nodes: {time.monotonic() - before:.1f} s")
        yield running
        folder = running.folder
    assert left(folder) == [] and not folder.exists()


def left(folder: Path) -> list[str]:
    """The processes that were started for this folder; found by their environment and arguments, not by the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in text and int(path.name) != os.getpid():
            found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def test_a_run_over_tls_with_registered_keys(flower, app):
    lines, before = [], time.monotonic()
    assert flower.run(app, {"text": AWKWARD}, lines.append) == 0
    print(f"\na run: {time.monotonic() - before:.1f} s, {next(x for x in lines if x.startswith('RESULT'))}")
    assert flower.outcome == "finished:completed"
    assert any("RESULT [4.0, 4.0, 4.0]" in line for line in lines), "two rounds of +2"
    assert f"TEXT {AWKWARD!r}" in lines
    node = flower.logs.joinpath("a.log").read_text()
    assert str([("add", 1.0), ("n", 3), ("on", True), ("text", AWKWARD)]) in node
    assert str(Path(sys.modules["fedlora"].__file__)) in node, "the app imports the fedlora that started it"
    assert flower.nodes().items() >= {"a": "online", "b": "online"}.items()


def test_a_run_that_raises_has_failed(flower, app):
    lines = []
    assert flower.run(app, {"fail": True}, lines.append) == 1
    assert flower.outcome == "finished:failed: ServerApp failed with exception: broken on purpose"
    assert any("RuntimeError: broken on purpose" in line for line in lines)


def test_an_app_that_cannot_start_is_a_sentence(flower, app, tmp_path):
    with pytest.raises(
        ChildProcessError, match=r"Flower did not start the run \(exit status 1\): Failed to load .*pyproject.toml"
    ):
        flower.run(tmp_path, watch=flower.lines.append)
    with pytest.raises(ValueError, match="the run has x of type list; Flower takes text, numbers"):
        flower.run(app, {"x": [1]})


def test_strangers_are_refused(flower, tmp_path):
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"mallory ended with status 1; .*Failed to activate SuperNode"):
        flower.add("mallory", {"add": 100.0}, register=False)
    other = certificates(tmp_path / "other", ["c"])
    shutil.copytree(other / "parties" / "c", flower.keys / "parties" / "c")
    with pytest.raises(ChildProcessError, match=r"c ended with status 1; .*CERTIFICATE_VERIFY_FAILED"):
        flower.add("c", {"add": 100.0})
    assert time.monotonic() - began < flower.deadline / 2, "at once, not at the deadline"
    assert (flower.nodes()["mallory"], flower.nodes()["c"]) == ("unknown", "registered")


def test_a_node_killed_in_mid_round_does_not_stop_the_run(flower, app):
    number, log, lines = flower.ids["b"], flower.logs / "b.log", []
    before = log.read_text().count("TRAINING")

    def watch(line):
        lines.append(line)
        if "Sampled 2 nodes" in line and "killed" not in lines:
            until = time.monotonic() + 300
            while log.read_text().count("TRAINING") == before and time.monotonic() < until:
                time.sleep(0.05)
            flower.kill("b")
            lines.append("killed")

    assert flower.run(app, {"nap": 5.0, "timeout": 400.0, "nodes": 1}, watch) == 0
    assert log.read_text().count("TRAINING") == before + 1
    result = [line for line in lines if line.startswith("RESULT")]
    assert any("RESULT [2.0, 2.0, 2.0]" in line for line in result), f"not two rounds of the one that is left: {result}"
    assert [name for name in left(flower.folder) if "home-b" in name] == []
    assert flower.ids["b"] == number


def test_a_run_without_end_is_stopped(flower, app):
    assert flower.run(app, {"nap": 60.0}, flower.lines.append, timeout=6) == 1
    assert flower.outcome.startswith("finished:stopped")


CHILD = """
import sys, time
from fedlora.flower.processes import Loopback
with Loopback({"a": {"add": 1.0}, "b": {"add": 1.0}}, sys.argv[1], insecure=True) as flower:
    print(flower.folder, flush=True)
    flower.run(sys.argv[2], {"nap": 60.0}, lambda line: print(line, flush=True))
"""


def test_a_signal_leaves_no_process(app, tmp_path):
    started = []
    for number, status in ((signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)):
        command = [sys.executable, "-c", CHILD, str(tmp_path / number.name), str(app)]
        # Where the tests themselves run in the background, Ctrl-C is ignored, and children would inherit that.
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        started.append((child, number, status))
    for child, number, status in started:
        with child:
            folder = Path(child.stdout.readline().strip())
            while "Sampled 2 nodes" not in child.stdout.readline():
                assert child.poll() is None, child.stderr.read()
            until = time.monotonic() + 120
            while not any("flwr-clientapp" in line for line in left(folder)) and time.monotonic() < until:
                time.sleep(0.1)
            names = set(
                re.findall("(?:flower|flwr)-(?:superlink|supernode|superexec|serverapp|clientapp)", str(left(folder)))
            )
            assert len(names) == 5, names
            child.send_signal(number)
            child.communicate(timeout=120)
        assert child.returncode == status
        assert left(folder) == [] and not folder.exists()


def test_an_exception_leaves_no_process_and_a_busy_port_is_told(tmp_path, monkeypatch):
    import socket

    from fedlora.flower import processes

    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(processes, "ports", lambda count: [taken.getsockname()[1]] * count)
        monkeypatch.setattr(processes, "answers", lambda port: False)
        flower = Loopback({"a": {}}, tmp_path / "logs", insecure=True)
        with pytest.raises(
            ChildProcessError, match=r"superlink ended with status \d+; its log, .*address already in use"
        ):
            flower.__enter__()
    assert left(flower.folder) == [] and not flower.folder.exists()


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="the node 'a' has x of type list"):
        Loopback({"a": {"x": [1]}}, tmp_path)
    with pytest.raises(ValueError, match="a process is named 'superlink' already"):
        Loopback({"superlink": {}}, tmp_path)
    keys = certificates(tmp_path / "keys", ["a"])
    with pytest.raises(ValueError, match="has no key for b; make one with certs.party"):
        Loopback({"a": {}, "b": {}}, tmp_path / "logs", certificates=keys).__enter__()
    assert list(tmp_path.glob("fedlora-flower-*")) == []


def test_a_killed_node_and_the_superlink_come_back(flower, app):
    if flower.family.alive("b"):  # this test alone
        flower.kill("b")
    number, before = flower.ids["b"], time.monotonic()
    flower.start("b")
    print(f"\na killed node is back after {time.monotonic() - before:.1f} s more")
    assert flower.ids["b"] == number, "the node of a registered key keeps its number"
    flower.stop("b")
    assert flower.nodes()["b"] == "offline", "who is stopped in order signs off"
    flower.start("b")
    before = time.monotonic()
    flower.restart_superlink()
    print(f"a SuperLink restarts in {time.monotonic() - before:.1f} s")
    lines = []
    assert flower.run(app, {"rounds": 1}, lines.append) == 0
    assert any("RESULT [2.0, 2.0, 2.0]" in line for line in lines)
    with pytest.raises(ValueError, match="the node 'a' runs already; kill it first"):
        flower.start("a")
