"""Who holds what: each client's rows, and how many of every label, for whoever reads a run later."""

from collections.abc import Mapping
from typing import Any

import torch

from fedlora.engines.federation import Federation

FILE = "rows.json"


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
