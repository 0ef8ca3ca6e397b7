"""Tables of a plan: the costs of a run before it begins."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.runs.table import DASH, Column, Table, from_pairs
from fedlora.security.privacy import Privacy

ABILITIES = {
    "exact": "a round ends at the exact mean",
    "any_rank": "clients of unequal ranks",
    "secure_aggregation": "secure aggregation",
    "server_optimizer": "server optimiser",
    "quantised_base": "quantised base",
    "partial_participation": "some clients a round",
    "result": "result",
    "head": "parts trained in full",
    "weighting": "clients weighted by",
}
MEMORY = {
    "weights": "frozen weights",
    "leaves": "adapter and head",
    "gradients": "gradients",
    "moments": "optimiser's moments",
    "activations": "activations kept for the backward pass",
    "training_peak": "training beside weights and leaves, at most",
    "evaluation_peak": "evaluation beside weights and leaves, at most",
    "base_updates": "what folding keeps beside the weights",
    "uploads": "a round's uploads, on the server",
    "combining": "combining them",
    "client": "a client in all",
    "server": "the server in all",
    "one_process": "all in one process (fedlora run)",
}


def tabulate_plan(result: Mapping[str, Any]) -> list[Table | str]:
    """Build the tables of one method's plan."""
    privacy = Privacy.describe(result["privacy"]) if "privacy" in result else []
    memory = ((name, _format_mb(result["memory"][key])) for key, name in MEMORY.items())
    abilities = ((name, _format_value(result["options"][key])) for key, name in ABILITIES.items())
    return [
        _tabulate_sizes(result),
        *([from_pairs("Privacy of the whole run", privacy)] if privacy else []),
        _tabulate_traffic(result["bytes"]),
        from_pairs("Memory (estimate), MB", memory),
        from_pairs(f"{result['title']} supports", abilities),
        *result["estimates"],
    ]


def tabulate_plans(result: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    """Build the table that compares the plans of several methods."""
    titles = (
        "trainable", "MB up a client, round", "MB down", "MB up, run", "MB down, run", "MB client", "MB server",
        "TFLOP a client, round", "unequal ranks", "secure aggr.",
    )  # fmt: skip
    rows = []
    for one in result:
        cells = [one["problem"], *[""] * (len(titles) - 1)] if "problem" in one else _cells(one)
        rows.append({"method": one["method"], **dict(zip(titles, cells))})
    columns = (Column("method", "method"), *(Column(title, title, align="right") for title in titles))
    note = "MB a client and round: a later round's mean. Memory is an estimate; bytes are exact unless marked (≤)."
    return [Table("plans", "What a run takes", columns, rows), note]


def _cells(one: Mapping[str, Any]) -> list[str]:
    each, run, memory = one["bytes"]["client"], one["bytes"]["run"], one["memory"]
    most = "" if one["bytes"]["exact"] else "≤ "
    later = "later_rounds" if one["rows"]["rounds"] > 1 else "first_round"
    return [
        f"{one['numbers']['trainable']:,}",
        *(most + _format_mb(each[d][later]["mean"]) for d in ("up", "down")),
        *(most + _format_mb(sum(run[d].values())) for d in ("up", "down")),
        _format_mb(memory["client"]), _format_mb(memory["server"]), f"{one['flops']['training'] / 1e12:.3f}",
        _format_value(one["options"]["any_rank"]), _format_value(one["options"]["secure_aggregation"]),
    ]  # fmt: skip


def _tabulate_sizes(result: Mapping[str, Any]) -> Table:
    numbers, rows, flops = result["numbers"], result["rows"], result["flops"]
    lines = [
        ("trainable numbers", f"{numbers['trainable']:,} ({100 * numbers['share']:.3g} % of the model)"),
        ("of these adapter, head", f"{numbers['adapter']:,}, {numbers['head']:,}"),
        ("weights adapted", f"{numbers['weights_adapted']} at rank {_format_range(numbers['ranks'])}"),
        ("clients, of these a round", f"{rows['clients']}, {rows['cohort']}"),
        ("rounds", str(rows["rounds"])),
        ("training rows a client", _format_range(rows["train"])),
        ("test rows a client", _format_range(rows["test"])),
        ("steps a client and round", _format_range(rows["steps"])),
        ("passes over a client's rows, whole run", DASH if rows["passes"] is None else f"{rows['passes']:.2f}"),
        ("TFLOP a client and round, training", f"{flops['training'] / 1e12:.4f}"),
        ("TFLOP a client, evaluation", f"{flops['evaluation'] / 1e12:.4f}"),
        ("TFLOP, whole run", f"{flops['run'] / 1e12:.4f}"),
    ]
    return from_pairs(f"{result['title'] or result['method']}: before anything is spent", lines)


def _tabulate_traffic(sizes: Mapping[str, Any]) -> Table:
    rows = []
    for direction in ("up", "down"):
        each = sizes["client"][direction]
        for kind, size in sizes["run"][direction].items():
            first, later = (_format_mb(each[when].get(kind, 0.0)) for when in ("first_round", "later_rounds"))
            rows.append({"direction": direction, "kind": kind, "first": first, "later": later, "run": _format_mb(size)})
    columns = (Column("direction", "direction"), Column("kind", "kind"),
               Column("first", "a client, first round", align="right"),
               Column("later", "a client, later rounds", align="right"),
               Column("run", "whole run, all clients", align="right"))  # fmt: skip
    return Table("traffic", f"Traffic{'' if sizes['exact'] else ', at most'}, MB", columns, rows)


def _format_range(values: Any) -> str:
    if values is None:
        return DASH
    listed = values if isinstance(values, list) else [values]
    low, high = min(listed), max(listed)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _format_value(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _format_mb(size: float) -> str:
    return f"{size / 1e6:,.3f}" if size < 1e8 else f"{size / 1e6:,.0f}"
