"""The default number of tokens in a batch of an evaluation, by the memory of the machine and the size of the model."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora.tasks.networks.next_token_loss import ChunkedLogits, loss_of

SHARE = 1 / 8  # of the device's memory, for one batch
LOGITS, STATES = 12, 128  # bytes that a token takes for each entry of the vocabulary, and for each hidden unit
SMALLEST, LARGEST = 1024, 131_072  # the largest: 256 rows of 512 tokens
CONTAINER = Path("/sys/fs/cgroup/memory.max")


def default_tokens(network: nn.Module, device: torch.device) -> int:
    """Return the tokens, padding included, that a forward pass holds in an eighth of the device's memory.

    A token takes 32 numbers a hidden unit, and three float32 logits an entry of the vocabulary if the network computes
    the logits of a batch at once, see ``prepare_loss``. The result is rounded down to a power of two, and is between
    1,024 and 131,072. It depends on the memory in all, not on what is free, so that a machine computes the same batches
    every time.
    """
    hidden, words = _sizes(network)
    tokens = int(total_memory(device) * SHARE / (LOGITS * words + STATES * hidden))
    return min(LARGEST, max(SMALLEST, 1 << max(tokens.bit_length() - 1, 0)))


def _sizes(network: nn.Module) -> tuple[int, int]:
    """Return the hidden size, and the size of the vocabulary whose logits are computed at once, or 0."""
    config: Any = getattr(network, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = max(1, getattr(config, "hidden_size", None) or 1)
    predicts = getattr(network, "get_output_embeddings", lambda: None)() is not None
    at_once = predicts and not isinstance(loss_of(network), ChunkedLogits)
    return hidden, getattr(config, "vocab_size", 0) if at_once else 0


def total_memory(device: torch.device) -> int:
    """Return the bytes of the device's memory, for a CPU those that a container may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CONTAINER.read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
