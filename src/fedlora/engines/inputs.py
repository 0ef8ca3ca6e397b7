"""What a run was begun with and cannot go on without: the rows of each split, who has them, and the pretrained model.

A checkpoint holds the digests, so that a run whose data or model was changed on disk is refused and told how.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.engines.federation import Federation
from fedlora.files import digest
from fedlora.tasks._base import Examples

SAMPLE = 1024  # values of each pretrained weight
NAMES = 40  # labels that are kept by name
LONG = 60  # characters of a setting that is kept as it is; of a longer one a digest
# Settings of a pretrained model that say who wrote it, how it is stored or what its labels are called.
IDLE = ("transformers_version", "architectures", "dtype", "torch_dtype", "name_or_path", "id2label", "label2id")


def digest_inputs(f: Federation) -> dict[str, Any]:
    """Digests of a federation's rows, as training sees them, and of its base. Plain values, for a checkpoint.

    ``base`` is of the pretrained weights, ``settings`` are the model's own, and ``start`` is of ``model.start``. For
    the rest see ``rows``.
    """
    settings = model_settings(f.model.network)
    return {"base": _base(f), "settings": settings, "start": digest(f.model.start_tree), **digest_rows(f)}


def digest_rows(f: Federation) -> dict[str, Any]:
    """Digests of this machine's rows, as training sees them; nothing on a machine without data.

    ``rows`` has each split's number of rows and digests of what they hold (in any order), of that with its labels (in
    any order), and of the same in order.
    """
    if f.data is None:
        return {}
    names = list(f.data.label_names)
    labels = {"count": len(names), "first": names[:NAMES], "all": _digest(json.dumps(names).encode()).hex()}
    splits = {"training": f.data.train, "test": f.data.test}
    return {"labels": labels, "rows": {key: digest_split(own) for key, own in splits.items()}, "shards": _shards(f)}


def model_settings(network: nn.Module) -> dict[str, str]:
    """What a pretrained model's ``config.json`` sets otherwise than its kind has it by default: dotted key -> JSON."""
    config = getattr(network, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    try:
        usual = _flat(type(config)().to_dict())
    except (TypeError, ValueError, AttributeError, KeyError):  # a kind without defaults: all of its settings count
        usual = {}
    return {key: _short(text) for key, text in sorted(_flat(config.to_dict()).items()) if usual.get(key) != text}


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        if str(key) in IDLE or str(key).startswith("_"):
            continue
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = json.dumps(value, sort_keys=True, default=str)
    return found


def _short(text: str) -> str:
    return text if len(text) <= LONG else f"{text[: LONG // 2]}... ({_digest(text.encode()).hex()})"


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How ``now`` differs from ``before``, a phrase for each thing that changed."""
    found = [text for split in before.get("rows", {}) if (text := _changed(split, before["rows"], now.get("rows", {})))]
    if before.get("labels") != now.get("labels"):
        found.append(f"the labels are {_named(now.get('labels'))}, and were {_named(before.get('labels'))}")
    if before.get("base") != now.get("base"):
        found.append("the pretrained model has other weights")
    if "settings" in before:
        found += _reset(before["settings"], now["settings"])
    if "start" in before and before["start"] != now["start"]:
        found.append("model.start holds another adapter")
    if not found and before.get("shards") != now.get("shards"):
        found.append("the same rows are divided otherwise among the clients")
    return found


def compare_inputs(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """``ValueError`` where two digests of data and base differ; says how."""
    found = describe_changes(before, now)
    if found:
        raise ValueError(
            f"{str(run)!r} was begun with other data or another model: {'; '.join(found)}; put back what it was begun "
            "with, or choose another folder and run it anew."
        )


def _changed(split: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = before[split], now.get(split)
    if new is None:
        return f"there are no {split} rows any more"
    if old == new:
        return ""
    if old["count"] != new["count"]:
        return f"there are {new['count']} {split} rows, and were {old['count']}"
    if old["pairs"] == new["pairs"]:
        return f"the {split} rows are in another order"
    if old["content"] == new["content"]:
        return f"{split} rows have other labels"
    return f"{split} rows have another content"


def _reset(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Which settings of the pretrained model differ: up to three by name."""
    odd = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    pairs = [f"{key} is {now.get(key, 'its default')}, and was {before.get(key, 'its default')}" for key in odd[:3]]
    more = f", and {len(odd) - 3} more differ" if len(odd) > 3 else ""
    return [f"the config.json of the pretrained model says that {', '.join(pairs)}{more}"] if odd else []


def _named(labels: Mapping[str, Any] | None) -> str:
    if not labels:
        return "none"
    more = f" and {labels['count'] - NAMES} more" if labels["count"] > NAMES else ""
    return ", ".join(labels["first"]) + more


def digest_split(examples: Examples) -> dict[str, Any]:
    """Digests of one split: see ``inputs``."""
    features, constants = _parts(examples)
    content = [_digest(*parts) for parts in zip(*features)]
    labels = [x for x in (examples.labels, examples.strata, examples.sets) if x is not None]
    pairs = [own + _digest(*parts) for own, *parts in zip(content, *map(_by_row, labels))]
    return {
        "count": len(examples),
        "content": _digest(constants, *sorted(content)).hex(),
        "pairs": _digest(constants, *sorted(pairs)).hex(),
        "order": _digest(constants, *pairs).hex(),
    }


def _parts(examples: Examples) -> tuple[list[Iterator[bytes]], bytes]:
    """Iterators over the rows, together all that a row holds beside its label; and what is common to all rows."""
    size, rows, common = len(examples), [_by_row(examples.lengths)], b""
    offsets = {key: x for key, x in examples.features.items() if key.endswith("offsets") and len(x) == size + 1}
    for key, x in sorted(examples.features.items()):
        if key in offsets:
            continue
        ends = next((own for own in offsets.values() if x.dim() == 1 and int(own[-1]) == len(x)), None)
        if ends is not None:
            rows.append(_by_offset(x, ends))
        elif x.dim() and len(x) == size:
            rows.append(_by_row(x))
        else:
            common += key.encode() + _bytes(x)
    rows += [(value.encode() for value in examples.groups)] if examples.groups is not None else []
    if examples.texts is not None:
        rows.append(json.dumps(text, sort_keys=True, default=str).encode() for text in examples.texts)
    return rows, common


def _by_row(x: Tensor) -> Iterator[bytes]:
    content = memoryview(_bytes(x))
    width = len(content) // max(1, len(x))
    return (content[i * width : (i + 1) * width] for i in range(len(x)))  # type: ignore[misc]


def _by_offset(x: Tensor, offsets: Tensor) -> Iterator[bytes]:
    content, ends = memoryview(_bytes(x)), (offsets * x.element_size()).tolist()
    return (content[begin:end] for begin, end in pairwise(ends))  # type: ignore[misc]


def _bytes(x: Tensor) -> bytes:
    own: bytes = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return own


def _shards(f: Federation) -> str:
    own = f.shards.items() if isinstance(f.shards, Mapping) else enumerate(f.shards)
    found = hashlib.blake2b(digest_size=16)
    for client, shard in own:
        for x in (torch.tensor([client, len(shard.train), len(shard.test)]), shard.train, shard.test, shard.relabel):
            found.update(b"" if x is None else _bytes(x))
    return found.hexdigest()


def _base(f: Federation) -> str:
    """Of up to 1,024 values of each pretrained weight: another checkpoint changes nearly all of them."""
    found = hashlib.blake2b(digest_size=16)
    for name, x in sorted(f.model.network.state_dict().items()):
        own = any(name.startswith(f"{head}.") for head in f.heads)
        if isinstance(x, Tensor) and not own:  # drawn from the seed, or among the first leaves
            values = x.detach().reshape(-1)
            found.update(f"{name} {tuple(x.shape)}".encode())
            found.update(_bytes(values[:: max(1, len(values) // SAMPLE)][:SAMPLE]))
    return found.hexdigest()


def _digest(*parts: bytes) -> bytes:
    """Of the parts and where each ends."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()
