"""The client app of a deployed party: it hands each message to a host process that keeps the model loaded.

Flower starts a process for every message. That process imports no torch and loads no model: it finds the party's host,
or starts it, and waits for the answer.
"""

import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from fedlora.flower.client_messages import client_app as app_of
from fedlora.flower.client_messages import prepend_client
from fedlora.flower.deploy.node_config import number, state_folder
from fedlora.schema import ConfigError

LOG = "host.log"  # in a party's state folder
SECONDS = 300.0  # that a host may take until it listens; imports take a minute on a busy machine


def client_app(config: str | Path) -> ClientApp:
    """The ``ClientApp`` of a TOML file. A node's configuration says ``client``, and what is its own machine's.

    ``host = false`` there does without the host: each message then loads model and data anew.
    """
    path = Path(config)

    def turns(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
        return prepend_client(kind, answer(kind, content, context), lambda: number(context.node_config))

    def answer(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
        if context.node_config.get("host", True) is False:
            return _here(path, kind, content, context)
        try:
            found = asked(reached(path, context.node_config), kind, content)
        except (OSError, EOFError, AuthenticationError, ConfigError) as error:
            print(f"fedlora: the party's host cannot be reached: {error}", file=sys.stderr)
            return "its host process cannot be reached; its SuperNode says why"
        if isinstance(found, str):  # the SuperNode's log is where the party looks first
            print(f"fedlora: {kind}: {found}: {log(context.node_config)}", file=sys.stderr)
        return found

    return app_of(turns)


def log(node_config: Mapping[str, Any]) -> Path:
    """Where a party's host writes what went wrong, in full."""
    return state_folder(node_config).absolute() / LOG


def _here(path: Path, kind: str, content: RecordDict, context: Context) -> RecordDict | str:
    from fedlora.flower.client_factory import party
    from fedlora.flower.client_messages import handled
    from fedlora.runs.config import read_table

    return handled(kind, content, lambda run: party(read_table(path), context.node_config, run))


def asked(connection: Connection, kind: str, content: RecordDict) -> RecordDict | str:
    """One question to the host. What goes over is Flower's own protobuf, nothing that would run on arrival."""
    with connection:
        connection.send_bytes(kind.encode())
        connection.send_bytes(recorddict_to_proto(content).SerializeToString())
        good, body = connection.recv_bytes() == b"answer", connection.recv_bytes()
    return recorddict_from_proto(Proto.FromString(body)) if good else body.decode()


def reached(config: Path, node_config: Mapping[str, Any]) -> Connection:
    """A connection to the host of this configuration on this machine; it is started where there is none."""
    place = Place.of(config, node_config)
    with place.alone():  # two messages at once must not start two hosts
        return place.connect() or _started(place, config, node_config)


def _started(place: "Place", config: Path, node_config: Mapping[str, Any]) -> Connection:
    process = place.start(config, node_config)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        connection = place.connect()
        if connection is not None:
            return connection
        if process.poll() is not None:
            raise OSError(f"it ended with status {process.returncode}; {place.log} says why")
        time.sleep(0.05)
    raise TimeoutError(f"it did not listen within {SECONDS:g} seconds; {place.log} says more")


class Place:
    """Where a host listens: a socket and a key in a folder that is its owner's only; its log is with the state."""

    def __init__(self, name: str, log: Path):
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        self.folder = runtime / f"fedlora-{os.getuid()}"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        about = self.folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise OSError(f"{str(self.folder)!r} is open to others; remove it, or set XDG_RUNTIME_DIR")
        self.socket, self.key, self.lock = (self.folder / f"{name}.{ending}" for ending in ("sock", "key", "lock"))
        self.log = log

    @classmethod
    def of(cls, config: Path, node_config: Mapping[str, Any]) -> "Place":
        """One host for one configuration of one node, of one SuperNode process."""
        told = [config.read_text(encoding="utf-8"), dict(node_config), os.getppid()]
        name = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=12).hexdigest()
        return cls(name, log(node_config))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other process looks for this host, or starts it."""
        with open(os.open(self.lock, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def connect(self) -> Connection | None:
        """None where nobody listens."""
        try:
            return Client(str(self.socket), "AF_UNIX", authkey=self.key.read_bytes())
        except (FileNotFoundError, ConnectionRefusedError):
            return None

    def start(self, config: Path, node_config: Mapping[str, Any]) -> subprocess.Popen:
        """A host of its own session, that ends with the SuperNode's executor, this process's parent."""
        told = {
            "config": str(config), "node": dict(node_config), "parent": os.getppid(),
            "socket": str(self.socket), "key": str(self.key),
        }  # fmt: skip
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fedlora.flower.deploy.client_process", json.dumps(told)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
