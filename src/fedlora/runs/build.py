"""Build the federation of a configuration: load its model and its data."""

import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fedlora.adapters import Dense
from fedlora.engines.federation import Federation
from fedlora.engines.model_spec import RemoteModel
from fedlora.engines.trainers import Trainers
from fedlora.methods._base import Method
from fedlora.methods.fedit import FedIT
from fedlora.methods.local import Local
from fedlora.runs.sections import ModelTable, Sections
from fedlora.schema import ConfigError, Table, per_machine_fields
from fedlora.security.attacks._base import Attack
from fedlora.security.privacy import per_sample_gradients
from fedlora.tasks import TASKS
from fedlora.tasks._base import Data, Shard, move_batch
from fedlora.tasks.networks.pretrained import attention_options, check_tokens, quantization_options, stored_dtype
from fedlora.training.device import Engine, checkpoint_activations
from fedlora.training.model import Model, Precision
from fedlora.training.open_model import find_adapter
from fedlora.training.reference import add_reference
from fedlora.training.warm_start import warm_start

CHECKED = 4  # rows of the caller's losses
Shards = Mapping[int, Shard] | Sequence[Shard]  # by client


def build_federation(config: Sections, client: int | None = None, combines: bool = False) -> Federation:
    """Load the model and the data, and build the federation.

    If each client's data are on its own machine (``clients.partition``), ``client`` is the client of this machine, and
    ``combines`` is true on the server.
    """
    config.engine.prepare()
    if isinstance(code := getattr(config.task, "_code", None), Trainers):
        trainers = code.for_run(config.seed)
        return build_own_federation(config, trainers.model, trainers.shards, trainers)
    if isinstance(code, RemoteModel):
        return build_own_federation(config, code, {})
    if getattr(config.task, "has_own_loop", False):
        objects = config.table["task"]["objects"]
        again = "Session.load(folder, model)" if "session" in objects else "resume(folder, trainer=...)"
        raise ConfigError(f"clients of this run train in a loop of the caller; go on with it by fedlora.{again}.")
    data, shards, names = load_rows(config, client, combines)
    f = load_model(config, data, shards, names)
    if f.privacy.by_example:
        per_sample_gradients.check_row_independence(f.model.network)
        if config.task.is_own_code:
            _check_losses(f)
    return _complete(config, f)


def load_model(config: Sections, data: Data | None, shards: Shards, names: tuple[str, ...]) -> Federation:
    """Load the model with its adapters and their start, and return its federation as ``attach_federation`` does."""
    device = config.engine.prepare()
    network = load_network(config, len(names), device)
    if data is not None:
        check_row_tokens(config, network, data)
    f = attach_federation(config, network, device, data, shards, names)
    if config.task.accepts_loading:
        note = config.engine.describe_loading(config.training.precision, stored_dtype(config.model.name))
        f = replace(f, model_notes=(note,) if note else ())
    if data is not None:
        f = replace(f, data=add_reference(f.model, config.task, data, config.evaluation))
    if config.model.start is not None:
        base = None if config.model.same_base else config.model.name
        warm_start(f.model, f.rules, config.method, config.model.start, config.seed, names, base)
    return f


def build_own_federation(
    config: Sections, model: Model, shards: Shards, trainers: Trainers | None = None
) -> Federation:
    """Build a federation around a loop of the caller: that of trainers, or of a session (None).

    Raises ``ConfigError`` if the configuration is not one of this model.
    """
    if (own := find_adapter(model)) != config.method.adapter:
        raise ConfigError(
            f"{config.method.title} is to train {config.method.adapter}, and the model has {own}; put the method's own "
            "adapter on the model with fedlora.attach, or take another method."
        )
    if trainers is not None and config.clients.count != trainers.count:
        raise ConfigError(
            f"there are trainers for {trainers.count} clients, and clients.count is {config.clients.count}; "
            "'centralised' and other numbers of clients need trainers of their own."
        )
    rules = model.rules(config.method, partial(head_rule, config.method))
    budgets = config.clients.budgets(config.method.adapter.budget, config.seed)
    training = replace(config.training, precision="float32")
    f = Federation(
        rules, config.method, model, config.task, None, config.clients, shards, budgets, training, config.evaluation,
        config.server, config.rounds, config.seed, compression=config.compression, privacy=config.privacy,
        trainers=trainers,
    )  # fmt: skip
    return _complete(config, f)


def _complete(config: Sections, f: Federation) -> Federation:
    """Return the federation with its fingerprint, ``[validation]``, ``[robust]`` and ``[attack]``, checked."""
    f.model.check_start()
    return replace(
        f, fingerprint=fingerprint(config.table), validation=config.validation, robust=config.robust,
        attack=prepare_attack(config),
    )  # fmt: skip


def check_row_tokens(config: Sections, network: nn.Module, data: Data) -> None:
    """Raise ``ValueError`` if rows have tokens that the network does not know, or too many."""
    width = config.task.max_length if getattr(config.task, "pad_to_max_length", False) else 0
    check_tokens(network, config.model.name, {"training": data.train, "test": data.test}, width)


def prepare_attack(config: Sections) -> Attack | None:
    """Return the attack of a configuration, prepared for its task; None without one."""
    attack = config.attack
    if attack is None:
        return None
    return attack.prepare(config.task, config.model.name, config.clients.members, config.seed)


def _check_losses(f: Federation) -> None:
    """Raise ``ValueError`` if the losses of the caller's code are not those of single rows."""
    data, task, device = f.data, f.task, f.model.device
    assert data is not None, "this machine has the caller's rows"
    f.model.load(f.model.initial(f.seed))
    per_sample_gradients.check_losses(
        f.model,
        lambda network, rows: task.losses(network, move_batch(task.collate(data.train, rows), device)),
        f.shards[0].train[:CHECKED],
    )


def attach_federation(
    config: Sections, network: nn.Module, device: Any, data: Data | None, shards: Shards, names: tuple[str, ...]
) -> Federation:
    """Attach adapters to a network and build its federation, without ``[validation]``, ``[robust]``, ``[attack]``."""
    training = config.engine.resolve_precision(config.training, network)
    if config.model.attention == "flash_attention_2" and training.precision == "float32":
        raise ConfigError(
            "model.attention is 'flash_attention_2', which computes in half precision only, and training.precision "
            "comes to 'float32'; set it to 'bf16', or model.attention to 'auto'."
        )
    if training.gradient_checkpointing:
        checkpoint_activations(network)
    model = attach_adapters(config, network, typing.cast(Any, training.precision), device)
    rules = model.rules(config.method, partial(head_rule, config.method))
    budgets = config.clients.budgets(config.method.adapter.budget, config.seed)
    return Federation(
        rules, config.method, model, config.task, data, config.clients, shards, budgets, training, config.evaluation,
        config.server, config.rounds, config.seed, names, compression=config.compression, privacy=config.privacy,
    )  # fmt: skip


def load_network(config: Sections, labels: int, device: torch.device, precision: str | None = None) -> nn.Module:
    """Load the pretrained network, quantised by ``model.quantize``, for a precision or that of ``[training]``."""
    precision = config.training.precision if precision is None else precision
    options = attention_options(config.model.attention, device)
    if config.model.quantize is not None:
        options |= quantization_options(config.model.quantize, device)
    if is_loaded_half(config, precision, config.engine):
        options["dtype"] = torch.bfloat16
    loading = {"loading": options} if options else {}
    return config.task.network(config.model.name, labels, config.seed, **loading)


def is_loaded_half(config: Sections, precision: str, engine: Engine) -> bool:
    """Whether the checkpoint of a configuration is loaded in half precision, with this ``training.precision``."""
    return config.task.accepts_loading and engine.loads_half(precision, stored_dtype(config.model.name))


def load_rows(config: Sections, client: int | None, combines: bool) -> tuple[Data | None, Shards, tuple[str, ...]]:
    """Load this machine's data; return them, each client's rows and the names of the labels."""
    if not config.clients.own_data:
        data = config.task.load(config.model.name, config.seed, config.clients.client_column)
        return data, config.clients.shards(data, config.seed), data.label_names
    names = config.task.known_labels()
    if names is None:
        raise ConfigError(
            "clients.partition is 'own', so the labels must be agreed beforehand; set task.label_names to all of them."
        )
    if client is None and not combines:
        raise ConfigError(
            "clients.partition is 'own': every client has its own data on its own machine; run it with "
            "`fedlora flower`, play it here with `fedlora run --parties` and a file of each party, or set "
            "clients.partition to a partition of one data set."
        )
    if client is None:
        return None, {}, tuple(names)
    data = config.task.load(config.model.name, config.seed)
    for split, role in ((data.train, "training"), (data.test, "test")):
        if not len(split):
            raise ConfigError(
                f"the data of client {client} have no {role} rows; a client with its own data needs both."
            )
    shard = Shard(torch.arange(len(data.train)), torch.arange(len(data.test)))
    return data, {client: shard}, data.label_names


def attach_adapters(
    config: Sections, network: nn.Module, precision: Precision = "float32", device: Any = "cpu"
) -> Model:
    """Attach the adapters of a configuration to a network."""
    table = config.model
    return Model.attach(network, config.method.adapter, table.targets, table.head, precision, device, table.overlay)


def head_rule(method: Method, dense: Dense) -> Method:
    """Return the method for a part that is trained in full: FedIT with the same weighting, or Local."""
    return (FedIT if method.shares_head else Local)(dense, method.weighting)


def per_machine_settings(table: Table) -> list[str]:
    """Return the dotted keys of the settings that may differ between the machines of a federation."""
    kinds = {"task": TASKS.load(table.get("task", {}).get("name", "")), "model": ModelTable, "engine": Engine}
    return [f"{section}.{name}" for section, kind in kinds.items() for name in per_machine_fields(kind)]


OF_SERVER = ("compare", "checkpoint", "validation", "robust", "track")  # tables that only the server reads


def agreed_settings(table: Table) -> Table:
    """Return the settings that must be equal on all machines: neither per-machine settings nor those of the server."""
    local = {*per_machine_settings(table), "training.precision", "training.max_tokens", "evaluation.max_tokens"}
    return {
        section: {k: v for k, v in value.items() if f"{section}.{k}" not in local} if isinstance(value, dict) else value
        for section, value in table.items()
        if section not in (*OF_SERVER, "engine", "party")
    }


def fingerprint(table: Table) -> str:
    """Digest the settings that must be equal on all machines."""
    equal = agreed_settings(table)
    return hashlib.blake2b(json.dumps(equal, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
