"""The client process of a deployed client: it keeps model and data in memory, and answers one message after another.

Flower starts a process for every message. That process, the proxy, imports no torch and loads no model. It finds or
starts the client process, passes the message on through a socket, and waits for the answer. This module has both ends
of the socket. The client process ends when the SuperNode's executor has ended.
"""

import fcntl
import hashlib
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from fedlora.flower.client_messages import build_client_app
from fedlora.flower.deploy.app_source import Source, read_source, source_from_table
from fedlora.flower.deploy.node_config import state_folder
from fedlora.runs.progress_file import is_alive
from fedlora.schema import ConfigError

LOG = "host.log"  # in a client's state folder
STARTING = 300.0  # seconds for a client process to start; imports take a minute on a busy machine
IDLE = 1800.0  # seconds without a message after which it ends to free its memory; the next message starts another
LOOK = 0.5  # seconds between two checks whether the parent is alive


# ------------------------------------------------------------------------------------------ the proxy
def client_app(
    config: str | Path | Callable[[Any], Any], *, evaluate: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    requires: Mapping[str, Any] | None = None, accepts: Collection[str] = (),
) -> ClientApp:  # fmt: skip
    """Return the ``ClientApp`` of a TOML file, or of clients with their own trainers.

        def trainer(client):
            return MyTrainer(client.number, client.config["data"])

        app = fedlora.flower.client_app(trainer, requires={"privacy.level": "client"})

    A node's configuration has ``client``, its number, and its own machine's settings. The base model stays in memory
    between messages, in a client process of its own; with ``host = false`` in the node's configuration there is none,
    and each message loads model and data again.

    Args:
        config: a TOML file, or the function ``trainer(client)`` of ``fedlora.federate``, defined in a module. All
            other settings of the run then come from the server, and ``client.config`` is the node's configuration.
        evaluate: see ``fedlora.federate``; a function of a module too.
        requires: settings without which this client takes part in no run, by dotted keys, such as
            ``{"flower.secure_aggregation": True}``.
        accepts: plug-ins, as ``"package.module:Class"``, that the server may name; others are refused unless they are
            part of fedlora or have an entry point. ``"attack"``: the run may have a table ``[attack]``.

    Raises ``ConfigError`` for a function that another process cannot import, or a requirement that is no setting.
    """
    source = read_source(config, evaluate, requires or {}, accepts)

    def turns(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
        node_config = context.node_config
        if node_config.get("host", True) is False:
            return source.answer(kind, content, node_config, "its own log")
        try:
            with _connect(source, node_config) as connection:  # messages are Flower's protobuf: reading runs no code
                connection.send_bytes(kind.encode())
                connection.send_bytes(recorddict_to_proto(content).SerializeToString())
                is_answer, body = connection.recv_bytes() == b"answer", connection.recv_bytes()
        except (OSError, EOFError, AuthenticationError, ConfigError) as error:
            print(f"fedlora: the client process cannot be reached: {error}", file=sys.stderr)
            return "its client process cannot be reached; its SuperNode says why"
        if is_answer:
            return recorddict_from_proto(Proto.FromString(body))
        # Users read the SuperNode's log first, which gets this line.
        print(f"fedlora: {kind}: {body.decode()}: {log_path(node_config)}", file=sys.stderr)
        return body.decode()

    return build_client_app(turns)


def log_path(node_config: Mapping[str, Any]) -> Path:
    """Return the path of a client process's log, which has its errors in full."""
    return state_folder(node_config).absolute() / LOG


def _connect(source: Source, node_config: Mapping[str, Any]) -> Connection:
    """Return a connection to the client process of this configuration; the process is started if necessary."""
    endpoint = Endpoint(source, node_config)
    with open(os.open(endpoint.lock, os.O_CREAT | os.O_WRONLY, 0o600), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two messages at once must not start two processes
        if connection := endpoint.connect():
            return connection
        process = endpoint.start()
        end = time.monotonic() + STARTING
        while time.monotonic() < end:
            if connection := endpoint.connect():
                return connection
            if process.poll() is not None:
                raise OSError(f"it ended with status {process.returncode}; {endpoint.log} says why")
            time.sleep(0.05)
    raise TimeoutError(f"it did not listen within {STARTING:g} seconds; {endpoint.log} says more")


class Endpoint:
    """Socket and key of a client process, in a folder that only its owner may read.

    There is one for each configuration, node configuration, and SuperNode process. The log is in the state folder.
    """

    def __init__(self, source: Source, node_config: Mapping[str, Any]):
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        folder = runtime / f"fedlora-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise OSError(f"{str(folder)!r} is open to others; remove it, or set XDG_RUNTIME_DIR")
        identity = [source.identity(), dict(node_config), os.getppid()]
        name = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()
        self.socket, self.key, self.lock = (folder / f"{name}.{end}" for end in ("sock", "key", "lock"))
        self.source, self.node_config, self.log = source, node_config, log_path(node_config)

    def connect(self) -> Connection | None:
        """Return a connection, or None if no process listens."""
        try:
            return Client(str(self.socket), "AF_UNIX", authkey=self.key.read_bytes())
        except (FileNotFoundError, ConnectionRefusedError):
            return None

    def start(self) -> subprocess.Popen:
        """Start a client process in its own session. It ends with the SuperNode's executor, which is our parent."""
        arguments = {
            "source": self.source.to_table(), "node": dict(self.node_config), "parent": os.getppid(),
            "socket": str(self.socket), "key": str(self.key),
        }  # fmt: skip
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fedlora.flower.deploy.client_process", json.dumps(arguments)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


# ----------------------------------------------------------------------------------- the client process
def serve_messages(arguments: Mapping[str, Any]) -> None:
    """Answer every proxy that connects with the key, one after another."""
    source, node_config = source_from_table(arguments["source"]), arguments["node"]
    key, socket = Path(arguments["key"]), Path(arguments["socket"])
    socket.unlink(missing_ok=True)
    authkey = secrets.token_bytes(32)
    with open(os.open(key, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
        file.write(authkey)
    signal.signal(signal.SIGTERM, lambda *_: _exit(socket, key))
    with Listener(str(socket), "AF_UNIX", authkey=authkey) as listener:
        idle_since: float | None = time.monotonic()  # None while a message is answered

        def exit_with_parent() -> None:
            while is_alive(arguments["parent"]) and ((since := idle_since) is None or time.monotonic() - since <= IDLE):
                time.sleep(LOOK)
            _exit(socket, key)

        threading.Thread(target=exit_with_parent, daemon=True).start()
        while True:
            try:
                with listener.accept() as connection:
                    idle_since = None
                    _reply(connection, source, node_config)
                    idle_since = time.monotonic()
            except (EOFError, OSError, AuthenticationError) as error:  # a proxy was killed
                print(f"fedlora: a message was not finished: {error}", file=sys.stderr, flush=True)


def _reply(connection: Connection, source: Source, node_config: dict) -> None:
    kind = connection.recv_bytes().decode()
    content = recorddict_from_proto(Proto.FromString(connection.recv_bytes()))
    answer = source.answer(kind, content, node_config, f"{LOG} in its state folder")
    is_answer = isinstance(answer, RecordDict)
    connection.send_bytes(b"answer" if is_answer else b"error")
    connection.send_bytes(recorddict_to_proto(answer).SerializeToString() if is_answer else str(answer).encode())
    sys.stderr.flush()


def _exit(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)
    os._exit(0)  # a running turn is lost: no proxy waits for it, and the state on disk is complete


if __name__ == "__main__":
    serve_messages(json.loads(sys.argv[1]))
