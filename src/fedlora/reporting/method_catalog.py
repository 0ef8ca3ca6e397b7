"""What each method is, claims and costs: read from its class, and counted by running its hooks once."""

import inspect
import sys
from dataclasses import MISSING, fields
from typing import Any, cast

import torch

from fedlora.adapters import LoRA
from fedlora.engines.clients import Clients
from fedlora.engines.federation import Federation
from fedlora.engines.server_optimizer import ServerOptimizer
from fedlora.methods import METHODS, Method
from fedlora.runs.plan.traffic import Group, play
from fedlora.tasks._base import Shard
from fedlora.training.evaluation import Evaluation
from fedlora.training.local import Training
from fedlora.types import Turn, Work

REFERENCE = (768, 768, 8)  # outputs, inputs and rank of the weight that bytes are counted on
CLIENTS = 2
ROUNDS = 2  # a method that alternates sends one thing and then the other
ADVICE = {"use": "Use it when", "avoid": "Not when"}  # how the lines begin that say so in a method's file
HOOKS = ("receive", "trains", "penalty", "send", "keep", "combine", "combine_all")


def reference(kind: type[Method]) -> Method:
    """The method with the adapter that stands for a LoRA of the reference rank."""
    _, _, rank = REFERENCE
    lora = LoRA(rank=rank)
    return kind(adapter=lora if issubclass(LoRA, kind.adapters) else kind.adapters[0].like(lora))


def traffic(kind: type[Method]) -> dict[str, float]:
    """Bytes a client, a round and an adapted weight of the reference size, each way, as the plan of a run counts them.

    A download brings the result of the round before, so there is one round more of downloads than of uploads.
    """
    m, n, _ = REFERENCE
    method = reference(kind)
    layer, row = method.adapter.init(m, n, 0), torch.zeros(1, dtype=torch.int64)
    federation = Federation(
        {"weight": method}, method, cast(Any, None), cast(Any, None), None, Clients(count=CLIENTS),
        [Shard(row, row)] * CLIENTS, [method.adapter.budget] * CLIENTS, Training(), Evaluation(), ServerOptimizer(),
        ROUNDS + 1, 0,
    )  # fmt: skip
    rows = play(federation, Group("weight", layer, 1)).rows
    turns = ROUNDS * CLIENTS
    return {
        "up": sum(row.bytes for row in rows if row.direction == "up" and row.round < ROUNDS) / turns,
        "down": sum(row.bytes for row in rows if row.direction == "down") / turns,
    }


def parse_docstring(doc: str) -> dict[str, str]:
    """Parse a method's module docstring: idea, source, when to use it and when not; "" for a part that is missing.

    The first line is ``TITLE: idea.``; a line that opens with ``Use it when`` or ``Not when`` begins the advice.
    """
    found = dict.fromkeys(("idea", "reference", *ADVICE), "")
    first, _, rest = doc.partition("\n")
    found["idea"], at = first.partition(": ")[2].rstrip("."), "reference"
    for line in filter(None, map(str.strip, rest.splitlines())):
        opened = next((key for key, words in ADVICE.items() if line.startswith(words)), None)
        at, line = (opened, line.removeprefix(ADVICE[opened]).strip()) if opened else (at, line)
        found[at] = f"{found[at]} {line}".strip()
    return found


def entry(name: str) -> dict[str, Any]:
    """One method as a JSON-able record."""
    kind = METHODS.load(name)
    parsed = parse_docstring(inspect.getdoc(sys.modules[kind.__module__]) or "")
    return {
        "name": name,
        "title": kind.title or kind.__name__,
        **{key: parsed[key].replace("``", "") for key in ("idea", "reference", *ADVICE)},
        "equation": inspect.getdoc(kind) or "",
        "claims": {
            "exact": bool(kind.exact)
            if not isinstance(inspect.getattr_static(kind, "exact"), property)
            else kind().exact,
            "lossy": kind.lossy,
            "any_rank": kind.any_rank,
            "personal": kind.personal,
            "secure_aggregation": kind.sums,
        },
        "privacy": covered(kind),
        "adapters": [adapter.__name__ for adapter in kind.adapters],
        "changes": [hook for hook in HOOKS if hook in vars(kind)],
        "settings": settings(kind),
        "bytes": traffic(kind),
        "bytes_of": "a client, a round and a weight of {} x {} at LoRA rank {}, float32".format(*REFERENCE),
    }


def covered(kind: type[Method]) -> str:
    """What ``[privacy]`` can cover of a method and how, found by letting its hooks send and keep once."""
    method = reference(kind)
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


def settings(kind: type[Method]) -> dict[str, Any]:
    """What ``[method]`` may set for it, with the defaults."""
    own = [f for f in fields(kind) if f.name != "adapter"]
    return {f.name: None if f.default is MISSING else f.default for f in own}


def entries() -> list[dict[str, Any]]:
    """All methods that can be loaded."""
    return [entry(name) for name in METHODS.classes()]
