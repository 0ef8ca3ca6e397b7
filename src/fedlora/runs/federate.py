"""Federate somebody else's training loop: one function makes each client's trainer, and the rest is an ordinary run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedlora.adapters import ADAPTERS
from fedlora.engines.clients import Clients
from fedlora.engines.loop import Watch
from fedlora.engines.trainers import ClientInfo, Evaluate, Trainers
from fedlora.methods import METHODS
from fedlora.methods._base import Method
from fedlora.registry import Registry
from fedlora.runs.config import Config, build
from fedlora.runs.run import Result, run_config
from fedlora.runs.sections import SECTIONS
from fedlora.schema import ConfigError, Table
from fedlora.training.local import Training
from fedlora.training.model import Model
from fedlora.training.open_model import find_adapter

REGISTRIES = [kind for kind in SECTIONS.values() if isinstance(kind, Registry)]
OWN = ("model", "task", "adapter", "training")  # sections that follow from the caller's objects


def federate(
    trainer: Callable[[ClientInfo], Any],
    clients: int | Mapping[str, Any] | Clients,
    method: str | Mapping[str, Any] | Method = "fedit",
    rounds: int = 20,
    out: str | Path | None = None,
    *,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    metric: str = "loss",
    higher: bool | None = None,
    schedule: Literal["run", "turn"] = "run",
    keep_optimizer: bool = False,
    callbacks: Sequence[Any] = (),
    watch: Watch = lambda event: None,
    again: bool = False,
    **sections: Any,
) -> Result:
    """Run a federation whose clients train with your own trainers, in this process.

        import torch, peft
        from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

        def trainer(client):
            rows = [{"input_ids": torch.randint(5, 90, (8,)), "labels": i % 2} for i in range(20)]
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            network = BertForSequenceClassification(BertConfig(vocab_size=90, **sizes))
            network = peft.get_peft_model(network, peft.LoraConfig(r=2, task_type="SEQ_CLS"))
            args = TrainingArguments("out", max_steps=2, report_to=[], disable_tqdm=True, dataloader_pin_memory=False)
            return Trainer(network, args, train_dataset=rows, eval_dataset=rows)

        result = fedlora.federate(trainer, clients=2, method="fedsa-lora", rounds=2, out="runs/own")

    Args:
        trainer: called once for each client, as ``trainer(client)`` with a ``ClientInfo``. Returns a ``Trainer`` of
            transformers or TRL, or any object with ``.model`` and ``.train()``. A turn is one call of ``train()``; its
            budget is the trainer's (``max_steps`` or ``num_train_epochs``). The first trainer's model is that of all
            clients: later Trainers are handed it, and other objects must be built on ``client.model``.
        clients: their number, or the ``[clients]`` table, such as ``{"count": 100, "per_round": 10}``.
        method: a method's name, its table, or the method itself. The adapter is that of the model.
        rounds: the number of rounds.
        out: a new run folder; ``fedlora show``, ``report``, ``compare`` and ``resume`` work on it.
        seed: of the run. Python's, numpy's and torch's generators are set from run, round and client before each turn.
        evaluate: ``evaluate(network, client)`` returns metrics by name, each a number, or a sum over rows and their
            number. None: the trainer's own ``evaluate()``, if it has an ``eval_dataset``.
        metric: the main metric. ``higher``: whether higher values are better; None: known from the name, or true.
        schedule: whether a Trainer's learning-rate schedule covers the whole ``"run"``, or each ``"turn"`` anew.
        keep_optimizer: each client keeps its optimizer's moments between its turns (Trainers of transformers only).
        callbacks: see ``fedlora.Callback``. ``watch`` is called with every event.
        again: ``out`` may hold the beginning of this run, which then goes on from its last checkpoint.
        sections: further tables of the configuration: ``compression``, ``privacy``, ``validation``, ``robust``,
            ``server``, ``checkpoint``, ``evaluation``, ``attack``, ``engine``, ``track``.

    Raises ``ConfigError`` for settings that cannot work in somebody else's loop, with the reason, and ``ValueError`` if
    a trainer is not understood or a turn does not keep the method's rules.
    """
    count = clients if isinstance(clients, int) else _as_table(clients).get("count", 1)
    trainers = Trainers(trainer, count, seed, evaluate, schedule, keep_optimizer)
    objects = {"trainer": name_of_object(trainer), "schedule": schedule, "keep_optimizer": str(keep_optimizer).lower()}
    table = {"name": "objects", "metric": metric, "objects": objects, **({} if higher is None else {"higher": higher})}
    config = own_config(
        trainers.model, table, method, clients, rounds, seed, trainers.describe_training(), sections, trainers
    )
    return run_config(config, out, watch, callbacks=callbacks, again=again)


def own_config(
    model: Model, task: Table, method: Any, clients: Any, rounds: int, seed: int, training: Training,
    sections: Mapping[str, Any], code: Any,
) -> Config:  # fmt: skip
    """Return the configuration of a run on a caller's own model and loop. Raises ``ConfigError`` for wrong settings."""
    for section in sections:
        if section in OWN or section not in (*SECTIONS, "track"):
            known = [key for key in (*SECTIONS, "track") if key not in (*OWN, "clients", "method")]
            raise ConfigError(f"there is no argument {section!r} here; the sections are {', '.join(known)}.")
    adapter = find_adapter(model)
    own_clients = {"count": clients} if isinstance(clients, int) else _as_table(clients)
    table: Table = {
        "model": {"name": name_of_network(model.network)},
        "task": task,
        "clients": {"partition": {"name": "own"}, **own_clients},
        "adapter": {"name": ADAPTERS.name_of(type(adapter)), **asdict(adapter)},
        "method": _method_table(method),
        "training": _as_table(training),
        "rounds": rounds,
        "seed": seed,
        **{key: _as_table(value) for key, value in sections.items() if value is not None},
    }
    table["adapter"] = {key: value for key, value in table["adapter"].items() if value is not None}
    config = build(table)
    return replace(config, task=replace(config.task, _code=code))  # type: ignore[type-var]


def _method_table(method: Any) -> Table:
    if isinstance(method, str):
        return {"name": method}
    if isinstance(method, Method):
        values = {key: value for key, value in vars(method).items() if key != "adapter" and value is not None}
        return {"name": METHODS.name_of(type(method)), **values}
    return _as_table(method)


def _as_table(value: Any) -> Table:
    """Return a section as a table: a name, a table, or an object of its settings."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        registry = next(
            (kind for kind in SECTIONS.values() if hasattr(kind, "name_of") and isinstance(value, kind.base)), None
        )
        named = {"name": registry.name_of(type(value))} if registry else {}
        return named | {key: x for key, x in asdict(value).items() if x is not None}
    raise ConfigError(f"{value!r} is no section of a configuration; give a table or an object of its settings.")


def name_of_object(value: Any) -> str:
    """Return the place of a function or class, for people who read the run's configuration."""
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{getattr(value, '__module__', type(value).__module__)}:{name}"


def name_of_network(network: Any) -> str:
    """Return the name that a network was loaded by, or that of its class."""
    config = getattr(network, "config", None)
    name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return str(name) if name else type(network).__qualname__
