"""Real processes of Flower for tests: programs that beat faster, apps that wait for a test, and what is left of them."""

import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fedlora.flower.deploy.app_template import init

SECONDS = 600.0  # that a test waits for an event, on a machine that may be busy

# Flower waits 60 seconds until it misses a killed node or app, and has no setting for it. What users run keeps that; the
# tests' own copies of Flower's programs beat every 10 seconds, the least that a SuperLink accepts, and are missed after
# 20. A task still has 30 seconds to start. A program imports its own module, not those of its package's other programs.
PROGRAM = """#!{python}
import importlib, sys, types
from flwr.common import constant
usual, constant.HEARTBEAT_DEFAULT_INTERVAL = constant.HEARTBEAT_DEFAULT_INTERVAL, constant.HEARTBEAT_MIN_INTERVAL
package, _, name = {module!r}.rpartition(".")
parent = importlib.import_module(package.rpartition(".")[0])
alone = sys.modules[package] = types.ModuleType(package)
alone.__path__ = [f"{{folder}}/{{package.rpartition('.')[2]}}" for folder in parent.__path__]
main = getattr(importlib.import_module({module!r}), {function!r})
for state in ("sql_corestate", "in_memory_corestate"):
    if found := sys.modules.get(f"flwr.supercore.corestate.{{state}}"):
        found.HEARTBEAT_PATIENCE *= constant.HEARTBEAT_DEFAULT_INTERVAL / usual
        found.HEARTBEAT_DEFAULT_INTERVAL = usual
sys.exit(main())
"""
PROGRAMS = {
    "flwr": "flwr.cli.app:app",
    "flower-superlink": "flwr.superlink.cli.flower_superlink:flower_superlink",
    "flower-supernode": "flwr.supernode.cli.flower_supernode:flower_supernode",
    "flower-superexec": "flwr.supercore.cli.flower_superexec:flower_superexec",
    "flwr-serverapp": "flwr.superlink.cli.flwr_serverapp:flwr_serverapp",
    "flwr-clientapp": "flwr.supernode.cli.flwr_clientapp:flwr_clientapp",
}

# Added to a party's client app: it says what its node is told and which fedlora it has. It holds a turn of the client
# ``held`` that begins after round ``after`` until ``back`` exists.
TOLD = """
import time

import fedlora


@app.lifespan()
def told(context):
    print("NODE", sorted(context.node_config.items()), fedlora.__file__, flush=True)
    records, back = Path({records!r}), Path({back!r})
    if (context.node_config["client"], records.exists() and records.read_text().count("\\n")) in {held!r}:
        print("HELD", flush=True)
        while not back.exists():
            time.sleep(0.05)
    yield
"""

TINY = {
    "pyproject.toml": """
[project]
name = "tiny"
version = "1.0.0"
description = "Has no end; asks every node, and raises, where it is told to."
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
ask = false
""",
    "tiny/__init__.py": "",
    "tiny/client.py": """
import time
from flwr.clientapp import ClientApp
app = ClientApp()

@app.query()
def query(message, context):
    print("HELD", flush=True)
    time.sleep(3600)
""",
    "tiny/server.py": """
import time
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    print("TEXT", repr(context.run_config["text"]), flush=True)
    if context.run_config["fail"]:
        raise RuntimeError("broken on purpose")
    if context.run_config["ask"]:
        grid.push_messages([Message(RecordDict(), node, "query") for node in grid.get_node_ids()])
    time.sleep(3600)
""",
}


def write_programs(folder: Path) -> Path:
    """Writes Flower's programs as the tests run them."""
    folder.mkdir()
    for name, place in PROGRAMS.items():
        module, _, function = place.partition(":")
        (folder / name).write_text(PROGRAM.format(python=sys.executable, module=module, function=function))
        (folder / name).chmod(0o755)
    return folder


def write_app(folder: Path, config, out: Path, held: tuple[tuple[int, int], ...] = ()) -> Path:
    """A configuration's app. Of each (client, rounds) in ``held``, the turns after so many rounds wait for ``out.back``."""
    app = init(folder, config, out)
    (client,) = app.glob("*/client_app.py")
    text = TOLD.format(records=str(out / "metrics.jsonl"), back=f"{out}.back", held=held)
    client.write_text(client.read_text() + text)
    return app


def write_tiny(folder: Path) -> Path:
    """An app without fedlora."""
    for name, text in TINY.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def release(out: Path) -> None:
    """Lets the turns go on that ``write_app`` holds."""
    Path(f"{out}.back").touch()


def wait_until(true: Callable[[], object], what: str) -> None:
    """Until it is true; an ``AssertionError`` after ``SECONDS``."""
    until = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < until, f"{what} within {SECONDS:g} seconds"
        time.sleep(0.05)


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


def open_to_others(folder: Path) -> list[Path]:
    """The files that not only their owner may read."""
    return [p for p in folder.rglob("*") if p.is_file() and stat.S_IMODE(p.stat().st_mode) != 0o600]
