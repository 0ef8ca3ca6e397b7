"""Settings of the machine: device, threads, precision and memory allocator."""

import ctypes
import platform
import sys
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from fedlora.schema import PerMachine
from fedlora.training.local import Training
from fedlora.training.precision import HALF

WORTH_BF16 = 4_000_000  # parameters; below, the conversion costs more than the faster products save
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
LARGE = 32_768  # bytes; larger blocks are mapped separately if memory is returned
HUGE = 2**25  # the largest threshold that glibc takes


@dataclass(frozen=True)
class Engine:
    """The ``[engine]`` table."""

    name: str = "inprocess"  # or "flower-simulation", or an engine of another package
    device: PerMachine[str] = "auto"  # "cpu", "cuda", "cuda:1"; auto: CUDA if available
    threads: PerMachine[int | None] = None  # torch's threads; None: unchanged
    offload: bool = False  # keep a round's uploads in temporary files, so that memory does not grow with the cohort
    # Freed memory (Linux, glibc): keep it for speed, return it to the system, or the system's default.
    allocator: PerMachine[Literal["keep", "return", "system"]] = "keep"

    def select_device(self) -> torch.device:
        """Return the device. Raises ``ValueError`` if this machine does not have it."""
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
        """Apply the settings to this process, and return the device."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.allocator != "system":
            set_allocator(self.allocator)
        return self.select_device()

    def resolve_precision(self, training: Training, network: nn.Module) -> Training:
        """Replace ``precision = "auto"`` by the fast precision of this machine for this network.

        It is bf16 if the machine multiplies bfloat16 and the network is large, or was loaded in half precision.
        """
        if training.precision != "auto":
            return training
        suits = any(x.dtype in HALF for x in network.parameters())
        suits = suits or sum(x.numel() for x in network.parameters()) >= WORTH_BF16
        return replace(training, precision="bf16" if suits and has_bf16(self.select_device()) else "float32")

    def loads_half(self, precision: str, stored: torch.dtype | None) -> bool:
        """Whether a checkpoint that is stored in a dtype is loaded in bfloat16, with this ``training.precision``."""
        is_fast = precision == "bf16" or (precision == "auto" and has_bf16(self.select_device()))
        return stored in HALF and is_fast

    def describe_loading(self, precision: str, stored: torch.dtype | None) -> str | None:
        """Return a note if a checkpoint in half precision is held in another one than the user may expect."""
        if stored == torch.bfloat16 and precision == "auto" and not self.loads_half(precision, stored):
            return (
                f"the checkpoint is in bfloat16, which {self.select_device().type!r} does not compute in on this "
                "machine: it is held in float32, in twice the memory."
            )
        if stored == torch.float16 and precision in ("auto", "bf16"):
            held = "bfloat16, which rounds it by 3 bits" if self.loads_half(precision, stored) else "float32"
            return f"the checkpoint is in float16: it is held in {held}."
        return None


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # oneDNN also accepts processors that only emulate bfloat16; the kernel's flags tell.
    if sys.platform != "linux":
        return platform.machine() == "arm64"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return any(name in flags.split() for name in ("avx512_bf16", "amx_bf16", "bf16"))


def checkpoint_activations(network: nn.Module) -> None:
    """Recompute activations in the backward pass; without re-entry, because a frozen input requires no gradient."""
    kind = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
    options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
    getattr(network, f"{kind}_checkpointing_enable")(**options)


def set_allocator(kind: Literal["keep", "return"]) -> bool:
    """Make glibc keep freed memory in its heap, or return every freed large block. Returns False without glibc.

    Each training step frees and allocates the same large blocks. By default, glibc returns them to the kernel, which
    zeroes every page again. The price of ``keep`` is that the process stays at its peak memory; ``return`` is slower.
    Blocks from ``HUGE`` on are returned in any case: smaller ones would settle in the gaps of a heap that keeps them,
    and every chunk of a large vocabulary's logits would make it grow.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    keep = {M_MMAP_MAX: 65_536, M_MMAP_THRESHOLD: HUGE, M_TRIM_THRESHOLD: 2**31 - 1}
    options = keep if kind == "keep" else {M_MMAP_MAX: 65_536, M_MMAP_THRESHOLD: LARGE, M_TRIM_THRESHOLD: LARGE}
    libc = ctypes.CDLL("libc.so.6")
    return all(libc.mallopt(option, value) for option, value in options.items())
