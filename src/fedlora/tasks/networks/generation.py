"""Texts that a network writes: batched, with the KV cache, greedy or sampled from a seed of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.tasks.networks.pretrained import check_ids


@dataclass(frozen=True)
class Writing:
    """How texts are generated. ``temperature`` 0 takes the likeliest token; ``stop`` are strings that end a text."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
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
    network: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], writing: Writing, seed: int = 0
) -> list[str]:
    """What the network writes after each prompt, without the prompt, the end token and the stop string.

    ``prompts`` are token numbers, of any lengths: they are padded on the left and masked. Every draw comes from
    ``seed``: the global generators are as they were afterwards. Sampled texts depend on the batch they are drawn in,
    greedy ones do not.
    """
    ids, mask = padded(prompts, tokenizer.pad_token_id)
    words = getattr(network.get_input_embeddings(), "num_embeddings", None)
    if words is not None:
        check_ids(int(ids.max()), words, str(network.config.name_or_path), "prompts")
    device = next(network.parameters()).device
    training, own = network.training, network.generation_config
    network.eval()
    # Swapped, since transformers fills in whatever a checkpoint sets (penalties, top_k) and we leave out.
    network.generation_config = _settings(network, tokenizer, writing)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            stop = {"stop_strings": list(writing.stop), "tokenizer": tokenizer} if writing.stop else {}
            found = network.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **stop)
    finally:
        network.generation_config = own
        network.train(training)
    texts = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
    return [_until(text, writing.stop) for text in texts]


def padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token numbers and mask, rows by the longest prompt, padded on the left."""
    width = max(1, max(map(len, prompts)))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def ends(network: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the model's own, and its tokenizer's."""
    own = network.generation_config.eos_token_id
    several = own if isinstance(own, list) else [own]
    return sorted({token for token in (*several, tokenizer.eos_token_id) if token is not None})


def _settings(network: nn.Module, tokenizer: Any, writing: Writing) -> Any:
    from transformers import GenerationConfig

    drawn = {"do_sample": True, "temperature": writing.temperature, "top_p": writing.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=writing.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends(network, tokenizer) or None,
        use_cache=True,
        **(drawn if writing.temperature else {"do_sample": False}),
    )


def _until(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text
