"""Digests of a run's inputs: the rows of each split, their clients, and the pretrained model.

A checkpoint holds the digests, so that a run with changed data or another model is refused, with the differences.
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
from fedlora.schema import flatten_table
from fedlora.tasks._base import Examples
from fedlora.training.parts import gather_value
from fedlora.training.sharding import is_sharded, reshard

SAMPLE = 1024  # values of each pretrained weight
NAMES = 40  # labels that are kept by name
ROW = "row"  # a feature: the number of a row in the caller's datasets, which is no content of it
LONG = 60  # characters of a setting that is kept unchanged; a longer one is replaced by a digest
# Settings of a pretrained model that do not change its outputs: its author, its storage, its names of labels.
IDLE = ("transformers_version", "architectures", "dtype", "torch_dtype", "name_or_path", "id2label", "label2id")


def digest_inputs(f: Federation) -> dict[str, Any]:
    """Return digests of a federation's rows, as training sees them, and of its base: plain values, for a checkpoint.

    ``base`` is of the pretrained weights, ``settings`` are the model's own, and ``start`` is of ``model.start``. For
    the rest see ``digest_rows``.
    """
    return {**digest_model(f), **digest_rows(f)}


def digest_model(f: Federation) -> dict[str, Any]:
    """Return digests of the pretrained model and of the adapter that it starts with."""
    base = f.model.remote_base or {"base": _digest_base(f), "settings": model_settings(f.model.network)}
    return {**base, "start": digest(f.model.start_tree)}


def digest_rows(f: Federation) -> dict[str, Any]:
    """Return digests of this machine's rows, as training sees them; empty on a machine without data.

    In a rehearsal, ``parties`` has the digests of each party's rows.
    ``rows`` has each split's number of rows, and digests of the features (in any order), of features and labels (in
    any order), and of features and labels in order.
    """
    if f.parties:
        return {"parties": {str(client): digest_rows(own) for client, own in f.parties.items()}}
    if f.data is None:
        return {}
    names = list(f.data.label_names)
    labels = {"count": len(names), "first": names[:NAMES], "all": _digest(json.dumps(names).encode()).hex()}
    splits = {"training": f.data.train, "test": f.data.test}
    shards = hashlib.blake2b(digest_size=16)
    for client, shard in f.shards.items() if isinstance(f.shards, Mapping) else enumerate(f.shards):
        for x in (torch.tensor([client, len(shard.train), len(shard.test)]), shard.train, shard.test, shard.relabel):
            shards.update(b"" if x is None else _bytes(x))
    rows = {key: digest_split(examples) for key, examples in splits.items()}
    return {"labels": labels, "rows": rows, "shards": shards.hexdigest()}


def model_settings(network: nn.Module) -> dict[str, str]:
    """Return the settings of a model's ``config.json`` that differ from its class's defaults: dotted key -> JSON."""
    config = getattr(network, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    try:
        defaults = _settings_as_json(type(config)())
    except (TypeError, ValueError, AttributeError, KeyError):  # a class without defaults: all of its settings count
        defaults = {}
    return {
        key: text if len(text) <= LONG else f"{text[: LONG // 2]}... ({_digest(text.encode()).hex()})"
        for key, text in sorted(_settings_as_json(config).items())
        if defaults.get(key) != text
    }


def _settings_as_json(config: Any) -> dict[str, str]:
    flat = flatten_table(config.to_dict())
    used = {key: x for key, x in flat.items() if not any(n in IDLE or n.startswith("_") for n in key.split("."))}
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in used.items()}


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between two digests, a phrase for each."""
    rows = now.get("rows", {})
    changes = [text for split, old in before.get("rows", {}).items() if (text := _compare_split(split, old, rows))]
    for client, own in before.get("parties", {}).items():
        theirs = describe_changes(own, now.get("parties", {}).get(client, {}))
        changes += [f"client {client}: {text}" for text in theirs]
    if before.get("labels") != now.get("labels"):
        labels, old_labels = (_list_labels(digests.get("labels")) for digests in (now, before))
        changes.append(f"the labels are {labels}, and were {old_labels}")
    if before.get("base") != now.get("base"):
        changes.append("the pretrained model has other weights")
    if "settings" in before:
        changes += _compare_settings(before["settings"], now["settings"])
    if "start" in before and before["start"] != now["start"]:
        changes.append("model.start holds another adapter")
    if not changes and before.get("shards") != now.get("shards"):
        changes.append("the same rows are divided otherwise among the clients")
    return changes


def compare_inputs(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """``ValueError`` with the differences of two digests of data and base, if there are any."""
    if changes := describe_changes(before, now):
        raise ValueError(
            f"{str(run)!r} was begun with other data or another model: {'; '.join(changes)}; put back what it was "
            "begun with, or choose another folder and run it anew."
        )


def _compare_split(split: str, old: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    new = rows.get(split)
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


def _compare_settings(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Describe the settings of the pretrained model that differ, up to three by name."""
    odd = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    pairs = [f"{key} is {now.get(key, 'its default')}, and was {before.get(key, 'its default')}" for key in odd[:3]]
    more = f", and {len(odd) - 3} more differ" if len(odd) > 3 else ""
    return [f"the config.json of the pretrained model says that {', '.join(pairs)}{more}"] if odd else []


def _list_labels(labels: Mapping[str, Any] | None) -> str:
    if not labels:
        return "none"
    more = f" and {labels['count'] - NAMES} more" if labels["count"] > NAMES else ""
    return ", ".join(labels["first"]) + more


def digest_split(examples: Examples) -> dict[str, Any]:
    """Return the digests of one split, see ``digest_rows``."""
    features, constants = _split_features(examples)
    content = [_digest(*parts) for parts in zip(*features)]
    labels = [x for x in (examples.labels, examples.strata, examples.sets) if x is not None]
    pairs = [row + _digest(*parts) for row, *parts in zip(content, *map(_iterate_rows, labels))]
    return {
        "count": len(examples),
        "content": _digest(constants, *sorted(content)).hex(),
        "pairs": _digest(constants, *sorted(pairs)).hex(),
        "order": _digest(constants, *pairs).hex(),
    }


def _split_features(examples: Examples) -> tuple[list[Iterator[bytes]], bytes]:
    """Return iterators over the rows, one for each feature, and the features that all rows share."""
    size, rows, common = len(examples), [_iterate_rows(examples.lengths)], b""
    offsets = {key: x for key, x in examples.features.items() if key.endswith("offsets") and len(x) == size + 1}
    for key, x in sorted(examples.features.items()):
        if key in offsets or key == ROW:
            continue
        ends = next((y for y in offsets.values() if x.dim() == 1 and int(y[-1]) == len(x)), None)
        if ends is not None:
            rows.append(_iterate_slices(x, ends))
        elif x.dim() and len(x) == size:
            rows.append(_iterate_rows(x))
        else:
            common += key.encode() + _bytes(x)
    rows += [(value.encode() for value in examples.groups)] if examples.groups is not None else []
    if examples.texts is not None:
        rows.append(json.dumps(text, sort_keys=True, default=str).encode() for text in examples.texts)
    return rows, common


def _iterate_rows(x: Tensor) -> Iterator[bytes]:
    content = memoryview(_bytes(x))
    width = len(content) // max(1, len(x))
    return (content[i * width : (i + 1) * width] for i in range(len(x)))  # type: ignore[misc]


def _iterate_slices(x: Tensor, offsets: Tensor) -> Iterator[bytes]:
    content, ends = memoryview(_bytes(x)), (offsets * x.element_size()).tolist()
    return (content[begin:end] for begin, end in pairwise(ends))  # type: ignore[misc]


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest_base(f: Federation) -> str:
    """Return a digest of up to 1,024 values of each pretrained weight; another model differs in nearly all of them."""
    hasher = hashlib.blake2b(digest_size=16)
    reshard(f.model.network)
    parameters = [x for part in f.model.parts.values() for x in part.leaves.values()]
    leaves = {x.data_ptr() for x in parameters if not is_sharded(x)}
    ids = set(map(id, parameters))
    names = {name for name, x in f.model.network.named_parameters(remove_duplicate=False) if id(x) in ids}
    for name, x in sorted(f.model.network.state_dict().items()):
        is_head = any(name.startswith(f"{head}.") for head in f.heads)
        # Heads and adapters are drawn from the seed, or among the initial leaves.
        if (
            isinstance(x, Tensor)
            and not is_head
            and name not in names
            and (is_sharded(x) or x.data_ptr() not in leaves)
        ):
            values = gather_value(x).reshape(-1)
            hasher.update(f"{name} {tuple(x.shape)}".encode())
            hasher.update(_bytes(values[:: max(1, len(values) // SAMPLE)][:SAMPLE]))
    return hasher.hexdigest()


def _digest(*parts: bytes) -> bytes:
    """Return a digest of the parts and their lengths."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()
