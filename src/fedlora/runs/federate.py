"""Runs whose clients train with the caller's own trainers; one function builds the trainer of each client."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import torch

from fedlora.adapters import ADAPTERS, Adapter
from fedlora.engines.clients import Clients
from fedlora.engines.trainers import ClientInfo, Evaluate, Trainers
from fedlora.methods import METHODS
from fedlora.methods._base import Method
from fedlora.registry import unknown
from fedlora.runs.config import Config, build
from fedlora.runs.objects import FURTHER, describe_object, task_table, to_settings
from fedlora.schema import ConfigError, Table, construct, load_class
from fedlora.seeds import derive_seed
from fedlora.tasks._base import Examples, lengths_of_one
from fedlora.tasks.data.datasets import check_dataset, read_rows, read_values
from fedlora.tasks.objects import ObjectTask
from fedlora.training.local import Training
from fedlora.training.model import Model
from fedlora.training.open_model import find_adapter
from fedlora.training.transformers_trainer import Schedule

OWN_ROWS = {"name": "own"}  # the partition of clients with rows of their own


def config_of_trainers(
    trainer: Callable[[ClientInfo], Any], clients: Any, method: Any, rounds: int, seed: int, data: Any,
    evaluate: Evaluate | None, metric: str, higher: bool | None, schedule: Schedule, keep_optimizer: bool,
    sections: Mapping[str, Any],
) -> Config:  # fmt: skip
    """Return the configuration of ``fedlora.federate``; for several methods, that of the first."""
    table = describe_task(describe_object(trainer), metric, higher, schedule, keep_optimizer)
    names = list(method) if isinstance(method, list | tuple) else None
    own_clients = build_clients(clients, data)
    for name in names or [to_settings("method", method).get("name")]:
        if isinstance(name, str):  # before a trainer is built, which may take minutes
            load_class(METHODS, name)
    trainers = build_trainers(trainer, own_clients, seed, data, evaluate, schedule, keep_optimizer)
    return own_config(
        trainers.model, table, names[0] if names else method, own_clients, rounds, seed, trainers.describe_training(),
        sections, trainers,
    )  # fmt: skip


def build_trainers(
    trainer: Callable[[ClientInfo], Any], clients: Clients, seed: int, data: Any, evaluate: Evaluate | None,
    schedule: Schedule, keep_optimizer: bool,
) -> Trainers:  # fmt: skip
    """Return the trainers of a function, whose clients may divide ``data``."""
    divide = None if data is None else lambda seed: divide_rows(data, clients, seed)
    return Trainers(trainer, clients.count, seed, evaluate, schedule, keep_optimizer, divide)


def attach_trainers(
    config: Config, trainer: Callable[[ClientInfo], Any], data: Any = None, evaluate: Evaluate | None = None
) -> Config:
    """Return a run folder's configuration with the trainers that resuming needs. Raises ``ConfigError``."""
    objects = getattr(config.task, "objects", {})
    if "trainer" not in objects:
        raise ConfigError("this run did not train with trainers of the caller; leave trainer out.")
    if (data is None) != config.clients.own_data:
        want = "had none" if config.clients.own_data else "divided common rows"
        raise ConfigError(f"data is {'missing' if data is None else 'given'}, and the run {want}; give what it had.")
    keeps = objects.get("keep_optimizer") == "true"
    schedule: Schedule = "turn" if objects.get("schedule") == "turn" else "run"
    trainers = build_trainers(trainer, config.clients, config.seed, data, evaluate, schedule, keeps)
    return replace(config, task=cast(ObjectTask, config.task).with_code(trainers))


def build_clients(clients: Any, data: Any = None) -> Clients:
    """Return the ``[clients]`` table of a caller's own loop: without ``data``, every client has rows of its own.

    With ``data`` the default partition is ``"iid"``.
    """
    table = {"count": clients} if isinstance(clients, int) else to_settings("clients", clients)
    if "count" not in table:
        raise ConfigError("clients has no count; give the number of clients.")
    if data is None and table.get("partition", OWN_ROWS) != OWN_ROWS:
        raise ConfigError(
            f"clients.partition is {table['partition']!r}, which divides common rows; give these by data=, or leave "
            "the partition out."
        )
    return construct(
        Clients, "clients", {**table, "partition": table.get("partition", "iid" if data is not None else OWN_ROWS)}
    )


def divide_rows(data: Any, clients: Clients, seed: int) -> dict[int, list[int]]:
    """Return each client's rows of a dataset, by ``clients.partition``. Raises ``ValueError`` if a client gets none."""
    check_dataset(data, "data")
    known, column = read_rows(data), clients.client_column
    labels = torch.zeros(known.count, dtype=torch.int64) if known.labels is None else known.labels
    groups = None if column is None else tuple(read_values(data, column, "data"))
    examples = Examples({}, labels, lengths_of_one(known.count), groups)
    parts = clients.partitioner.rows(examples, clients.count, derive_seed(seed, "split"))
    for client, rows in enumerate(parts):
        if not len(rows):
            raise ValueError(f"client {client} got no rows; lower clients.count, or make the partition more even.")
    return {client: rows.tolist() for client, rows in enumerate(parts)}


def own_config(
    model: Model, task: Table, method: Any, clients: Any, rounds: int, seed: int, training: Training,
    sections: Mapping[str, Any], code: Any,
) -> Config:  # fmt: skip
    """Return the configuration of a run on a caller's own model and loop. Raises ``ConfigError`` for wrong settings."""
    network = name_of_network(model.network)
    return config_of_adapter(
        find_adapter(model), network, task, method, clients, rounds, seed, training, sections, code
    )


def config_of_adapter(
    adapter: Adapter, network: str, task: Table, method: Any, clients: Any, rounds: int, seed: int, training: Training,
    sections: Mapping[str, Any], code: Any,
) -> Config:  # fmt: skip
    """Return the configuration of a run on a network that has this adapter, which may be on another machine."""
    check_sections(sections)
    named = to_settings("method", method)
    _check_adapter(named.get("name"), adapter)
    table: Table = {
        "model": {"name": network},
        "task": task,
        "clients": to_settings("clients", clients),
        "adapter": {"name": ADAPTERS.name_of(type(adapter)), **asdict(adapter)},
        "method": named,
        "training": to_settings("training", training),
        "rounds": rounds,
        "seed": seed,
        **{key: to_settings(key, value) for key, value in sections.items() if value is not None},
    }
    table["adapter"] = {key: value for key, value in table["adapter"].items() if value is not None}
    config = build(table)
    return config if code is None else replace(config, task=cast(ObjectTask, config.task).with_code(code))


def _check_adapter(method: Any, adapter: Adapter) -> None:
    """Raise ``ConfigError`` if the method is not defined for the adapter that the model has."""
    kind = load_class(METHODS, method) if isinstance(method, str) else Method
    if not isinstance(adapter, kind.adapters):
        names = " or ".join(f"fedlora.{other.__name__}" for other in kind.adapters)
        raise ConfigError(
            f"{kind.title} trains {names}, and the model has a {type(adapter).__name__}; put that adapter on the "
            "network with fedlora.attach, or take another method."
        )


def check_sections(sections: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for a section that a run with a caller's own loop does not have."""
    for section in sections:
        if section not in FURTHER:
            raise ConfigError(unknown("argument", section, FURTHER, "sections"))


def describe_task(trainer: str, metric: str, higher: bool | None, schedule: str, keep_optimizer: bool) -> Table:
    """Return the ``[task]`` table of a run with trainers of the caller; ``trainer`` names the function."""
    if schedule not in ("run", "turn"):
        raise ConfigError(f"schedule is {schedule!r}; it is 'run' or 'turn'.")
    objects = {"trainer": trainer, "schedule": schedule, "keep_optimizer": str(keep_optimizer).lower()}
    return task_table(metric, higher, objects)


def name_of_network(network: Any) -> str:
    """Return the name that a network was loaded by, or that of its class."""
    config = getattr(network, "config", None)
    name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return str(name) if name else type(network).__qualname__
