"""A federation in Flower's simulation: Ray actors run the turns, each with a base model of its own."""

import logging
import math
import os
import sys
import warnings
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from pickle import PicklingError
from tempfile import TemporaryDirectory

import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the default of later versions of Ray

import ray
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedlora.engines.federation import Federation
from fedlora.engines.loop import Observe, Take, Watch
from fedlora.flower.client_messages import build_simulated_app, build_trainers_app
from fedlora.flower.client_store import ClientStore, LocalClients
from fedlora.flower.secure_server import select_loop
from fedlora.flower.server import FlowerLoop
from fedlora.flower.terms import Terms
from fedlora.flower.trainer_client import TrainerClient, describe_trainers
from fedlora.runs.config import Config
from fedlora.schema import ConfigError, Table, merge_tables
from fedlora.text import display_safe

TOKEN = "run"  # of the only run that keeps its clients' states in the simulation's folder
ENDING = 30.0  # seconds for the server's thread to end after Ctrl-C


class Simulation(FlowerLoop):
    """The engine ``flower-simulation``: clients train in Ray actors."""

    steps_here = False

    @classmethod
    def drive(cls, config: Config, f: Federation, watch: Watch, observe: Observe | None, take: Take):
        """Run the federation's rounds into ``take``, and return the leaves that each client keeps.

        ``engine.threads`` is per client: each gets as many processors, and as many clients run at a time as there are
        processors for. The results are bit-equal to those of one process with as many threads.
        """
        threads = config.engine.threads or 1
        table = merge_tables(config.table, {"engine": {"threads": threads}})
        outcome: Future[None] = Future()
        with TemporaryDirectory(prefix="fedlora-") as folder:
            local = LocalClients(ClientStore(Path(folder) / TOKEN))
            # All nodes exist from the start, but loading the model may take a while.
            network = replace(config.flower, join_timeout=math.inf)
            app, terms = _build_client(config, f, table, Path(folder), threads)
            engine = select_loop(network)(
                watch, observe, federation=f, network=network, token=TOKEN, local=local, terms=terms
            )
            server = ServerApp()

            @server.main()
            def main(grid: Grid, context: Context) -> None:
                engine.grid = grid
                try:
                    outcome.set_result(take(engine, f))
                except BaseException:
                    outcome.set_exception(sys.exception())  # Flower would only log it
                    raise

            try:
                _run_simulation(server, app, f.clients.members, threads)
            except KeyboardInterrupt:
                engine.stopped = True  # its thread ends at the next pause, and the finished rounds are kept
                wait([outcome], ENDING)
            if outcome.done():
                outcome.result()  # raises the server's error
            return None if engine.at is None else {k: state.kept for k, state in local.client_states(engine.at).items()}


def _build_client(
    config: Config, f: Federation, table: Table, folder: Path, threads: int
) -> tuple[ClientApp, Terms | None]:
    """Return the client app, and the terms for clients with their own trainers.

    Raises ``ConfigError`` if their function cannot reach another process.
    """
    if f.trainers is None:
        return build_simulated_app(table, folder), None
    own = TrainerClient(
        f.trainers.make, f.trainers.evaluate, is_simulated=True, divide=f.trainers.divide, engine={"threads": threads}
    )
    try:
        ray.cloudpickle.dumps(own)
    except (TypeError, AttributeError, ValueError, RuntimeError, PicklingError) as error:
        raise ConfigError(
            "engine.name is 'flower-simulation', whose clients are other processes, and the trainer function cannot "
            f"be pickled ({type(error).__name__}: {display_safe(error, 200)}); let it load its data itself, or leave "
            "engine.name out."
        ) from error
    spec = describe_trainers(f.trainers)
    return build_trainers_app(own, folder), Terms.of(config.table, spec, f.model.trainable_start)


def _run_simulation(server: ServerApp, client, count: int, threads: int) -> None:
    resources = {"num_cpus": threads, "num_gpus": 1.0 if torch.cuda.is_available() else 0.0}
    # On a machine with fewer processors than one client needs, the client gets all of them.
    init = {"num_cpus": max(threads, os.cpu_count() or 1), "include_dashboard": False, "log_to_driver": False}
    logging.getLogger("flwr").setLevel(logging.ERROR)  # else it prints an advertisement of `flwr run`
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            run_simulation(server, client, count, backend_config={"client_resources": resources, "init_args": init})
    finally:
        ray.shutdown()
