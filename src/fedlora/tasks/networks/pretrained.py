"""Loading of pretrained networks and tokenizers by hub id or folder."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedlora.seeds import derive_seed

DEMO = "demo-vit"  # the small ViT that ships with the library
IDS = ("input_ids", "rejected_input_ids", "prompts", "source", "target")  # features with token ids


def resolve_model(model: str) -> str:
    """Return the argument of ``from_pretrained``. Raises ``ValueError`` if a folder has no model."""
    if model == DEMO:
        return str(files("fedlora.tasks") / "demo_vit")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"the folder {model!r} has no config.json; name a Hugging Face model folder.")
        return str(path)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"there is no model folder {model!r}; name a Hugging Face model folder or a hub id.")
    return model


def load_quietly(auto: Any, model: str, **kwargs: Any) -> Any:
    """Call ``auto.from_pretrained`` without progress bars and warnings. Raises ``ValueError`` of one sentence."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()  # no messages of retries before our one sentence
    logging.disable_progress_bar()
    try:
        return auto.from_pretrained(resolve_model(model), **kwargs)
    except (OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the model {model!r} could not be loaded: {reason}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def stored_dtype(model: str) -> torch.dtype | None:
    """Return the dtype of a checkpoint's weights, as its ``config.json`` says; None if it does not."""
    from transformers import AutoConfig

    config = load_quietly(AutoConfig, model)
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def load_complete(auto: Any, model: str, loading: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a pretrained network with its checkpoint's head, in float32 unless ``loading`` has other options.

    Raises ``ValueError`` if the checkpoint lacks weights, which would be random and never trained.
    """
    network, missing, _ = _load_network(auto, model, **(loading or {}))
    if missing:
        raise ValueError(
            f"the model {model!r} lacks {len(missing)} weights of {type(network).__name__}, such as {missing[0]!r}; "
            "name a checkpoint of that kind."
        )
    network.put_on_top = []  # read by targets.new_modules
    return network


def load_with_new_head(
    auto: Any, model: str, labels: int, seed: int, loading: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return a pretrained network with a new head of ``labels`` outputs, drawn from ``seed``.

    It is in float32 unless ``loading`` has another dtype; the head is always drawn in float32. A pooler that the
    checkpoint lacks is drawn as well, and trained like the head. Raises ``ValueError`` if other weights of the body are
    missing, which would be random and never trained.
    """
    loading = loading or {}
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed(seed, "network"))
        options = {"num_labels": labels, "ignore_mismatched_sizes": True, **loading}
        network, missing, mismatched = _load_network(auto, model, **options)
        if loading.get("dtype", torch.float32) != torch.float32:  # else the draws differ from those of a float32 base
            torch.manual_seed(derive_seed(seed, "network"))
            _draw_in_float32(network, [*missing, *mismatched])
    body = [key for key in missing if key.startswith(f"{network.base_model_prefix}.")]
    lost = [key for key in body if ".pooler." not in key]
    if lost:
        raise ValueError(
            f"the model {model!r} lacks {len(lost)} weights of its body, such as {lost[0]!r}; name a whole checkpoint."
        )
    network.drawn_anew = sorted({key.rpartition(".")[0] for key in body})  # read by targets.new_modules
    return network


def _load_network(auto: Any, model: str, **loading: Any) -> tuple[Any, list[str], list[str]]:
    """Return a network, and the names of the weights that its checkpoint lacks, or has in another size."""
    try:
        network, report = load_quietly(auto, model, output_loading_info=True, **{"dtype": torch.float32, **loading})
    except ValueError as error:
        if (kind := loading.get("attn_implementation")) and "attention" in str(error).lower():
            raise ValueError(
                f"model.attention is {kind!r}, which the model {model!r} cannot compute ({_first_sentence(error)}); "
                "set it to 'auto', or to 'eager'."
            ) from error
        if "Unrecognized configuration class" not in str(error):
            raise
        from transformers import AutoConfig

        kind = load_quietly(AutoConfig, model).model_type
        raise ValueError(
            f"the model {model!r} is of the kind {kind!r}, which {auto.__name__} does not load; "
            "name another, or another task.name."
        ) from error
    return network, sorted(report["missing_keys"]), sorted(key for key, *_ in report["mismatched_keys"])


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].splitlines()[0].rstrip(".")


def _draw_in_float32(network: Any, names: Sequence[str]) -> None:
    """Draw the modules of these parameters again, in float32 and in the order in which transformers draws them."""
    drawn = {name.rpartition(".")[0] for name in names}
    for path, module in network.named_modules():
        if path in drawn:
            for name, x in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(torch.empty_like(x, dtype=torch.float32)))
            network._init_weights(module)


def attention_options(kind: str, device: torch.device) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` for an implementation of attention.

    Raises ``ValueError`` if this machine has no FlashAttention.
    """
    if kind == "auto":
        return {}
    if kind == "flash_attention_2":
        from transformers.utils.import_utils import is_flash_attn_2_available

        if device.type != "cuda":
            raise ValueError(
                f"model.attention is {kind!r}, which needs a CUDA device, but engine.device comes to {device.type!r}; "
                "set model.attention to 'auto' or 'sdpa'."
            )
        if not is_flash_attn_2_available():
            raise ValueError(
                f"model.attention is {kind!r}, which needs the package flash-attn; install it by "
                "`pip install flash-attn`, or set model.attention to 'auto' or 'sdpa'."
            )
    return {"attn_implementation": kind}


def quantization_options(kind: Literal["4bit", "8bit"], device: torch.device) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` for 4 or 8 bits; ``ValueError`` without a GPU or bitsandbytes."""
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
def load_tokenizer(model: str, chat_template: str | None = None) -> Any:
    """Return the model's tokenizer with a padding token, and with ``chat_template`` in place of its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = load_quietly(AutoTokenizer, model)
    except ValueError as error:
        if "backend tokenizer" not in str(error):
            raise
        raise ValueError(f"the model {model!r} has no tokenizer that can be read; name a model of texts.") from error
    if tokenizer.pad_token_id is None:  # masked everywhere, so any token works
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def max_positions(config: Any) -> int:
    """Return the number of positions in a model's configuration; a large number if they are unlimited."""
    return getattr(config, "max_position_embeddings", None) or 10**9


def check_tokens(network: nn.Module, model: str, splits: Mapping[str, Any], width: int = 0) -> None:
    """Raise ``ValueError`` if rows, padded to ``width``, have tokens, segments or positions without an embedding."""
    if not any(key in examples.features for examples in splits.values() for key in IDS):
        return
    words: Any = getattr(network.get_input_embeddings(), "num_embeddings", None)
    for name, examples in splits.items():
        for key in (key for key in (*IDS, "pad") if key in examples.features and words is not None):
            check_token_ids(int(examples.features[key].max()), int(words), model, f"{name} rows")
        kinds = _count_inputs(network, "token_type_embeddings")
        kind = int(examples.features.get("token_type_ids", torch.zeros(1)).max())
        if kinds is not None and kind >= kinds:
            raise ValueError(
                f"the tokenizer of {model!r} marks the second text of a pair by {kind}, but the model knows {kinds} "
                "kinds of text; take the tokenizer that the model was trained with."
            )
        places, longest = _count_inputs(network, "position_embeddings"), max(width, int(examples.lengths.max()))
        if places is not None and "input_ids" in examples.features and longest > places:
            raise ValueError(
                f"{name} rows come to {longest} tokens, but the model {model!r} reads at most {places}; set "
                f"task.max_length to {places}."
            )


def check_token_ids(largest: int, words: int, model: str, where: str) -> None:
    """Raise ``ValueError`` if a token has no row in the model's embedding."""
    if largest >= words:
        raise ValueError(
            f"the {where} hold the token number {largest}, but the model {model!r} has embeddings for {words} tokens; "
            "its tokenizer is longer than its embedding: take the tokenizer that it was trained with, or save the "
            "model anew after resize_token_embeddings(len(tokenizer))."
        )


def _count_inputs(network: nn.Module, name: str) -> int | None:
    """Return the number of inputs of an embedding, or None if the network has none of that name."""
    for path, module in network.named_modules():
        if path.rpartition(".")[2] == name and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1  # of RoBERTa's positions
            return module.num_embeddings - (first if name == "position_embeddings" else 0)
    return None
