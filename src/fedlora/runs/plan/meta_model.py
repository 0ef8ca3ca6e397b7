"""A network without its weights: shapes, types and a device, but no numbers, so that one of any size fits anywhere."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fedlora.engines.federation import Federation
from fedlora.files import read_header
from fedlora.rounds import Rules
from fedlora.runs.build import attach_adapters, head_rule, load_rows
from fedlora.runs.config import Config
from fedlora.runs.plan.footprint import Bench
from fedlora.runs.plan.traffic import Group, group_key, grouped
from fedlora.tasks._base import Shard, Task
from fedlora.tasks.networks.pretrained import load_quietly, resolve_model
from fedlora.training.device import checkpoint_activations
from fedlora.training.model import Model
from fedlora.types import Tree


@dataclass(frozen=True)
class MetaModel:
    """A federation whose network has no weights, and what stands for its parts."""

    config: Config
    federation: Federation
    groups: list[Group]
    fake: FakeTensorMode
    bench: Bench


def build_meta_model(config: Config) -> MetaModel:
    """The federation of a configuration, with data but without weights."""
    device = config.engine.select_device()
    data, shards = load_rows(config, None, True)
    names = tuple(config.task.known_labels() or ()) if data is None else data.label_names
    network = outlined(config.task, config.model.name, len(names))
    training = config.engine.resolve_precision(config.training, network)
    if training.gradient_checkpointing:
        checkpoint_activations(network)
        network.config.use_cache = False  # type: ignore[union-attr]  # transformers would do so, and say it
    model = attach_adapters(config, network, training.precision, "meta")  # type: ignore[arg-type]
    rules = model.rules(config.method, partial(head_rule, config.method))
    groups = grouped(model, rules)
    budgets = config.clients.budgets(config.method.adapter.budget, config.seed)
    f = Federation(
        rules, config.method, model, config.task, data, config.clients, _Known(shards), budgets, training,
        config.evaluation, config.server, config.rounds, config.seed, names, compression=config.compression,
        privacy=config.privacy,
    )  # fmt: skip
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tree = whole(model, groups, rules)
    faked(network, fake, device)
    model.device = device
    return MetaModel(config, f, groups, fake, Bench(model, config.task, training, fake, tree))


class _Known(dict[int, Any]):
    """Every client's rows; a client whose rows lie elsewhere has one, so that it has a weight."""

    def __init__(self, shards: Mapping[int, Any] | Sequence[Any]):
        super().__init__(shards if isinstance(shards, Mapping) else enumerate(shards))

    def __missing__(self, client: int) -> Any:
        return Shard(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


def whole(model: Model, groups: Sequence[Group], rules: Rules) -> Tree:
    """Every part's leaves, by shape: those of the part that stands for it."""
    layers = {group_key(model, rules, group.part): group.layer for group in groups}
    return {path: layers[group_key(model, rules, path)] for path in model.parts}


def outlined(task: Task, model: str, labels: int) -> nn.Module:
    """What ``task.network`` would load, on the meta device: from the configuration and the names in the checkpoint.

    ``ValueError`` where the model is not known here.
    """
    import transformers

    settings = {"num_labels": labels} if labels else {}
    config = load_quietly(transformers.AutoConfig, model, **settings)
    auto: Any = getattr(transformers, task.auto)
    with torch.device("meta"):
        network: nn.Module = auto.from_config(config, dtype=torch.float32)
    if getattr(config, "pad_token_id", None) is None:
        network.config.pad_token_id = 0
    if task.brings_head:
        network.put_on_top = []  # type: ignore[assignment]  # as networks.whole has it
    network.drawn_anew = _poolers(network, model)  # type: ignore[assignment]  # read by targets.trained_in_full
    return network


def faked(network: nn.Module, fake: FakeTensorMode, device: torch.device) -> None:
    """Gives a network on the meta device fake tensors on ``device``: kernels are chosen as there, none is run."""
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied

    def fresh(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in made:
            with fake:
                y = torch.empty(x.shape, dtype=x.dtype, device=device)
                made[id(x)] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
        return made[id(x)]

    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, x in list(table.items()):
                if x is not None:
                    table[name] = fresh(x)  # type: ignore[assignment]


def _poolers(network: nn.Module, model: str) -> list[str]:
    """The poolers that the checkpoint lacks; none where its names cannot be had."""
    known = stored(model)
    body = f"{network.base_model_prefix}."
    poolers = [name for name, _ in network.named_parameters() if name.startswith(body) and ".pooler." in name]
    lost = [name for name in poolers if not any(key.endswith(name.removeprefix(body)) for key in known)]
    return sorted({name.rpartition(".")[0] for name in lost}) if known else []


def stored(model: str) -> list[str]:
    """The names of a checkpoint's tensors; no tensor is read."""
    from transformers.utils import cached_file

    found: dict[str, str | None] = {}
    for name in ("model.safetensors.index.json", "model.safetensors"):
        found[name] = cached_file(
            resolve_model(model), name, local_files_only=True, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
    index, single = found.values()
    if index is not None:
        return list(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    if single is None:
        return []
    return list(read_header(single).tensors)
