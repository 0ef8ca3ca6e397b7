"""A federation in Flower's simulation: Ray actors take the turns, each with a base model of its own."""

import logging
import math
import os
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # nothing is reported to anybody
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what a coming Ray does by itself

import ray
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedlora.engines.federation import Federation
from fedlora.engines.loop import Observe, Take, Watch
from fedlora.flower.client_messages import build_simulated_app
from fedlora.flower.client_store import ClientStore, LocalClients
from fedlora.flower.secure_server import select_loop
from fedlora.flower.server import FlowerLoop
from fedlora.runs.config import Config, merge_tables

NAME = "run"  # the only one that keeps its parties' state in the simulation's folder
ENDING = 30.0  # seconds that the server's thread may take to end after Ctrl-C


class Simulation(FlowerLoop):
    """The engine ``flower-simulation``: clients train in Ray actors."""

    steps_here = False

    @classmethod
    def drive(cls, config: Config, f: Federation, watch: Watch, observe: Observe | None, take: Take):
        """Runs the federation's rounds into ``take``, and returns what each client keeps.

        ``engine.threads`` is one client's; so many processors are given to each, and as many clients run at a time as
        there are processors for. The bits are those of one process with as many threads.
        """
        threads = config.engine.threads or 1
        table = merge_tables(config.table, {"engine": {"threads": threads}})
        failed: list[BaseException | None] = []
        ended = threading.Event()
        with TemporaryDirectory(prefix="fedlora-") as place:
            local = LocalClients(ClientStore(Path(place) / NAME))
            # All nodes are there from the start; until the first has loaded the model may take a while.
            engine = select_loop(config.flower)(
                watch,
                observe,
                federation=f,
                network=replace(config.flower, join_timeout=math.inf),
                token=NAME,
                local=local,
            )
            server = ServerApp()

            @server.main()
            def main(grid: Grid, context: Context) -> None:
                engine.grid = grid
                try:
                    take(engine, f)
                except BaseException:
                    failed.append(sys.exc_info()[1])  # Flower would only log it
                    raise
                finally:
                    ended.set()

            try:
                _play(server, build_simulated_app(table, Path(place)), f.clients.members, threads)
            except KeyboardInterrupt:
                engine.stopped = True  # its thread ends at its next look, and what was finished is kept
                ended.wait(ENDING)
            if failed and failed[0] is not None:
                raise failed[0]
            return None if engine.at is None else {k: own.kept for k, own in local.client_states(engine.at).items()}


def _play(server: ServerApp, client, count: int, threads: int) -> None:
    gpus = 1.0 if torch.cuda.is_available() else 0.0
    resources = {"num_cpus": threads, "num_gpus": gpus}
    # A machine with fewer processors than one client wants gives it all that it has.
    init = {"num_cpus": max(threads, os.cpu_count() or 1), "include_dashboard": False, "log_to_driver": False}
    logging.getLogger("flwr").setLevel(logging.ERROR)  # it would say in five lines that there is also `flwr run`
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            run_simulation(server, client, count, backend_config={"client_resources": resources, "init_args": init})
    finally:
        ray.shutdown()
