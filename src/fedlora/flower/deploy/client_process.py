"""The client process of a deployed client: it keeps model and data loaded, and answers message after message.

Flower starts a process for every message. That process, the proxy, imports no torch and loads no model: it finds the
client process, or starts it, passes the message on through a socket, and waits for the answer. Both ends of the socket
are here. The client process ends when the SuperNode's executor has ended.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from fedlora.flower.client_messages import build_client_app, handle_message, load_node, prepend_client
from fedlora.flower.deploy.node_config import read_client, state_folder
from fedlora.runs.progress_file import is_alive
from fedlora.schema import ConfigError

LOG = "host.log"  # in a client's state folder
STARTING = 300.0  # seconds until a client process must listen; imports take a minute on a busy machine
IDLE = 1800.0  # seconds without a message after which it gives its memory back; the next message starts another
LOOK = 0.5  # seconds between two looks whether the parent is still there


# ------------------------------------------------------------------------------------------ the proxy
def client_app(config: str | Path) -> ClientApp:
    """The ``ClientApp`` of a TOML file. A node's configuration has ``client``, and the settings of its own machine.

    With ``host = false`` in it there is no client process: each message then loads model and data anew.
    """
    path = Path(config)

    def turns(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
        node_config = context.node_config
        return prepend_client(kind, _answer(path, kind, content, node_config), lambda: read_client(node_config))

    return build_client_app(turns)


def _answer(config: Path, kind: str, content: RecordDict, node_config: Mapping[str, Any]) -> RecordDict | str:
    if node_config.get("host", True) is False:
        from fedlora.runs.config import read_table

        return handle_message(kind, content, lambda run: load_node(read_table(config), node_config, run))
    try:
        found = ask(connect(config, node_config), kind, content)
    except (OSError, EOFError, AuthenticationError, ConfigError) as error:
        print(f"fedlora: the party's host cannot be reached: {error}", file=sys.stderr)
        return "its host process cannot be reached; its SuperNode says why"
    if isinstance(found, str):  # the SuperNode's log is the first that is looked at
        print(f"fedlora: {kind}: {found}: {log_path(node_config)}", file=sys.stderr)
    return found


def log_path(node_config: Mapping[str, Any]) -> Path:
    """The log of a client process, with its errors in full."""
    return state_folder(node_config).absolute() / LOG


def ask(connection: Connection, kind: str, content: RecordDict) -> RecordDict | str:
    """Passes one message on. It is sent as Flower's own protobuf, nothing that would run on arrival."""
    with connection:
        connection.send_bytes(kind.encode())
        connection.send_bytes(recorddict_to_proto(content).SerializeToString())
        good, body = connection.recv_bytes() == b"answer", connection.recv_bytes()
    return recorddict_from_proto(Proto.FromString(body)) if good else body.decode()


def connect(config: Path, node_config: Mapping[str, Any]) -> Connection:
    """A connection to the client process of this configuration on this machine, which is started if need be."""
    endpoint = Endpoint.of(config, node_config)
    with endpoint.lock():  # two messages at once must not start two processes
        return endpoint.connect() or _start(endpoint, config, node_config)


def _start(endpoint: "Endpoint", config: Path, node_config: Mapping[str, Any]) -> Connection:
    process = endpoint.start(config, node_config)
    end = time.monotonic() + STARTING
    while time.monotonic() < end:
        connection = endpoint.connect()
        if connection is not None:
            return connection
        if process.poll() is not None:
            raise OSError(f"it ended with status {process.returncode}; {endpoint.log} says why")
        time.sleep(0.05)
    raise TimeoutError(f"it did not listen within {STARTING:g} seconds; {endpoint.log} says more")


class Endpoint:
    """Socket and key of a client process, in a folder that only its owner may read; its log is with the state."""

    def __init__(self, name: str, log: Path):
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        self.folder = runtime / f"fedlora-{os.getuid()}"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        about = self.folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise OSError(f"{str(self.folder)!r} is open to others; remove it, or set XDG_RUNTIME_DIR")
        self.socket, self.key, self.lock_file = (self.folder / f"{name}.{end}" for end in ("sock", "key", "lock"))
        self.log = log

    @classmethod
    def of(cls, config: Path, node_config: Mapping[str, Any]) -> "Endpoint":
        """The endpoint of one configuration of one node, of one SuperNode process."""
        identity = [config.read_text(encoding="utf-8"), dict(node_config), os.getppid()]
        name = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()
        return cls(name, log_path(node_config))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from connecting and starting meanwhile."""
        with open(os.open(self.lock_file, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def connect(self) -> Connection | None:
        """A connection; None where no process listens."""
        try:
            return Client(str(self.socket), "AF_UNIX", authkey=self.key.read_bytes())
        except (FileNotFoundError, ConnectionRefusedError):
            return None

    def start(self, config: Path, node_config: Mapping[str, Any]) -> subprocess.Popen:
        """Starts a client process in a session of its own; it ends with the SuperNode's executor, our parent."""
        arguments = {
            "config": str(config), "node": dict(node_config), "parent": os.getppid(),
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
    """Answers whichever proxy connects with the key, one after another."""
    from fedlora.runs.config import read_table

    table, node_config = read_table(arguments["config"]), arguments["node"]
    key, socket = Path(arguments["key"]), Path(arguments["socket"])
    socket.unlink(missing_ok=True)
    authkey = secrets.token_bytes(32)
    with open(os.open(key, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
        file.write(authkey)
    signal.signal(signal.SIGTERM, lambda *_: _exit(socket, key))
    with Listener(str(socket), "AF_UNIX", authkey=authkey) as listener:
        timer = IdleTimer()
        watched = (arguments["parent"], timer, socket, key)
        threading.Thread(target=_exit_with_parent, args=watched, daemon=True).start()
        while True:
            try:
                with listener.accept() as connection:
                    timer.stop()
                    _reply(connection, table, node_config)
                    timer.start()
            except (EOFError, OSError, AuthenticationError) as error:  # a proxy that was killed while it asked
                print(f"fedlora: a question was not finished: {error}", file=sys.stderr, flush=True)


def _reply(connection: Connection, table: dict, node_config: dict) -> None:
    kind = connection.recv_bytes().decode()
    content = recorddict_from_proto(Proto.FromString(connection.recv_bytes()))
    found = handle_message(kind, content, lambda run: load_node(table, node_config, run), f"{LOG} in its state folder")
    good = isinstance(found, RecordDict)
    connection.send_bytes(b"answer" if good else b"error")
    connection.send_bytes(recorddict_to_proto(found).SerializeToString() if good else str(found).encode())
    sys.stderr.flush()


class IdleTimer:
    """The time since the last answer."""

    def __init__(self) -> None:
        self.since: float | None = time.monotonic()

    def start(self) -> None:
        """Starts: a message is answered."""
        self.since = time.monotonic()

    def stop(self) -> None:
        """Stops: a message has come."""
        self.since = None

    def is_over(self) -> bool:
        """Whether the process has been idle for so long that it should end."""
        return self.since is not None and time.monotonic() - self.since > IDLE


def _exit_with_parent(parent: int, timer: IdleTimer, *files: Path) -> None:
    while is_alive(parent) and not timer.is_over():
        time.sleep(LOOK)
    _exit(*files)


def _exit(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)
    os._exit(0)  # a turn may be under way: nobody waits for its outcome, and the state on disk is whole


if __name__ == "__main__":
    serve_messages(json.loads(sys.argv[1]))
