"""Parametrisations of one weight's update, one a file."""

from fedlora.adapters._base import Adapter
from fedlora.adapters.dense import Dense
from fedlora.adapters.dual_lora import DualLoRA
from fedlora.adapters.lora import LoRA
from fedlora.adapters.lora_sb import LoRASB
from fedlora.adapters.multihead import Heads
from fedlora.adapters.vera import VeRA

KINDS: dict[str, type[Adapter]] = {"lora": LoRA, "vera": VeRA, "heads": Heads, "lora-sb": LoRASB, "dual-lora": DualLoRA}
"""What ``adapter.name`` may say; ``Dense`` is for heads of networks and is chosen by ``model.head``."""

__all__ = ["KINDS", "Adapter", "Dense", "DualLoRA", "Heads", "LoRA", "LoRASB", "VeRA"]
