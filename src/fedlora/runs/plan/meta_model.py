"""A federation whose network has shapes, dtypes and a device, but no weights, so that one of any size fits."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fedlora.engines.federation import Federation
from fedlora.files import read_header
from fedlora.runs.build import attach_federation, is_loaded_half, load_rows
from fedlora.runs.config import Config
from fedlora.runs.plan.traffic import PartGroup, group_parts
from fedlora.schema import ConfigError
from fedlora.tasks._base import Shard, Task
from fedlora.tasks.networks.pretrained import load_quietly, resolve_model
from fedlora.types import Tree


@dataclass(frozen=True)
class MetaModel:
    """A federation without weights, the groups of its parts, and ``tree``, the shapes of all leaves."""

    config: Config
    federation: Federation
    groups: list[PartGroup]
    tree: Tree
    fake: FakeTensorMode
    loading: int  # bytes of the pretrained weights in the precision in which they are loaded


def build_meta_model(config: Config) -> MetaModel:
    """Build the federation of a configuration with data, but without weights."""
    if config.task.is_own_code:
        raise ConfigError(
            "a plan is computed from the config.json of a model, and the model of this run is a Python object; run one "
            "round of it, and read the bytes and seconds of its record."
        )
    device = config.engine.select_device()
    data, shards, names = load_rows(config, None, True)
    dtype = torch.bfloat16 if is_loaded_half(config, config.training.precision, config.engine) else torch.float32
    network = _build_network(config.task, config.model.name, len(names), dtype)
    loading = sum(x.nbytes for x in network.parameters())
    all_shards = _AllShards(shards if isinstance(shards, Mapping) else enumerate(shards))
    f = attach_federation(config, network, "meta", data, all_shards, names)
    if f.training.gradient_checkpointing:
        network.config.use_cache = False  # type: ignore[union-attr]  # else transformers warns and sets it
    groups, tree = group_parts(f.model, f.rules)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _replace_by_fake_tensors(network, fake, device)
    f.model.device = device
    return MetaModel(config, f, groups, tree, fake, loading)


class _AllShards(dict[int, Any]):
    """Every client's rows; a client with rows on another machine has one row, so that it has a weight."""

    def __missing__(self, client: int) -> Any:
        return Shard(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


def _build_network(task: Task, model: str, labels: int, dtype: torch.dtype) -> nn.Module:
    """Build the network that ``task.network`` would load, on the meta device. Raises ``ValueError``."""
    import transformers

    settings = {"num_labels": labels} if labels else {}
    config = load_quietly(transformers.AutoConfig, model, **settings)
    auto: Any = getattr(transformers, task.auto)
    with torch.device("meta"):
        network: nn.Module = auto.from_config(config, dtype=dtype)
    if getattr(config, "pad_token_id", None) is None:
        network.config.pad_token_id = 0
    if task.brings_head:
        network.put_on_top = []  # type: ignore[assignment]  # as networks.whole has it
    network.drawn_anew = _new_poolers(network, model)  # type: ignore[assignment]  # read by targets.trained_in_full
    return network


def _replace_by_fake_tensors(network: nn.Module, fake: FakeTensorMode, device: torch.device) -> None:
    """Give a network on the meta device fake tensors on ``device``, whose kernels are selected but not run."""
    fakes: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, x in ((name, x) for name, x in list(table.items()) if x is not None):
                if id(x) not in fakes:
                    with fake:
                        y = torch.empty(x.shape, dtype=x.dtype, device=device)
                        fakes[id(x)] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
                table[name] = fakes[id(x)]  # type: ignore[assignment]


def _new_poolers(network: nn.Module, model: str) -> list[str]:
    """Return the poolers that are not in the checkpoint; empty if its tensors are not known."""
    known = _tensor_names(model)
    body = f"{network.base_model_prefix}."
    poolers = [name for name, _ in network.named_parameters() if name.startswith(body) and ".pooler." in name]
    lost = [name for name in poolers if not any(key.endswith(name.removeprefix(body)) for key in known)]
    return sorted({name.rpartition(".")[0] for name in lost}) if known else []


def _tensor_names(model: str) -> list[str]:
    """Return the names of a local checkpoint's tensors, without reading them; empty without a checkpoint."""
    from transformers.utils import cached_file

    index, single = (
        cached_file(
            resolve_model(model), name, local_files_only=True, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )
        for name in ("model.safetensors.index.json", "model.safetensors")
    )  # fmt: skip
    if index is not None:
        return list(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    return list(read_header(single).tensors) if single is not None else []
