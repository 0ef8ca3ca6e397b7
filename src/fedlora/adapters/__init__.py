"""Parametrisations of one weight's update, one a file. The file's name is the adapter's name."""

from fedlora.adapters._base import Adapter
from fedlora.adapters._dense import Dense
from fedlora.adapters.dual_lora import DualLoRA
from fedlora.adapters.lora import LoRA
from fedlora.adapters.lora_sb import LoRASB
from fedlora.adapters.multihead import MultiHead
from fedlora.adapters.vera import VeRA
from fedlora.registry import Registry

ADAPTERS = Registry(Adapter, "adapter", group="fedlora.adapters", package=__name__)  # type: ignore[type-abstract]
names, load = ADAPTERS.names, ADAPTERS.load

__all__ = ["ADAPTERS", "Adapter", "Dense", "DualLoRA", "LoRA", "LoRASB", "MultiHead", "VeRA"]
