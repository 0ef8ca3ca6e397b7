"""Commands of the docs in processes that have everything imported already: forked from one that waits.

``python -m tests.docs.server SOCKET`` imports what the commands need and listens; ``shims`` writes programs named ``fedlora`` and
``python`` that hand their arguments, folder, environment and streams over and leave with the child's exit status. A page of
thirty commands then costs one start of torch, and each command still is a process of its own in a real shell.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IMPORTED = (
    "torch", "transformers", "datasets", "peft", "scipy.stats", "sklearn.datasets", "sklearn.model_selection",
    "flwr_datasets.partitioner", "transformers.models.auto.image_processing_auto", "transformers.models.vit.modeling_vit",
    "transformers.models.bert.modeling_bert", "fedlora.cli", "fedlora.comparison", "fedlora.aggregation", "fedlora.export",
    "fedlora.catalogue", "fedlora.planning", "fedlora.tasks.image_classification", "fedlora.report.tables",
    "fedlora.report.plots", "fedlora.report.progress",
)  # fmt: skip
SHIM = """#!{python} -SE
import array, json, os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({address!r})
said = json.dumps([{program!r}, *sys.argv[1:]]), os.getcwd(), json.dumps(dict(os.environ))
data = json.dumps(said).encode()
streams = array.array("i", [0, 1, 2])
s.sendmsg([len(data).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
s.sendall(data)
status = s.recv(1)
sys.exit(status[0] if status else 70)
"""


@contextmanager
def shims(folder: Path) -> Iterator[Path]:
    """A folder with the programs, and the process behind them; both gone afterwards."""
    address, programs = folder / "s", folder / "bin"
    programs.mkdir(parents=True)
    for program in ("fedlora", "python"):
        path = programs / program
        path.write_text(SHIM.format(python=sys.executable, address=str(address), program=program))
        path.chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "140", "TERM": "dumb"}
    process = subprocess.Popen([sys.executable, "-m", "tests.docs.server", str(address)], env=environment)
    try:
        while not address.exists():
            assert process.poll() is None, "the process behind the docs' commands did not start"
            time.sleep(0.05)
        yield programs
    finally:
        process.terminate()
        process.wait()


def serve(address: str) -> None:
    """Listens, and forks a child for each command."""
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for: they say how they ended
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _child(connection)
        connection.close()


def _child(connection: socket.socket) -> None:
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    size, data = int.from_bytes(head, "big"), b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    argv, folder, environment = json.loads(data)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(json.loads(environment))
    status = _status(json.loads(argv))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    connection.send(bytes([status & 255]))
    os._exit(status & 255)


def _status(argv: list[str]) -> int:
    sys.argv = argv
    sys.path[0] = ""
    try:
        if argv[0] == "fedlora":
            from fedlora.cli import main

            main()
        else:
            _python(argv[1:])
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return 1 if isinstance(left.code, str) else int(left.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _python(arguments: list[str]) -> None:
    """``python FILE``, ``python -m MODULE`` and ``python -c TEXT``."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
