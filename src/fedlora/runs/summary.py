"""The summary of a run: its figures, and the clients' data."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from fedlora.engines.federation import Federation
from fedlora.engines.record import RoundRecord
from fedlora.runs.attendance import collect_faults, count_scored_clients
from fedlora.runs.config import Config
from fedlora.runs.record import DIRECTIONS, errors_over_weights

LAST = 3  # evaluated rounds in the mean that smooths the final figure


def summarise(config: Config, records: Sequence[RoundRecord], interrupted: bool, seconds: float) -> dict[str, Any]:
    """Return the figures of a run. ``final`` is the last evaluated round, not the best one."""
    summary: dict[str, Any] = {
        "method": config.table["method"]["name"],
        "title": config.method.title,
        "personal": config.method.personal,
        "metric": {"name": config.task.metric, "higher": config.task.is_higher_better},
        "seed": config.seed,
        "rounds": len(records),
        "rounds_asked": config.rounds,
        "interrupted": interrupted,
        "clients": config.clients.members,
        "bytes": {d: _sums([r["bytes"][d] for r in records]) for d in DIRECTIONS},
        "seconds": {**_sums([r["seconds"] for r in records]), "whole": seconds},
        "errors": {name: statistics.fmean(values) for name, values in errors_over_weights(records).items()},
        "versions": {name: version(name) for name in ("fedlora", "torch", "transformers")},
        "machine": {
            "processor": platform.machine(),
            "device": str(config.engine.select_device()),
            "threads": torch.get_num_threads(),
        },
        **collect_faults(records),
    }  # fmt: skip
    if evaluated := [record for record in records if "clients" in record]:
        final, last = evaluated[-1], evaluated[-LAST:]
        summary["final"] = {key: final[key] for key in ("global", "clients", "attack") if key in final}
        summary["scored"] = {"clients": count_scored_clients(final), "of": config.clients.members}
        summary["last_rounds"] = {
            "rounds": len(last),
            "clients": statistics.fmean(record["clients"]["mean"] for record in last),
            "fewest": min(map(count_scored_clients, last)),
        }
        if "global" in final:
            means = statistics.fmean(record["global"][config.task.metric] for record in last)
            summary["last_rounds"]["global"] = means
    return summary


def describe_base(network: nn.Module, precision: str) -> dict[str, Any]:
    """Return the precision that a pretrained model is used in, and its implementation of attention."""
    attention = getattr(getattr(network, "config", None), "_attn_implementation", None)
    return {"base": {"precision": precision, **({"attention": attention} if attention else {})}}


def _sums(rows: list[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(row.get(key, 0) for row in rows) for key in dict.fromkeys(k for row in rows for k in row)}


def describe_labels(f: Federation, readings: Mapping[int, str]) -> dict[str, Any]:
    """Return ``labels``, the names of the head's outputs, and ``label_maps``, the class of each value in the data.

    ``readings`` has how each client reads the labels of its own data. A map has ``clients`` ("all" or their numbers),
    ``by`` ("name" or "position") and ``classes`` (value -> name). It follows from the names alone, so it reveals no
    rows. There are no maps for rows without labels.
    """
    here = f.data.reading if f.data is not None else ""
    maps: list[dict[str, Any]] = [{"clients": "all", "by": here, "classes": f.label_map(here)}] if here else []
    for how in sorted(set(readings.values())):
        clients = sorted(client for client, reading in readings.items() if reading == how)
        maps.append({"clients": clients, "by": how, "classes": f.label_map(how)})
    return {"labels": list(f.label_names), **({"label_maps": maps} if maps else {})}


def data_distribution(f: Federation) -> dict[str, Any] | None:
    """Return each client's number of ``train`` and ``test`` rows and its training rows of each label.

    The counts of labels are missing if rows have no labels. None if this machine has not all rows, or if the privacy
    guarantee does not cover such figures.
    """
    if f.privacy.hides_figures or (not f.parties and (f.data is None or f.clients.own_data)):
        return None
    names = list(f.label_names)
    has_labels = bool(names) and all(_has_classes(own, len(names)) for own in f.parties.values() or [f])
    clients: dict[str, dict[str, Any]] = {}
    for client in f.parties or range(len(f.shards)):
        own = f.for_client(client)
        assert own.data is not None
        shard, kinds = own.shards[client], own.data.train.partition_labels
        clients[str(client)] = {"train": len(shard.train), "test": len(shard.test)}
        if has_labels:
            clients[str(client)]["labels"] = torch.bincount(kinds[shard.train], minlength=len(names)).tolist()
    return {"labels": names if has_labels else [], "clients": clients}


def _has_classes(f: Federation, count: int) -> bool:
    """Whether every training row has one of ``count`` classes."""
    assert f.data is not None
    kinds = f.data.train.partition_labels
    return not kinds.is_floating_point() and bool((kinds >= 0).all() and (kinds < count).all())
