"""Who holds what: each client's rows, and how many of every label, for whoever reads a run later."""

from collections.abc import Mapping
from typing import Any

import torch

from fedlora.engines.federation import Federation


def holdings(f: Federation) -> dict[str, Any] | None:
    """``clients`` (client -> ``train``, ``test``: rows, ``labels``: training rows of each label) and ``labels``, names.

    ``labels`` are missing where rows have none, such as numbers and free text. None where this machine has not all
    rows, or where a guarantee of privacy does not cover such figures.
    """
    if f.data is None or f.privacy.hides_figures or f.clients.own_data:
        return None
    shards = dict(f.shards) if isinstance(f.shards, Mapping) else dict(enumerate(f.shards))
    names, kinds = list(f.data.label_names), f.data.train.kinds
    labelled = bool(names) and not kinds.is_floating_point() and bool((kinds >= 0).all() and (kinds < len(names)).all())
    clients: dict[str, dict[str, Any]] = {}
    for client, shard in shards.items():
        own = torch.bincount(kinds[shard.train], minlength=len(names)).tolist() if labelled else None
        rows = {"train": len(shard.train), "test": len(shard.test)}
        clients[str(client)] = rows if own is None else {**rows, "labels": own}
    return {"labels": names if labelled else [], "clients": clients}


def labels(f: Federation, readings: Mapping[int, str]) -> dict[str, Any]:
    """For a run's summary: ``labels``, the names of the head's outputs, and ``label_maps``, which value is which class.

    ``readings`` say how parties read the labels of their own data. A map has ``clients`` ("all" or their numbers),
    ``by`` ("name" or "position") and ``classes`` (value -> name). It follows from the names alone, so it tells no rows.
    There are none where rows have no labels.
    """
    here = f.data.reading if f.data is not None else ""
    found: list[dict[str, Any]] = [{"clients": "all", "by": here, "classes": f.label_map(here)}] if here else []
    for how in sorted(set(readings.values())):
        clients = sorted(client for client, reading in readings.items() if reading == how)
        found.append({"clients": clients, "by": how, "classes": f.label_map(how)})
    return {"labels": list(f.label_names), **({"label_maps": found} if found else {})}
