"""Networks whose parameters are divided over processes: FSDP2's are read and written whole, others are refused."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedlora.types import Tree


def is_sharded(parameter: Tensor) -> bool:
    """Whether each process holds a part of a parameter, as after ``fully_shard``."""
    return hasattr(parameter, "full_tensor")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters are divided over processes by torch's ``fully_shard``, FSDP2."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def reshard(network: nn.Module) -> None:
    """Put back the sharded parameters that a forward pass of FSDP2 has gathered.

    The gathered copies stay in the modules after an evaluation; a value that is written to them would be lost.
    """
    if not (dist.is_available() and dist.is_initialized()):  # FSDP2 needs a process group, and a second to be imported
        return
    for module in network.modules():
        if is_fully_sharded(module):
            module.reshard()


def check_wrappers(network: nn.Module) -> None:
    """Raise ``ValueError`` for parameters that are divided in another way than FSDP2's, which cannot be read."""
    for name, parameter in network.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name!r} is divided by DeepSpeed's ZeRO stage 3, whose parameters cannot be read and set whole here; "
                'use FSDP2 (fsdp=True, fsdp_config={"version": 2}), or ZeRO stage 1 or 2.'
            )
        if type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "_fsdp_flattened"):
            raise ValueError(
                f"{name!r} is flattened by FSDP version 1, so adapters cannot be read from it; use FSDP2: "
                'fsdp_version: 2 in the configuration of Accelerate, fsdp_config={"version": 2} in TrainingArguments, '
                "or torch's fully_shard."
            )


def check_shapes(start: Tree, leaves: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` if a leaf is not a parameter of its shape in ``start`` any more."""
    for path, layer in leaves.items():
        for leaf, x in layer.items():
            before = tuple(start[path][leaf].shape)
            if not isinstance(x, nn.Parameter) or tuple(x.shape) != before:
                raise ValueError(
                    f"{leaf} of {path!r} was a parameter of shape {before}, and is a {type(x).__name__} of shape "
                    f"{tuple(x.shape)} after training; of the wrappers that divide parameters over processes only "
                    "FSDP2's can be read: torch's fully_shard, or fsdp_version: 2."
                )


@torch.no_grad()
def add_value(parameter: Tensor, change: Tensor) -> None:
    """Add to a parameter in place; every process of a sharded one passes the same whole change."""
    parameter.add_(distribute_like(parameter, change))


def distribute_like(parameter: Any, value: Tensor) -> Tensor:
    """Return a whole value, which is the same on every process, divided as a parameter is."""
    if not is_sharded(parameter) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device, parameter.dtype), parameter.device_mesh, parameter.placements)
