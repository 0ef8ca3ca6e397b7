"""What a deployment on loopback leaves when it is broken off, and what it says to mistakes."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

from fedlora.flower.deploy import local, processes
from fedlora.flower.deploy.certificates import create_certificates
from fedlora.flower.deploy.local import Loopback
from fedlora.flower.deploy.processes import tail
from tests.fixtures.flower_deployment import SECONDS, left, wait_until, write_programs, write_tiny

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for left processes in /proc")

CHILD = """
import pathlib, sys
from fedlora.flower.deploy import local
programs, logs, app = sys.argv[1:]
local.find_commands = lambda: pathlib.Path(programs)
with local.Loopback({"a": {"client": 0}}, logs, insecure=True, deadline=600.0) as flower:
    print(flower.folder, flush=True)
    flower.run(app, {"ask": True}, lambda line: None)
"""
KINDS = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp")


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.xdist_group("flower")
def test_a_signal_leaves_no_process(tmp_path):
    """Two deployments, each in a process of its own and with a turn under way; one gets Ctrl-C, the other SIGTERM."""
    programs, app, started = write_programs(tmp_path / "programs"), write_tiny(tmp_path / "app"), []
    for number, status in ((signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)):
        logs = tmp_path / number.name
        # Where the tests themselves run in the background, Ctrl-C is ignored, and children would inherit that.
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(programs), str(logs), str(app)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        started.append((child, number, status, logs / "a.log"))
    try:
        for child, number, status, log in started:
            folder = Path(child.stdout.readline().strip())
            wait_until(lambda: child.poll() is not None or "HELD" in log.read_text(), "no turn began")  # noqa: B023
            found = str(left(folder))
            assert all(kind in found for kind in KINDS), found
            child.send_signal(number)
            child.communicate(timeout=SECONDS)
            assert child.returncode == status
            assert left(folder) == [] and not folder.exists()
    finally:
        for child, *_ in started:
            if child.poll() is None:  # an assertion failed: the deployment is not to outlive the test
                child.terminate()
                child.communicate()


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.xdist_group("flower")
def test_an_exception_leaves_no_process_and_a_busy_port_is_told(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(local, "find_free_ports", lambda count: [taken.getsockname()[1]] * count)
        monkeypatch.setattr(local, "is_listening", lambda port: False)
        flower = Loopback({"a": {}}, tmp_path / "logs", insecure=True, deadline=SECONDS)
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
    keys = create_certificates(tmp_path / "keys", ["a"])
    with pytest.raises(ValueError, match="has no key for b; make one with certificates.add_party"):
        Loopback({"a": {}, "b": {}}, tmp_path / "logs", certificates=keys).__enter__()
    assert list(tmp_path.glob("fedlora-flower-*")) == []


def test_a_killed_node_starts_again_when_the_superlink_has_missed_it(tmp_path, monkeypatch):
    """Until then the SuperLink would refuse its key."""
    seen = iter(["online", "online", "offline"])
    flower, happened = Loopback({"a": {}}, tmp_path), []
    flower.group, flower.ids = processes.ProcessGroup({}), {"a": 7}
    monkeypatch.setattr(flower, "nodes", lambda: {"a": next(seen)})
    monkeypatch.setattr(local.time, "sleep", happened.append)
    monkeypatch.setattr(flower, "_launch", lambda name: happened.append(name))
    monkeypatch.setattr(flower, "_wait", happened.append)
    flower.start("a")
    assert happened == [1, 1, "a", {"a": None}]


def test_a_log_is_told_by_its_reasons_and_not_by_the_frames_of_a_traceback():
    """A process that is stopped while it ends writes frames after the line that says why it ends."""
    frames = [
        "Traceback (most recent call last):",
        '  File "exit.py", line 119, in flwr_exit',
        "    wait()",
        "    ^^^^^^",
    ]
    log = ["INFO : starting", "ERROR : [SSL: CERTIFICATE_VERIFY_FAILED]", *(8 * frames), "KeyboardInterrupt", ""]
    assert tail(log) == "ERROR : [SSL: CERTIFICATE_VERIFY_FAILED]"
    assert tail(["╭─ Error ─╮", "│ No such option. │", "╰────╯"]) == "No such option."
    assert tail(["INFO : starting"]) == "INFO : starting" and tail([]) == "(nothing)"
