"""The catalog of methods: each one's description and claims, and its bytes from a run of its hooks."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, cast

import torch

from fedlora.adapters import LoRA
from fedlora.engines.clients import Clients
from fedlora.engines.federation import Federation
from fedlora.engines.server_optimizer import ServerOptimizer
from fedlora.methods import METHODS, Method
from fedlora.runs.plan.traffic import PartGroup, simulate_group
from fedlora.runs.table import Column, Table
from fedlora.tasks._base import Shard
from fedlora.training.evaluation import Evaluation
from fedlora.training.local import Training
from fedlora.types import Turn, Work

REFERENCE = (768, 768, 8)  # outputs, inputs and rank of the weight that bytes are counted on
CLIENTS = 2
ROUNDS = 2  # a method that alternates sends one thing and then the other
CLAIMS = {"exact": "exact", "any_rank": "any rank", "personal": "personal", "secure_aggregation": "secure aggr."}
ADVICE = {"use": "Use it when", "avoid": "Not when"}  # the beginnings of these lines in a method's file
HOOKS = ("receive", "trains", "penalty", "send", "keep", "combine", "combine_all")


def build_reference(kind: type[Method]) -> Method:
    """Build the method with a LoRA of the reference rank, or with its own adapter of that size."""
    lora = LoRA(rank=REFERENCE[2])
    return kind(adapter=lora if issubclass(LoRA, kind.adapters) else kind.adapters[0].like(lora))


def estimate_bytes(kind: type[Method]) -> dict[str, float]:
    """Return the bytes up and down of a client, a round and a weight of the reference size, as a plan counts them.

    A download has the result of the previous round, so there is one more round of downloads than of uploads.
    """
    m, n, _ = REFERENCE
    method = build_reference(kind)
    layer, row = method.adapter.init(m, n, 0), torch.zeros(1, dtype=torch.int64)
    federation = Federation(
        {"weight": method}, method, cast(Any, None), cast(Any, None), None, Clients(count=CLIENTS),
        [Shard(row, row)] * CLIENTS, [method.adapter.budget] * CLIENTS, Training(), Evaluation(), ServerOptimizer(),
        ROUNDS + 1, 0,
    )  # fmt: skip
    rows = simulate_group(federation, PartGroup("weight", layer, 1)).rows
    turns = ROUNDS * CLIENTS
    return {
        "up": sum(row.bytes for row in rows if row.direction == "up" and row.round < ROUNDS) / turns,
        "down": sum(row.bytes for row in rows if row.direction == "down") / turns,
    }


def parse_docstring(doc: str) -> dict[str, str]:
    """Parse a method's module docstring: idea, source, when to use it and when not; "" for a part that is missing.

    The first line is ``TITLE: idea.``; a line that opens with ``Use it when`` or ``Not when`` begins the advice.
    """
    texts = dict.fromkeys(("idea", "reference", *ADVICE), "")
    first, _, rest = doc.partition("\n")
    texts["idea"], part = first.partition(": ")[2].rstrip("."), "reference"
    for line in filter(None, map(str.strip, rest.splitlines())):
        advice = next((key for key, words in ADVICE.items() if line.startswith(words)), None)
        part, line = (advice, line.removeprefix(ADVICE[advice]).strip()) if advice else (part, line)
        texts[part] = f"{texts[part]} {line}".strip()
    return texts


def describe_method(name: str) -> dict[str, Any]:
    """Describe a method as a JSON-able record."""
    kind = METHODS.load(name)
    parsed = parse_docstring(inspect.getdoc(sys.modules[kind.__module__]) or "")
    return {
        "name": name,
        "title": kind.title or kind.__name__,
        **{key: parsed[key].replace("``", "") for key in ("idea", "reference", *ADVICE)},
        "equation": inspect.getdoc(kind) or "",
        "claims": {
            "exact": bool(build_reference(kind).exact),
            "lossy": kind.lossy,
            "any_rank": kind.any_rank,
            "personal": kind.personal,
            "secure_aggregation": kind.sums,
        },
        "privacy": describe_privacy(kind),
        "adapters": [adapter.__name__ for adapter in kind.adapters],
        "changes": [hook for hook in HOOKS if hook in vars(kind)],
        "settings": {f.name: None if f.default is MISSING else f.default for f in fields(kind) if f.name != "adapter"},
        "bytes": estimate_bytes(kind),
        "bytes_of": "a client, a round and a weight of {} x {} at LoRA rank {}, float32".format(*REFERENCE),
    }


def describe_privacy(kind: type[Method]) -> str:
    """Describe the leaves that ``[privacy]`` can cover, as a run of the method's hooks shows them."""
    method = build_reference(kind)
    layer = method.adapter.init(*REFERENCE[:2], 0)
    sent, stays = set[str](), set[str]()
    for round in range(ROUNDS):
        turn = Turn(round, 0, method.adapter.budget)
        work = Work(layer, layer, method.trains(layer, turn, lambda: layer))
        out = method.send(work, turn)
        sent, stays = sent | set(out), stays | set(method.keep(work, out, turn))
    rows = "Single rows: all that is trained."
    if not sent:
        return f"Whole clients: nothing is sent. {rows}"
    where = "a round's sum or each upload" if method.sums and method.averages else "each upload"
    head = " and the parts trained in full" if method.shares_head else ""
    own = [*sorted(stays), *([] if method.shares_head else ["parts trained in full"])]
    left = f"; {', '.join(own)} stay with a client, uncovered" if own else ""
    return (
        f"Whole clients: noise on {where}, for {', '.join(sorted(sent))}{head}, clipped together as they are sent "
        f"(factors, not their product){left}. {rows}"
    )


def tabulate_catalog(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Build the table of all methods, with claims and bytes."""
    rows = [
        {"name": entry["name"], "idea": entry["idea"], **entry["bytes"]}
        | {key: "yes" if entry["claims"][key] else None for key in CLAIMS}
        for entry in entries
    ]
    claims = (Column(key, title, align="center") for key, title in CLAIMS.items())
    columns = (
        Column("name", "name"),
        Column("idea", "idea"),
        *claims,
        Column("up", "up", 0),
        Column("down", "down", 0),
    )
    return Table("methods", f"Bytes: {entries[0]['bytes_of']}" if entries else "No methods", columns, rows)


def format_method(entry: Mapping[str, Any]) -> list[str]:
    """Format the description of one method as lines."""
    claims = [key.replace("_", " ") for key, value in entry["claims"].items() if value] or ["none"]
    advice = [f"{words} {entry[key]}" for key, words in ADVICE.items() if entry[key]]
    return [
        f"{entry['title']} ({entry['name']}): {entry['idea']}.\n\n{entry['equation']}\n",
        f"Paper: {entry['reference']}",
        *advice,
        f"Changes from FedIT: {', '.join(entry['changes']) or 'nothing'}",
        f"Claims: {', '.join(claims)}",
        f"Adapters: {', '.join(entry['adapters'])}",
        f"Privacy: {entry['privacy']}",
        f"Settings of [method]: {', '.join(f'{k} = {v!r}' for k, v in entry['settings'].items())}",
        f"Bytes up {entry['bytes']['up']:,.0f}, down {entry['bytes']['down']:,.0f} ({entry['bytes_of']})",
    ]
