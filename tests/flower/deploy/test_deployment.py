"""A SuperLink and three SuperNodes as processes, with TLS and node keys: the same bits, and what goes wrong.

One deployment for all tests of this module; one is in the first tier.
"""

import json
import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import fedlora
from fedlora import cli
from fedlora.files import load_tree
from fedlora.flower.client_store import ClientStore
from fedlora.flower.deploy import local, processes
from fedlora.flower.deploy.certificates import create_certificates
from fedlora.schema import dumps
from tests.fixtures.flower import agree, config, same, trained
from tests.fixtures.flower_deployment import (
    SECONDS,
    left,
    open_to_others,
    release,
    wait_until,
    write_app,
    write_programs,
    write_tiny,
)  # fmt: skip

pytestmark = [
    pytest.mark.flower,
    pytest.mark.xdist_group("flower"),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for left processes in /proc"),
]

AWKWARD = 'it\'s "quoted" = yes, \\ #é\n[x]'
EDGES = ("engine.threads=1", "flower.poll=0.1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("deployment")


@pytest.fixture(scope="module")
def nodes(place):
    """What each node is told: text that must be quoted, a whole number, a fraction, and yes."""
    common = {"engine.threads": 1, "host": True, "num-partitions": 3.5}
    return {f"party-{k}": {"client": k, "state": str(place / AWKWARD / str(k)), **common} for k in range(3)}


@pytest.fixture(scope="module")
def flower(place, nodes):
    programs = write_programs(place / "programs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "find_commands", lambda: programs)
        with local.Loopback(nodes, place / "logs", deadline=SECONDS) as running:
            yield running
            folder = running.folder
    assert left(folder) == [] and not folder.exists()


def log(flower, name):
    return (flower.logs / f"{name}.log").read_text()


def records_of(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kept(nodes, folder, client):
    run = json.loads((folder / "run.json").read_text())["run"]
    return ClientStore(Path(nodes[f"party-{client}"]["state"]) / run).load(client)


@pytest.fixture(scope="module")
def folded(place):
    """FedEx, for its base updates: a configuration, and the folder of its run in this process."""
    one = config("method.name=fedex-lora", "rounds=2", "evaluation.every=2", *EDGES)
    fedlora.run(one, place / "here")
    return one, place / "here"


def has_the_bits(there, here):
    assert same(load_tree(there / "shared.safetensors"), load_tree(here / "shared.safetensors"))
    assert same(load_tree(there / "base_update.safetensors"), load_tree(here / "base_update.safetensors"))
    theirs, ours = records_of(there), records_of(here)
    assert [r["round"] for r in theirs] == [1, 2]
    assert [r["loss"] for r in theirs] == [r["loss"] for r in ours]
    assert agree(theirs[-1]["clients"], ours[-1]["clients"]) and agree(theirs[-1]["global"], ours[-1]["global"])


def test_a_run_over_tls_with_registered_keys_ends_with_the_bits_of_one_process(flower, place, nodes, folded):
    (one, here), lines = folded, []
    app, out = write_app(place / "app", one, place / "unused"), place / AWKWARD / "run"
    assert flower.run(app, {"out": str(out)}, lines.append, timeout=SECONDS) == 0, (flower.outcome, lines[-20:])
    assert flower.outcome == "finished:completed"
    assert not (place / "unused").exists(), "the run's configuration reaches the server app as it was"
    has_the_bits(out, here)
    assert any(line.startswith("round 2 of 2: ") for line in lines), "the run's log is streamed"
    for name, told in nodes.items():
        assert f"NODE {sorted(told.items())} {fedlora.__file__}\n" in log(flower, name), (
            "a node's configuration arrives as it was, and the app imports the fedlora that started it"
        )
    files = [path for path in (place / AWKWARD).rglob("*.safetensors") if path.parent.name == "clients"]
    assert {path.stem for path in files} >= {"0", "1", "2"}, "each party's state lies where its node says"


@pytest.mark.slow
def test_a_run_that_a_superlinks_restart_broke_goes_on_and_ends_with_the_bits_of_one_process(flower, place, folded):
    """What was done before the restart and after it is one run. The turns of its second round wait for the restart."""
    (one, here), out, lines = folded, place / "broken", []
    app = write_app(place / "app-broken", one, out, held=((0, 1), (1, 1), (2, 1)))

    def restart():
        wait_until(lambda: len(records_of(out)) == 1, "no round came to its end")
        flower.restart_superlink()
        release(out)

    restarter = threading.Thread(target=restart)
    restarter.start()
    assert flower.run(app, watch=lines.append, timeout=SECONDS) == 1, flower.outcome
    restarter.join()
    assert len(records_of(out)) == 1
    assert flower.run(app, watch=lines.append, timeout=SECONDS) == 0, (flower.outcome, lines[-20:])
    has_the_bits(out, here)


@pytest.mark.slow
def test_a_node_that_is_killed_in_its_turn_is_named_and_comes_back(flower, place, nodes):
    """FedSA: each party's B stays on its own disk. Party 2 dies in its turn of round 2 and is back before the end.

    Round 2 waits until Flower has missed two of its heartbeats: no time of a slow machine is in it. Party 0's turn of
    round 3 waits until party 2 is back.
    """
    one = config("method.name=fedsa-lora", "rounds=3", "evaluation.every=3", *EDGES)
    out, lines, failed = place / "killed", [], []
    app = write_app(place / "app-killed", one, out, held=((2, 1), (0, 2)))
    number, home = flower.ids["party-2"], flower.folder / "home-party-2"

    def kill():
        try:
            wait_until(lambda: "HELD" in log(flower, "party-2")[before:], "party 2 did not begin its turn")
            running = str(left(home))
            assert all(part in running for part in ("supernode", "superexec", "clientapp", "client_process")), running
            flower.kill("party-2")
            assert left(home) == []
            wait_until(lambda: len(records_of(out)) == 2, "round 2 did not end without party 2")
            assert flower.nodes()["party-2"] == "offline"
            flower.start("party-2")
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            release(out)

    before = len(log(flower, "party-2"))
    killer = threading.Thread(target=kill)
    killer.start()
    assert flower.run(app, watch=lines.append, timeout=SECONDS) == 0, (flower.outcome, lines[-20:])
    killer.join()
    assert not failed
    records = records_of(out)
    assert [record["cohort"] for record in records] == [[0, 1, 2], [0, 1], [0, 1]]
    assert "2" in records[1]["absent"]
    assert any("client 2: " in line and line.startswith("round 2") for line in lines)
    assert flower.ids["party-2"] == number, "the node of a registered key keeps its number"
    assert len(records[2]["clients"]["each"]) == 3, "who is back is scored with what it has on its disk"
    for client in (0, 1):
        own = kept(nodes, out, client).resolve_pending(2).kept
        assert any(layer.keys() == {"B"} for layer in own.values()) and "classifier" in trained(own)
        state = Path(nodes[f"party-{client}"]["state"])
        assert list(state.rglob("*.safetensors")) and open_to_others(state) == []
    with pytest.raises(ValueError, match="the node 'party-2' runs already; kill it first"):
        flower.start("party-2")
    flower.stop("party-2")
    assert flower.nodes()["party-2"] == "offline", "who is stopped in order signs off"
    flower.start("party-2")
    assert flower.nodes().items() >= dict.fromkeys(nodes, "online").items()
    assert flower.ids["party-2"] == number


@pytest.mark.slow
def test_a_party_that_is_killed_for_good_is_in_the_summary_the_closing_table_and_the_report(
    flower, place, monkeypatch, capsys
):
    """`fedlora flower local` on this module's deployment: party 2 dies in round 3 of 5 and never comes back."""
    one = config("rounds=5", "flower.min_clients=2", *EDGES)
    out, toml, failed = place / "two-of-three", place / "two-of-three.toml", []
    toml.write_text(dumps(one.table))
    monkeypatch.setattr(local, "write_app", lambda folder, config, out: write_app(folder, config, out, held=((2, 2),)))
    monkeypatch.setattr(local, "Loopback", lambda *_, **__: contextmanager(lambda: (yield flower))())

    def kill():
        try:
            wait_until(lambda: "HELD" in log(flower, "party-2")[before:], "party 2 did not begin its turn of round 3")
            flower.kill("party-2")
        except BaseException as error:
            failed.append(error)
            raise

    before = len(log(flower, "party-2"))
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        closing = printed("flower", "local", toml, "--out", out, capsys=capsys, monkeypatch=monkeypatch)
    finally:
        killer.join()
        flower.start("party-2")
    assert not failed
    summary = json.loads((out / "summary.json").read_text())
    assert [(kind, list(found), list(found["2"])) for kind in ("absent", "unscored") if (found := summary[kind])] == [
        ("absent", ["2"], ["3", "4", "5"]),
        ("unscored", ["2"], ["3", "4", "5"]),
    ]
    assert summary["absent"]["2"]["5"] == summary["unscored"]["2"]["5"] == "its node is not connected"
    assert "quarantined" not in summary and summary["rounds"] == 5 and not summary["interrupted"]
    assert summary["scored"] == {"clients": 2, "of": 3}
    each = summary["final"]["clients"]["each"]
    assert each[2] is None and summary["final"]["clients"]["mean"] == pytest.approx(sum(each[:2]) / 2)
    again = printed("show", out, capsys=capsys, monkeypatch=monkeypatch)
    for text in (closing, again):
        assert "mean over 2 of 3 clients" in text and "mean over clients" not in text
        assert "client 2, absent in round │ 3, 4, 5: " in text and "client 2, not scored in round │ 3, 4, 5: " in text
        assert "its node is not connected" in text
    printed("report", out, "--out", place / "report.html", capsys=capsys, monkeypatch=monkeypatch)
    page = (place / "report.html").read_text()
    assert "2 of 3 clients" in page and "client 2, absent in round" in page and "its node is not connected" in page
    assert "mean over 2 of 3 clients in rounds 3–5" in page


def printed(*words, capsys, monkeypatch):
    """What a command of this process prints on stdout, with single spaces."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    found = capsys.readouterr()
    assert not ended.value.code, found.err
    return " ".join(found.out.split())


@pytest.fixture(scope="module")
def tiny(place):
    return write_tiny(place / "tiny")


@pytest.mark.slow
def test_a_run_that_raises_has_failed(flower, tiny):
    lines = []
    assert flower.run(tiny, {"fail": True, "text": AWKWARD}, lines.append) == 1
    assert flower.outcome == "finished:failed: ServerApp failed with exception: broken on purpose"
    assert any("RuntimeError: broken on purpose" in line for line in lines)
    assert f"TEXT {AWKWARD!r}" in lines


@pytest.mark.slow
def test_a_run_without_end_is_stopped_when_its_time_is_over(flower, tiny, monkeypatch):
    """The time is over when the server app is at work, however long that took."""
    over = []

    class Timer:
        def __init__(self, seconds, then):
            assert seconds == 0.5
            over.append(then)

        def start(self):
            pass

        cancel = start

    monkeypatch.setattr(processes.threading, "Timer", Timer)

    def watch(line):
        if line.startswith("TEXT"):
            over[0]()

    assert flower.run(tiny, watch=watch, timeout=0.5) == 1
    assert flower.outcome.startswith("finished:stopped")


@pytest.mark.slow
def test_an_app_that_cannot_start_is_a_sentence(flower, tiny, tmp_path):
    with pytest.raises(
        ChildProcessError, match=r"Flower did not start the run \(exit status 1\): Failed to load .*pyproject.toml"
    ):
        flower.run(tmp_path, watch=lambda line: None)
    with pytest.raises(ValueError, match="the run has x of type list; Flower takes text, numbers"):
        flower.run(tiny, {"x": [1]})


@pytest.mark.slow
def test_strangers_are_refused(flower, tmp_path):
    with pytest.raises(ChildProcessError, match=r"mallory ended with status 1; .*Failed to activate SuperNode"):
        flower.add("mallory", {"client": 3}, register=False)
    other = create_certificates(tmp_path / "other", ["c"])
    shutil.copytree(other / "parties" / "c", flower.keys / "parties" / "c")
    with pytest.raises(ChildProcessError, match=r"c ended with status 1; .*CERTIFICATE_VERIFY_FAILED"):
        flower.add("c", {"client": 4})
    found = flower.nodes()
    assert (found["mallory"], found["c"]) == ("unknown", "registered")
    for name in ("mallory", "c"):
        del flower.configs[name], flower.ports[name]
