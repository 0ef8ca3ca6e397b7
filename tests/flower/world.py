"""A federation on the grid without processes, and the same one in this process."""

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from fedlora.engines.network_settings import Network
from fedlora.flower.client import Base, Node, made
from fedlora.flower.client_messages import client_app, handled
from fedlora.flower.client_store import Store
from fedlora.flower.secure_server import served_by
from fedlora.flower.testing import MemoryGrid
from fedlora.flower.wire import unpack
from tests.fixtures.federation import ADAPTERS, config, same
from tests.fixtures.federation import settings as overrides

QUICK = Network(min_clients=2, join_timeout=5.0, poll=0.001, retry=0.05)  # joining ends when all are there
HIDDEN = replace(QUICK, secure_aggregation=True)
SERVED = ("flower.poll=0.001", "flower.join_timeout=2.0", "flower.retry=0.05")  # the same for ``serve``
TRAIN_ONLY = "evaluation={every=99, measure=false}"  # where no assertion is about scores, but for the last round's


class DiedError(Exception):
    """What a server process is gone with."""


def dying(kind, round):
    """A watcher with which the server dies at the first event of this kind in this round."""

    def watch(event):
        if event.kind == kind and event.round == round:
            raise DiedError

    return watch


def trained(kept):
    """What a client keeps, without the parts of which it keeps nothing."""
    return {part: layer for part, layer in kept.items() if layer}


class World:
    """Parties 0 to K-1 on nodes 10 to 10+K-1, one base for all of them, as in a simulation."""

    def __init__(self, folder: Path, *overrides: str, network=QUICK, post=lambda m: m, token="run", made=None):
        self.config = made or config(*overrides)
        self.network = network
        self.base = Base(self.config.federation())
        self.folder = folder
        self.token = token
        self.events = []
        self.grid = MemoryGrid(self.app(), {10 + k: {"client": k} for k in range(self.config.clients.count)}, post)

    @cached_property
    def federation(self):
        """The server's own; ``serve`` makes another one."""
        return self.config.federation()

    @cached_property
    def server(self):
        """A server of these parties, for tests without a folder of a run."""
        return served_by(self.network)(
            self.events.append, federation=self.federation, network=self.network, token=self.token, grid=self.grid
        )

    def app(self):
        return client_app(lambda kind, content, context: handled(kind, content, lambda run: self.node(context, run)))

    def node(self, context, run):
        return Node(self.base, int(context.node_config["client"]), Store(self.folder / run), self.network)

    def run(self, at=None):
        return list(self.server.run(self.federation, at))

    def kept(self, client):
        """What a client keeps after the last round of ``run``, from its own disk."""
        return self.kept_in(self.server.token, client, self.server.at.counted.get(client, -1))

    def kept_in(self, token, client, last):
        """What a client keeps of the run with this name whose round ``last`` was the last that counted for it."""
        return Store(self.folder / token).load(client).settled(last).kept


def counting(crossed):
    """Adds the size of every tensor that a message carries to ``crossed["up"]`` or ``crossed["down"]``."""

    def post(message):
        for record in ("leaves", "folds"):
            if message.has_content() and record in message.content:
                tree = unpack(message.content[record])
                size = sum(x.numel() * x.element_size() for layer in tree.values() for x in layer.values())
                crossed["up" if message.metadata.src_node_id >= 10 else "down"] += size
        return message

    return post


def plain(record):
    """What every engine must say alike of a round."""
    return {k: v for k, v in record.items() if k not in ("seconds", "bytes", "weights")}


def agree(a, b, within=1e-7):
    """Equal, but for the last digits of floats: 1e-5 of their size, or ``within``.

    What was trained is equal to the bit. A loss on test rows is not: its last digits depend on which rows were
    computed together, and a party computes its own alone. A count of right answers is far coarser than that.
    """
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=within)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(agree(a[key], b[key], within) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(agree(x, y, within) for x, y in zip(a, b))
    return a == b


def records_agree(rounds, records, within=1e-7):
    """Training losses and all the rest to the bit, scores as ``agree`` has it."""
    theirs, ours = [plain(r.record) for r in rounds], [plain(r) for r in records]
    scores = ("clients", "global")
    exact = [[{k: v for k, v in r.items() if k not in scores} for r in side] for side in (theirs, ours)]
    return exact[0] == exact[1] and agree(theirs, ours, within)


__all__ = [
    "ADAPTERS", "HIDDEN", "QUICK", "SERVED", "TRAIN_ONLY", "DiedError", "World", "agree", "config", "counting", "dying",
    "made", "overrides", "plain", "records_agree", "same", "trained",
]  # fmt: skip
