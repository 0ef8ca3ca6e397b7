"""Bytes that really cross, against the ledger's: each message on the grid in memory, and a SuperNode's traffic.

On loopback one SuperNode reaches the SuperLink through a proxy that counts, mostly without TLS, so that it can tell
Flower's requests apart; the others do so directly.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import engines

IDLE = 20.0  # seconds in which a connected SuperNode has nothing to do
ROUNDS, CLIENT = 3, 0
BODY = ("push-object", "pull-object")  # what Flower's requests are named that carry records
UP, DOWN = "up", "down"


def measure(models: Path, data: Path) -> dict[str, Any]:
    """Messages on the grid for several methods and ranks; a SuperNode's traffic for one."""
    asked = [("fedit", 8), ("fedit", 16), ("fedsa-lora", 8), ("fedex-lora", 8)]
    tables = {f"{m}, rank {r}": engines.table(models, data, m, engines.NODES, r, ROUNDS) for m, r in asked}
    return {
        "messages": {name: _messages(table) for name, table in tables.items()},
        "a SuperNode": {name: _loopback(tables[name]) for name in ("fedit, rank 8", "fedex-lora, rank 8")},
        "a SuperNode, TLS": {name: _loopback(tables[name], insecure=False) for name in ("fedit, rank 8",)},
    }


# --------------------------------------------------------------------------------------------- on the grid in memory
def _messages(asked: dict[str, Any]) -> dict[str, Any]:
    """One client's messages as protobuf, against its rows in the ledger; bytes of the whole run."""
    found = {UP: Counter(), DOWN: Counter()}

    def post(message: Any) -> Any:
        to, by = message.metadata.dst_node_id, message.metadata.src_node_id
        if 2 + CLIENT in (to, by):
            found[DOWN if to == 2 + CLIENT else UP].update(_parts(message))
        return message

    _, rows = engines.memory(asked, post)
    return {way: _against(found[way], _ledger(rows, way)) for way in (UP, DOWN)}


def _parts(message: Any) -> dict[str, int]:
    """A message's bytes: tensors, safetensors headers, and the rest of the protobuf."""
    from flwr.common.serde import message_to_proto

    whole = message_to_proto(message).ByteSize()
    arrays = [array for record in message.content.array_records.values() for array in record.values()]
    files = [array.numpy().tobytes() for array in arrays]
    headers = sum(8 + int.from_bytes(file[:8], "little") for file in files)  # as the safetensors format begins
    tensors = sum(map(len, files)) - headers
    return {
        "messages": 1, "bytes": whole, "tensors": tensors, "safetensors headers": headers,
        "orders, figures and protobuf": whole - tensors - headers,
    }  # fmt: skip


def _ledger(rows: Any, way: str) -> int:
    return sum(row.bytes for row in rows if row.client == CLIENT and row.direction == way)


def _against(found: Mapping[str, int], ledger: int) -> dict[str, Any]:
    return {**found, "ledger": ledger, "more than the ledger": round(found["bytes"] / max(1, ledger) - 1, 4)}


# ----------------------------------------------------------------------------------------------------- on loopback
def _loopback(asked: dict[str, Any], insecure: bool = True) -> dict[str, Any]:
    """A SuperNode's traffic while it waits, and in a run, against the ledger's bytes of its client.

    By request; with TLS nobody can tell these apart, and they stand under one name.
    """
    from fedlora.flower.deploy.app_template import write_app
    from fedlora.flower.deploy.local import build_node_configs
    from fedlora.runs.config import build
    from fedlora.runs.folder import RunFolder

    config = build(asked)
    with TemporaryDirectory(prefix="fedlora-") as place:
        out = Path(place) / "run"
        parties = {f"client-{k}": own for k, own in enumerate(build_node_configs(config, out, None))}
        app = write_app(Path(place) / "federation", config, out)
        with _watched()(parties, Path(place) / "logs", insecure=insecure) as flower:
            time.sleep(2)
            idle, _ = _during(flower.proxy, lambda: time.sleep(IDLE))
            ran, seconds = _during(flower.proxy, lambda: flower.run(app, watch=lambda line: None))
            if not flower.outcome.startswith("finished:completed"):
                raise ChildProcessError(f"the run did not come to its end: {flower.outcome}")
        found = RunFolder(out).records
    told = {way: sum(sum(r["bytes"][way].values()) for r in found) // engines.NODES for way in (UP, DOWN)}
    return {
        "idle, bytes a second": {way: round(sum(_of(idle, way).values()) / IDLE) for way in (UP, DOWN)},
        "seconds of the run": round(seconds, 1),
        **{way: _carried(_of(ran, way), told[way]) for way in (UP, DOWN)},
        "requests": {path: count for (path, way), count in sorted(ran.items()) if way == "requests"},
    }


def _carried(found: Mapping[str, int], ledger: int) -> dict[str, Any]:
    """All that crossed, and of that the requests that carry records; the others ask whether there is work."""
    carrying = sum(count for path, count in found.items() if path.rsplit("/", 1)[-1] in BODY)
    more = {"carrying": carrying, "carrying, more than the ledger": round(carrying / ledger - 1, 4)}
    return {
        **_against({"bytes": sum(found.values())}, ledger),
        **(more if carrying else {}),
        "by request": dict(sorted(found.items())),
    }


def _of(counts: Mapping[tuple[str, str], int], way: str) -> dict[str, int]:
    return {path: count for (path, kind), count in counts.items() if kind == way}


def _during(proxy: "Proxy", work: Any) -> tuple[Counter, float]:
    before, began = proxy.counts.copy(), time.perf_counter()
    work()
    return proxy.counts - before, time.perf_counter() - began


def _watched() -> type:
    from fedlora.flower.deploy.local import Loopback

    class Watched(Loopback):
        """A loopback whose node ``CLIENT`` goes through the proxy."""

        def _launch(self, name: str):
            if name != f"client-{CLIENT}":
                return super()._launch(name)
            self.proxy, port = Proxy(self.port), self.port
            self.port = self.proxy.port
            try:
                return super()._launch(name)
            finally:
                self.port = port

    return Watched


class Proxy:
    """Passes TCP on to a port of this machine, and counts bytes by HTTP request and way: both heads and bodies."""

    def __init__(self, port: int):
        self.to, self.counts, self.lock = port, Counter[tuple[str, str]](), threading.Lock()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listening.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
                line = Line(self)
                for ends, way in (((near, far), UP), ((far, near), DOWN)):
                    threading.Thread(target=line.pass_on, args=(*ends, way), daemon=True).start()


class Line:
    """One connection; a request begins where its client speaks after the server has, or first."""

    def __init__(self, proxy: Proxy):
        self.proxy, self.path, self.last = proxy, "", DOWN

    def pass_on(self, near: socket.socket, far: socket.socket, way: str) -> None:
        """Until one side closes."""
        with suppress(OSError):
            while chunk := near.recv(1 << 16):
                self._count(chunk, way)
                far.sendall(chunk)
        for end in (near, far):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _count(self, chunk: bytes, way: str) -> None:
        with self.proxy.lock:
            if way == UP and self.last == DOWN:
                self.path = chunk.split(b" ", 2)[1].decode() if chunk[:4] in (b"POST", b"GET ") else "other"
                self.proxy.counts[self.path, "requests"] += 1
            self.last = way
            self.proxy.counts[self.path, way] += len(chunk)
