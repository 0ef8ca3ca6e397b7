"""Pretrained networks by hub id or folder, loaded quietly, with nothing but the head new."""

from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedlora.seeds import derive_seed

DEMO = "demo-vit"  # the small ViT that ships with the library
IDS = ("input_ids", "prompts", "source", "target")  # features that hold token numbers


def located(model: str) -> str:
    """A name that ``from_pretrained`` understands. ``ValueError`` for a folder that is not there."""
    if model == DEMO:
        return str(files("fedlora.tasks") / "demo_vit")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(
                f"the folder {model!r} holds no model: it has no config.json; name a Hugging Face model folder."
            )
        return str(path)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"there is no model folder {model!r}; name a Hugging Face model folder or a hub id.")
    return model


def quietly(load: Any, model: str, **kwargs: Any) -> Any:
    """``from_pretrained`` without its bars and its warnings about a new head; failures are one sentence."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()  # its retries would be said six times before our one sentence
    logging.disable_progress_bar()
    try:
        return load.from_pretrained(located(model), **kwargs)
    except (OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the model {model!r} could not be loaded: {reason}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def whole(auto: Any, model: str, loading: Mapping[str, Any] | None = None) -> nn.Module:
    """A pretrained network with the head that its checkpoint brings, in float32 or as ``loading`` says.

    Nothing of it is trained in full unless it is named. ``ValueError`` where the checkpoint is of another kind or lacks
    weights: they would be noise that nobody trains.
    """
    try:
        found, report = quietly(auto, model, output_loading_info=True, **{"dtype": torch.float32, **(loading or {})})
    except ValueError as error:
        raise _of_another_kind(auto, model, error) from error
    lost = sorted(report["missing_keys"])
    if lost:
        raise ValueError(
            f"the model {model!r} lacks {len(lost)} weights of {type(found).__name__}, such as {lost[0]!r}; "
            "name a checkpoint of that kind."
        )
    found.put_on_top = []  # read by targets.trained_in_full
    return found


def _of_another_kind(auto: Any, model: str, error: ValueError) -> ValueError:
    """What to say where ``auto`` has no network for such a model: transformers lists all that it has one for."""
    if "Unrecognized configuration class" not in str(error):
        return error
    kind = quietly(_config(), model).model_type
    return ValueError(
        f"the model {model!r} is of the kind {kind!r}, which {auto.__name__} does not load; "
        "name another, or another task.name."
    )


def _config() -> Any:
    from transformers import AutoConfig

    return AutoConfig


def quantised(kind: Literal["4bit", "8bit"], device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` needs to hold linear layers in 4 or 8 bits on a GPU.

    ``ValueError`` where there is no GPU, or no bitsandbytes.
    """
    if device.type != "cuda":
        raise ValueError(
            f"model.quantize is {kind!r}, which needs a CUDA device, but engine.device comes to {device.type!r}; "
            "leave model.quantize out, or run it on a machine with a GPU."
        )
    for name in ("bitsandbytes", "accelerate"):
        if find_spec(name) is None:
            raise ValueError(f"model.quantize is {kind!r}, which needs {name}; run `pip install {name}`.")
    from transformers import BitsAndBytesConfig

    half = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": half}
    settings = {"load_in_4bit": True, **four} if kind == "4bit" else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": device}}


@lru_cache(maxsize=4)
def tokenizer(model: str, chat_template: str | None = None) -> Any:
    """The model's tokenizer, with something to pad with; ``chat_template`` in the place of its own."""
    from transformers import AutoTokenizer

    try:
        found = quietly(AutoTokenizer, model)
    except ValueError as error:
        if "backend tokenizer" not in str(error):
            raise
        raise ValueError(f"the model {model!r} has no tokenizer that can be read; name a model of texts.") from error
    if found.pad_token_id is None:  # masked out everywhere, so any token will do
        found.pad_token = found.eos_token or found.convert_ids_to_tokens(0)
    if chat_template is not None:
        found.chat_template = chat_template
    return found


def network(auto: Any, model: str, labels: int, seed: int) -> nn.Module:
    """The network in float32 with a head for so many labels, drawn from the seed.

    A pooler that the checkpoint lacks is new as well, and trained like the head. ``ValueError`` where it lacks other
    weights of the body: they would be noise that nobody trains.
    """
    loading = {"ignore_mismatched_sizes": True, "output_loading_info": True, "dtype": torch.float32}
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed(seed, "network"))
        try:
            found, report = quietly(auto, model, num_labels=labels, **loading)
        except ValueError as error:
            raise _of_another_kind(auto, model, error) from error
    body = found.base_model_prefix
    lost = sorted(key for key in report["missing_keys"] if key.startswith(f"{body}.") and ".pooler." not in key)
    if lost:
        raise ValueError(
            f"the model {model!r} lacks {len(lost)} weights of its body, such as {lost[0]!r}; name a whole checkpoint."
        )
    poolers = {key.rpartition(".")[0] for key in report["missing_keys"] if key.startswith(f"{body}.")}
    found.drawn_anew = sorted(poolers)  # read by targets.trained_in_full
    return found


def check_tokens(network: nn.Module, model: str, splits: Mapping[str, Any], width: int = 0) -> None:
    """``ValueError`` where rows hold what the network has no embedding for: tokens, segments or places.

    ``splits`` are ``Examples`` by what they are called, and ``width`` the length that batches are padded to.
    """
    if not any(key in own.features for own in splits.values() for key in IDS):
        return
    words = getattr(network.get_input_embeddings(), "num_embeddings", None)
    for what, examples in splits.items():
        for key in (key for key in (*IDS, "pad") if key in examples.features and words is not None):
            check_ids(int(examples.features[key].max()), int(words), model, f"{what} rows")
        kinds = _entries(network, "token_type_embeddings")
        if kinds is not None and (seen := int(examples.features.get("token_type_ids", torch.zeros(1)).max())) >= kinds:
            raise ValueError(
                f"the tokenizer of {model!r} marks the second text of a pair by {seen}, but the model knows {kinds} "
                "kinds of text; take the tokenizer that the model was trained with."
            )
        places, longest = _entries(network, "position_embeddings"), max(width, int(examples.lengths.max()))
        if places is not None and "input_ids" in examples.features and longest > places:
            raise ValueError(
                f"{what} rows come to {longest} tokens, but the model {model!r} reads at most {places}; set "
                f"task.max_length to {places}."
            )


def check_ids(largest: int, words: int, model: str, where: str) -> None:
    """``ValueError`` where a token has no row in the model's embedding."""
    if largest >= words:
        raise ValueError(
            f"the {where} hold the token number {largest}, but the model {model!r} has embeddings for {words} tokens; "
            "its tokenizer is longer than its embedding: take the tokenizer that it was trained with, or save the "
            "model anew after resize_token_embeddings(len(tokenizer))."
        )


def _entries(network: nn.Module, name: str) -> int | None:
    """How many different inputs an embedding takes; None where the network has none of that name."""
    for path, module in network.named_modules():
        if path.rpartition(".")[2] == name and isinstance(module, nn.Embedding):
            taken = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa's places begin after it
            return module.num_embeddings - (taken if name == "position_embeddings" else 0)
    return None
