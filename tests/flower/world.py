"""A federation on the grid without processes, and the same one in this process."""

from pathlib import Path

from fedlora.engines.flower.masked import served_by
from fedlora.engines.flower.memory import MemoryGrid
from fedlora.engines.flower.node import Base, Node, made
from fedlora.engines.flower.party import client_app, handled
from fedlora.engines.flower.settings import Network
from fedlora.engines.flower.store import Store
from tests.engines.test_inprocess import ADAPTERS, config, same

QUICK = Network(min_clients=2, join_timeout=5.0, poll=0.001, retry=0.3)


class World:
    """Parties 0 to K-1 on nodes 10 to 10+K-1, one base for all of them, as in a simulation."""

    def __init__(self, folder: Path, *overrides: str, network=QUICK, post=lambda m: m, token="run", made=None):
        self.config = made or config(*overrides)
        self.federation = self.config.federation()
        self.network = network
        self.base = Base(self.config.federation())
        self.folder = folder
        self.events = []
        count = self.federation.clients.count
        self.grid = MemoryGrid(self.app(), {10 + k: {"client": k} for k in range(count)}, post)
        self.server = served_by(network)(
            self.events.append, federation=self.federation, network=network, token=token, grid=self.grid
        )

    def app(self):
        return client_app(lambda kind, content, context: handled(kind, content, lambda run: self.node(context, run)))

    def node(self, context, run):
        return Node(self.base, int(context.node_config["client"]), Store(self.folder / run), self.network)

    def run(self, at=None):
        return list(self.server.run(self.federation, at))

    def kept(self, client):
        last = self.server.at.counted.get(client, -1)
        return Store(self.folder / self.server.token).load(client).settled(last).kept


def overrides(name):
    return [f"method.name={name}", *ADAPTERS.get(name, [])]


__all__ = ["ADAPTERS", "QUICK", "World", "config", "made", "overrides", "same"]
