"""Text generation in batches with the KV cache, greedy or sampled from a seed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedlora.tasks.networks.pretrained import check_token_ids


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of text generation: ``temperature`` 0 is greedy; ``stop`` are strings that end a text."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it is 0 for the likeliest token, or above.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is a share, above 0 and at most 1.")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty string, which would end every text at once; leave it out.")


@torch.no_grad()
def generate(
    network: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], settings: GenerationSettings, seed: int = 0
) -> list[str]:
    """Return the network's continuation of each prompt, without the prompt, the end token and the stop string.

    ``prompts`` are token ids of any lengths. Random numbers come from ``seed``, and the global generators are restored.
    Sampled texts depend on the other prompts of the batch, greedy ones do not.
    """
    width = max(1, *map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    words = getattr(network.get_input_embeddings(), "num_embeddings", None)
    if words is not None:
        check_token_ids(int(ids.max()), words, str(network.config.name_or_path), "prompts")
    ends = network.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "eos_token_id": sorted(ends) or None}
    if settings.temperature:
        options |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    stop = {"stop_strings": list(settings.stop), "tokenizer": tokenizer} if settings.stop else {}
    device = next(network.parameters()).device
    random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with generation_config(network, tokenizer, do_sample=settings.temperature > 0, **options), random_state:
        torch.manual_seed(seed)
        output = network.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **stop)
    rows = [
        row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in output[:, width:].tolist()
    ]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)  # an end token need not be a special one
    return [text[: min((i for i in map(text.find, settings.stop) if i >= 0), default=None)] for text in texts]


@contextmanager
def generation_config(network: nn.Module, tokenizer: Any, **options: Any) -> Iterator[None]:
    """Set the network to evaluation, and replace its generation config: transformers would add the checkpoint's."""
    from transformers import GenerationConfig

    tokens = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    before, training = network.generation_config, network.training
    config: Any = GenerationConfig(**tokens, use_cache=True, **options)
    network.generation_config = config
    network.eval()
    try:
        yield
    finally:
        network.generation_config = before
        network.train(training)
