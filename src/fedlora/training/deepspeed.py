"""Trainers that train under DeepSpeed: what is refused, and one engine for each turn."""

from typing import Any

import torch
from torch import nn

CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # sections of DeepSpeed's configuration that cast the model


def find_zero_plugin(trainer: Any) -> Any:
    """Return the DeepSpeed settings that a ``Trainer`` trains with, or None."""
    return getattr(trainer.accelerator.state, "deepspeed_plugin", None)


def check_zero_plugin(plugin: Any, network: nn.Module) -> None:
    """Raise ``ValueError`` for settings of DeepSpeed with which a turn would be wrong."""
    if plugin.zero_stage == 3:
        raise ValueError(
            "the Trainer uses DeepSpeed's ZeRO stage 3, whose parameters cannot be read and set whole here; use FSDP2 "
            '(fsdp=True, fsdp_config={"version": 2}), or ZeRO stage 1 or 2.'
        )
    config = plugin.deepspeed_config
    for section, setting in (("optimizer", "args.optim"), ("scheduler", "args.lr_scheduler_type")):
        if section in config:
            raise ValueError(
                f"DeepSpeed's configuration has {section!r}, which does not know the rounds of a run; leave it out, "
                f"and set {setting}."
            )
    if config.get("tensor_parallel", {}).get("autotp_size", 0) > 1:
        raise ValueError(
            "DeepSpeed's tensor_parallel divides the layers that adapters are on, which cannot be read whole here; "
            "leave it out, or use FSDP2."
        )
    for section, dtype in CASTS.items():
        is_on = str(config.get(section, {}).get("enabled", False)).lower() == "true"
        other = next((name for name, x in network.named_parameters() if x.is_floating_point() and x.dtype != dtype), "")
        if is_on and other:
            raise ValueError(
                f"DeepSpeed's {section} would cast the whole model to {str(dtype).removeprefix('torch.')}, and "
                f"{other!r} is not: updates that are smaller would be lost between rounds; leave {section} out of the "
                "arguments and of DeepSpeed's configuration."
            )


def use_own_settings(trainer: Any) -> None:
    """Make a ``Trainer`` train with its own DeepSpeed settings.

    Accelerate keeps those of the last Trainer that was built, for all; batch size and clipping are among them.
    """
    plugin = getattr(trainer.args, "deepspeed_plugin", None)
    if plugin is not None:
        trainer.accelerator.state.deepspeed_plugins = plugin


def release_engine(trainer: Any) -> None:
    """Drop a ``Trainer``'s engine, so that the next turn builds one for the leaves that it trains.

    ``destroy()`` leaves the engine's hooks on the module, which all clients share: every engine of a run would stay in
    memory, with its moments, and be called in each forward pass.
    """
    wrapper = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None)
    if wrapper is not None:
        wrapper.engine.destroy()
        for name in ("module_forward_pre_hook", "module_forward_post_hook"):
            if (hook := getattr(wrapper.engine, name, None)) is not None:
                hook.remove()
        trainer.accelerator.deepspeed_engine_wrapped = None
    trainer.deepspeed = None
