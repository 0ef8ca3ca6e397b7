"""Runs on Python objects: the configuration of a model, datasets, a loss and metrics of the caller's own."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fedlora.adapters import Adapter
from fedlora.engines.clients import Clients
from fedlora.methods._base import Method
from fedlora.registry import Registry, unknown
from fedlora.runs.config import AnyConfig, Config, build, list_settings
from fedlora.runs.sections import SECTIONS
from fedlora.schema import ConfigError, Table
from fedlora.tasks._code import Code, Metric, OwnObjects
from fedlora.tasks.networks.pretrained import load_quietly
from fedlora.tasks.objects import ObjectTask
from fedlora.training.local import Training

GIVEN = {"name": "given"}  # the partition of a list of datasets
ARGUMENTS = ("model", "task", "clients", "adapter", "method", "training")  # sections that have arguments of their own
FURTHER = [name for name in (*SECTIONS, "track") if name not in ARGUMENTS]  # sections that are given by their names


PARTS = ("model", "train", "test", "loss", "metrics", "losses", "collate")  # the fields of ``Objects``


@dataclass(frozen=True)
class Objects:
    """The objects of a run, for ``fedlora.run``, ``compare`` and ``resume``.

    Args:
        model: an ``nn.Module``, which is copied; a function that returns a new one each time, for large models; or a
            hub id or folder.
        train: a torch or Hugging Face Dataset for each client, in a list; or one, which ``partition`` divides.
        test: a Dataset that scores all models, or a list with one for each client.
        loss: ``loss(model, batch)``, the mean loss of a batch, a scalar tensor; None: ``model(**batch).loss``.
        metrics: name -> ``metric(model, batch)``, which returns a sum over the batch and its count; the first one is
            the run's metric. Without any, it is the loss.
        losses: ``losses(model, batch)``, each row's loss (b,); needed for example-level privacy only.
        collate: a function from a list of rows to a batch; None: torch's ``default_collate``.
    """

    model: nn.Module | Callable[[], nn.Module] | str | Path
    train: Any
    test: Any
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    metrics: Mapping[str, Metric] | None = None
    losses: Callable[[nn.Module, Any], Tensor] | None = None
    collate: Callable[[list[Any]], Any] | None = None

    def __post_init__(self) -> None:
        for key in ("loss", "losses", "collate"):
            if (value := getattr(self, key)) is not None and not callable(value):
                raise ConfigError(f"{key} is {value!r}; it should be a function.")
        metrics = self.metrics if self.metrics is not None else {}
        if not isinstance(metrics, Mapping) or not all(isinstance(x, str) and callable(metrics[x]) for x in metrics):
            raise ConfigError(f"metrics is {metrics!r}; it should be a dict of functions by name.")
        if not isinstance(self.model, nn.Module | str | Path) and not callable(self.model):
            raise ConfigError(
                f"model is a {type(self.model).__name__}; it should be an nn.Module, a function that returns one, a "
                "hub id or a folder."
            )

    @property
    def metric(self) -> str:
        """The name of the run's metric."""
        return next(iter(self.metrics or {}), "loss")

    @property
    def names(self) -> dict[str, str]:
        """Names of the objects, for people who read ``config.toml``."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "metrics"}
        named |= dict(self.metrics or {})
        return {key: describe_object(value) for key, value in named.items() if value is not None}

    def code(self) -> OwnObjects:
        """Return the objects as an ``objects`` task uses them. Raises ``ConfigError`` if they are wrong."""
        model = self.model
        if isinstance(model, str | Path):
            model = partial(load_own_class, str(model))
        try:
            return OwnObjects(
                model, self.train, self.test, self.loss, self.losses, dict(self.metrics or {}), self.collate
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error


def config_of_objects(
    objects: Objects,
    targets: str | Sequence[str] | None = None,
    head: Sequence[str] = (),
    method: str | Method | Mapping[str, Any] = "fedit",
    adapter: Adapter | Mapping[str, Any] | None = None,
    clients: int | Clients | Mapping[str, Any] | None = None,
    partition: str | Mapping[str, Any] | None = None,
    rounds: int = 20,
    seed: int = 0,
    training: Training | Mapping[str, Any] | None = None,
    higher: bool | None = None,
    **sections: Any,
) -> Config:
    """Return the configuration of a run on Python objects.

    Args:
        objects: the model, the datasets, the loss and the metrics.
        targets: the linear layers to adapt, as in ``model.targets``; None: the usual query and value projections.
        head: the modules to train in full.
        method: a name, a method, or its table.
        adapter: an adapter or its table; None: the method's own.
        clients: their number, a ``Clients`` or its table; a list of datasets has one for each.
        partition: of one dataset, by name or as a table; None: ``"iid"``.
        rounds: their number.
        seed: of all draws.
        training: a ``Training`` or its table. ``precision = "auto"`` is float32 for a model that is not from the Hub.
        higher: whether higher values of the metric are better; None: true, unless its name is known.
        sections: further sections of a configuration, objects or tables: ``privacy``, ``compression``, ``engine``, ...

    Raises ``ConfigError`` if something is wrong.
    """
    code = objects.code()
    for name in sections:
        if name not in FURTHER:
            near = [*PARTS, *inspect.signature(config_of_objects).parameters, *FURTHER]
            near = [x for x in near if x not in ("objects", "sections")]
            raise ConfigError(unknown("argument", name, near, "arguments"))
    table: Table = {
        "rounds": rounds,
        "seed": seed,
        "model": {"name": describe_object(objects.model), "head": _to_list("head", head)},
        "task": task_table(objects.metric, higher, objects.names),
        "clients": _clients_table(code, clients, partition),
        "training": _training_table(objects.model, training),
    }
    if targets is not None:
        table["model"]["targets"] = targets if isinstance(targets, str) else list(targets)
    given = {"method": {"name": method} if isinstance(method, str) else method, "adapter": adapter, **sections}
    if isinstance(method, Method):
        given["adapter"] = method.adapter if adapter is None else adapter
    table |= {name: to_settings(name, value) for name, value in given.items() if value is not None}
    return attach_code(build(table), code)


def task_table(metric: str, higher: bool | None, objects: Mapping[str, str]) -> Table:
    """Return the ``[task]`` table of a run on Python objects; ``objects`` are their names, for people."""
    return {"name": "objects", "metric": metric, "objects": objects, **({} if higher is None else {"higher": higher})}


def attach_code(config: Config, code: Code) -> Config:
    """Return the configuration with the caller's objects. Raises ``ConfigError`` if they are not those of its run."""
    task = config.task
    if not isinstance(task, ObjectTask):
        raise ConfigError(f"task.name is {config.table['task']['name']!r}, whose model and data are no Python objects.")
    if isinstance(code, OwnObjects) and (metric := next(iter(code.metrics), "loss")) != task.metric:
        raise ConfigError(f"the first metric is {metric!r}, and that of the run is {task.metric!r}; give the same.")
    return replace(config, task=task.with_code(code))


def take_objects(config: AnyConfig | None, given: Mapping[str, Any]) -> AnyConfig:
    """Return the configuration of a verb that takes one, or else objects by keyword. Raises ``ConfigError``."""
    if not given:
        if config is None:
            raise ConfigError(
                "the configuration is None, and there are no objects; give a path, a dict or a fedlora.Config, or "
                "model=, train= and test=."
            )
        return config
    if config is not None:
        raise ConfigError(
            f"a configuration and {next(iter(given))} are both given; put settings into the configuration, or leave it "
            "out and give everything by keyword."
        )
    return config_of_objects(build_objects(given), **{k: x for k, x in given.items() if k not in PARTS})


def build_objects(given: Mapping[str, Any]) -> Objects:
    """Return the objects among keyword arguments. Raises ``ConfigError`` if one is missing."""
    for name in ("model", "train", "test"):
        if given.get(name) is None:
            raise ConfigError(
                f"{name} is missing; a run on Python objects needs model, train and test, and "
                f"{', '.join(x for x in PARTS if given.get(x) is not None) or 'none of them'} is given."
            )
    return Objects(**{name: x for name, x in given.items() if name in PARTS})


def code_of(config: Config) -> Code | None:
    """Return the Python objects of a configuration; None if it has none."""
    return config.task.code if isinstance(config.task, ObjectTask) and config.task.has_code else None


def load_own_class(name: str) -> nn.Module:
    """Return the model of a hub id or folder, of the class that its ``config.json`` names."""
    import transformers

    kinds = getattr(load_quietly(transformers.AutoConfig, name), "architectures", None) or []
    kind = getattr(transformers, kinds[0], None) if kinds else None
    if kind is None:
        raise ConfigError(
            f"the config.json of {name!r} names no class of transformers; give model = a function that returns it."
        )
    network: nn.Module = load_quietly(kind, name)
    return network


def describe_object(value: Any) -> str:
    """Return a name of an object of the caller's: the file or module and the class or function; a text is itself."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, list | tuple) and value:
        return f"{len(value)} x {describe_object(value[0])}"
    kind = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
    module = getattr(kind, "__module__", None) or ""
    if module == "__main__":  # a script has another name in every process that imports it
        module = Path(sys.argv[0]).name or "__main__"
    return f"{module}:{getattr(kind, '__qualname__', type(value).__name__)}"


def _clients_table(code: OwnObjects, clients: Any, partition: Any) -> Table:
    """Return the ``[clients]`` table; a list of datasets decides the number and the partition."""
    table = {"count": clients} if isinstance(clients, int) else to_settings("clients", clients) if clients else {}
    if isinstance(clients, Clients):  # its defaults are no wishes
        table = {key: x for key, x in table.items() if x != getattr(Clients(), key)}
    if partition is not None:
        table["partition"] = {"name": partition} if isinstance(partition, str) else dict(partition)
    if code.clients is None:
        if "count" not in table:
            raise ConfigError(
                "clients is missing: train is one dataset, which is divided among clients; give their number, or a "
                "list with a dataset for each client."
            )
        return table
    if table.get("partition", GIVEN) != GIVEN:
        raise ConfigError(
            f"train is a list of {code.clients} datasets, one a client, and partition is {table['partition']!r}; give "
            "one dataset, or leave partition out."
        )
    if table.get("count", code.clients) != code.clients:
        raise ConfigError(
            f"train is a list of {code.clients} datasets, one a client, and clients is {table['count']}; leave it out."
        )
    return {**table, "count": code.clients, "partition": GIVEN}


def _training_table(model: Any, training: Any) -> Table:
    table = {} if training is None else to_settings("training", training)
    if not isinstance(model, str | Path | PreTrainedModel) and table.get("precision", "auto") == "auto":
        table["precision"] = "float32"  # a cast may break a module that nobody wrote for it
    return table


def to_settings(section: str, value: Any) -> Table:
    """Return the table of a section that is given as an object, as a table, or as the name of a plug-in."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str) and isinstance(SECTIONS.get(section), Registry):
        return {"name": value}
    if section == "track" and hasattr(value, "to_table"):
        return dict(value.to_table())
    kind = SECTIONS.get(section)
    if not is_dataclass(value) or isinstance(value, type):
        raise ConfigError(f"{section} is {value!r}; it should be an object of its settings, or a dict.")
    names = {"name": kind.name_of(type(value))} if isinstance(kind, Registry) else {}
    return names | list_settings(value)


def _to_list(key: str, value: Any) -> list[str]:
    if isinstance(value, str):
        raise ConfigError(f"{key} is {value!r}; it is a list of names, e.g. [{value!r}].")
    return list(value or ())
