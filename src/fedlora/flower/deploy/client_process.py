"""A party's host: one process that keeps model and data loaded, and answers message after message.

Started by the relay, never by hand. It ends when the SuperNode's executor has ended.
"""

import json
import os
import secrets
import signal
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from fedlora.flower.client_factory import party
from fedlora.flower.client_messages import handled
from fedlora.flower.deploy.proxy import LOG
from fedlora.runs.config import read_table
from fedlora.runs.progress_file import alive

IDLE = 1800.0  # seconds without a message after which a host gives its memory back; the next message starts another
LOOK = 0.5  # seconds between two looks whether the parent is still there


def serve(told: dict) -> None:
    """Answers whoever connects with the key, one after another."""
    table, node = read_table(told["config"]), told["node"]
    key, socket = Path(told["key"]), Path(told["socket"])
    socket.unlink(missing_ok=True)
    authkey = secrets.token_bytes(32)
    with open(os.open(key, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
        file.write(authkey)
    signal.signal(signal.SIGTERM, lambda *_: _gone(socket, key))
    with Listener(str(socket), "AF_UNIX", authkey=authkey) as listener:
        rest = Rest()
        threading.Thread(target=_end_with, args=(told["parent"], rest, socket, key), daemon=True).start()
        while True:
            try:
                with listener.accept() as connection:
                    rest.busy()
                    _answer(connection, table, node)
                    rest.begin()
            except (EOFError, OSError, AuthenticationError) as error:  # a relay that was killed while it asked
                print(f"fedlora: a question was not finished: {error}", file=sys.stderr, flush=True)


def _answer(connection: Connection, table: dict, node: dict) -> None:
    kind = connection.recv_bytes().decode()
    content = recorddict_from_proto(Proto.FromString(connection.recv_bytes()))
    found = handled(kind, content, lambda run: party(table, node, run), f"{LOG} in its state folder")
    good = isinstance(found, RecordDict)
    connection.send_bytes(b"answer" if good else b"error")
    connection.send_bytes(recorddict_to_proto(found).SerializeToString() if good else str(found).encode())
    sys.stderr.flush()


class Rest:
    """Since when there has been nothing to do."""

    def __init__(self) -> None:
        self.since: float | None = time.monotonic()

    def begin(self) -> None:
        """A message is answered."""
        self.since = time.monotonic()

    def busy(self) -> None:
        """A message has come."""
        self.since = None

    def over(self) -> bool:
        """Whether it has lasted long enough to leave."""
        return self.since is not None and time.monotonic() - self.since > IDLE


def _end_with(parent: int, rest: Rest, *files: Path) -> None:
    while alive(parent) and not rest.over():
        time.sleep(LOOK)
    _gone(*files)


def _gone(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)
    os._exit(0)  # a turn may be under way: its outcome has nobody to go to, and the state on disk is whole


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
