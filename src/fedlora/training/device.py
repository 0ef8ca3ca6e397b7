"""What the machine gives: device, threads, precision, and what becomes of freed memory."""

import ctypes
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from fedlora.schema import PerMachine
from fedlora.training.local import Training

WORTH_BF16 = 4_000_000  # parameters; below, converting costs more than the faster products save
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
LARGE = 32_768  # bytes; blocks from here on are a mapping of their own where memory is returned


@dataclass(frozen=True)
class Engine:
    """The ``[engine]`` table."""

    name: str = "inprocess"  # or "flower-simulation", or an engine of another package
    device: PerMachine[str] = "auto"  # "cpu", "cuda", "cuda:1"; auto: CUDA where there is one
    threads: PerMachine[int | None] = None  # torch's threads; None leaves them as they are
    offload: bool = False  # keep a round's uploads in temporary files: memory does not grow with the cohort
    # Freed memory (Linux, glibc): fast, small or as it comes.
    allocator: PerMachine[Literal["keep", "return", "system"]] = "keep"

    def chosen(self) -> torch.device:
        """The device that ``device`` stands for. ``ValueError`` where it is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"engine.device is {self.device!r}; set it to auto, cpu or cuda.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"engine.device is {self.device!r}, but this machine has no CUDA device; set it to cpu.")
        return device

    def prepare(self) -> torch.device:
        """Applies the settings to this process, and returns the device."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.allocator == "keep":
            keep_memory()
        elif self.allocator == "return":
            return_memory()
        return self.chosen()

    def resolved(self, training: Training, network: nn.Module) -> Training:
        """``precision = "auto"`` becomes what this machine is fast at for this network."""
        if training.precision != "auto":
            return training
        large = sum(x.numel() for x in network.parameters()) >= WORTH_BF16
        return replace(training, precision="bf16" if large and has_bf16(self.chosen()) else "float32")


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _avx512_bf16()


def _avx512_bf16() -> bool:
    """oneDNN says yes on processors that only emulate it; the kernel's flags know."""
    if sys.platform != "linux":
        return platform.machine() == "arm64"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return any(name in flags.split() for name in ("avx512_bf16", "amx_bf16", "bf16"))


def checkpoint_activations(network: nn.Module) -> None:
    """Recompute activations in the backward pass; without re-entry, since a frozen input requires no gradient."""
    name = (
        "activation_checkpointing" if hasattr(network, "activation_checkpointing_enable") else "gradient_checkpointing"
    )
    getattr(network, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})


def keep_memory() -> bool:
    """Tells glibc to serve large blocks from its heap and not to hand them back; False where there is no glibc.

    Each training step frees and asks again for the same large blocks; by default glibc returns them to the kernel,
    which zeroes every page anew. The price is that memory stays with the process at its peak, and gaps with it.
    """
    return _tell_glibc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def return_memory() -> bool:
    """Tells glibc to give every large block back when it is freed: the process holds what its tensors hold, no more.

    Slower than ``keep_memory``, since the kernel zeroes each page that is asked for again.
    """
    return _tell_glibc({M_MMAP_MAX: 65_536, M_MMAP_THRESHOLD: LARGE, M_TRIM_THRESHOLD: LARGE})


def _tell_glibc(options: Mapping[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    return all(libc.mallopt(option, value) for option, value in options.items())
