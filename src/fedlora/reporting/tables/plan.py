"""What a run will take, as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedlora.reporting.terminal import DASH, stdout
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
    "folds": "what folding keeps beside the weights",
    "uploads": "a round's uploads, on the server",
    "combining": "combining them",
    "client": "a client in all",
    "server": "the server in all",
    "one_process": "all in one process (fedlora run)",
}


def plan(found: Mapping[str, Any]) -> None:
    """One method's plan, in full."""
    console = stdout()
    console.print(_sizes(found))
    if "privacy" in found:
        console.print(_listed("Privacy of the whole run", Privacy.describe(found["privacy"])))
    console.print(_traffic(found["bytes"]))
    console.print(_listed("Memory (estimate), MB", ((name, _mb(found["memory"][key])) for key, name in MEMORY.items())))
    console.print(
        _listed(f"{found['title']} supports", ((n, _word(found["options"][k])) for k, n in ABILITIES.items()))
    )
    for said in found["estimates"]:
        console.print(said, markup=False)


def plans(found: Sequence[Mapping[str, Any]]) -> None:
    """A row a method, to compare them."""
    table = Table(title="What a run takes")
    table.add_column("method")
    for name in (
        "trainable", "MB up a client, round", "MB down", "MB up, run", "MB down, run", "MB client", "MB server",
        "TFLOP a client, round", "unequal ranks", "secure aggr.",
    ):  # fmt: skip
        table.add_column(name, justify="right", overflow="fold")
    for one in found:
        table.add_row(one["method"], *([one["problem"]] if "problem" in one else _cells(one)))
    console = stdout()
    console.print(table)
    console.print(
        "MB a client and round: a later round's mean. Memory is an estimate; bytes are exact unless marked (≤)."
    )


def _cells(one: Mapping[str, Any]) -> list[str]:
    each, run, memory = one["bytes"]["client"], one["bytes"]["run"], one["memory"]
    most = "" if one["bytes"]["exact"] else "≤ "
    later = "later_rounds" if one["rows"]["rounds"] > 1 else "first_round"
    return [
        f"{one['numbers']['trainable']:,}",
        *(most + _mb(each[d][later]["mean"]) for d in ("up", "down")),
        *(most + _mb(sum(run[d].values())) for d in ("up", "down")),
        _mb(memory["client"]), _mb(memory["server"]), f"{one['flops']['training'] / 1e12:.3f}",
        _word(one["options"]["any_rank"]), _word(one["options"]["secure_aggregation"]),
    ]  # fmt: skip


def _sizes(found: Mapping[str, Any]) -> Table:
    numbers, rows, flops = found["numbers"], found["rows"], found["flops"]
    lines = [
        ("trainable numbers", f"{numbers['trainable']:,} ({100 * numbers['share']:.3g} % of the model)"),
        ("of these adapter, head", f"{numbers['adapter']:,}, {numbers['head']:,}"),
        ("weights adapted", f"{numbers['weights_adapted']} at rank {_spread(numbers['ranks'])}"),
        ("clients, of these a round", f"{rows['clients']}, {rows['cohort']}"),
        ("rounds", str(rows["rounds"])),
        ("training rows a client", _spread(rows["train"])),
        ("test rows a client", _spread(rows["test"])),
        ("steps a client and round", _spread(rows["steps"])),
        ("passes over a client's rows, whole run", DASH if rows["passes"] is None else f"{rows['passes']:.2f}"),
        ("TFLOP a client and round, training", f"{flops['training'] / 1e12:.4f}"),
        ("TFLOP a client, evaluation", f"{flops['evaluation'] / 1e12:.4f}"),
        ("TFLOP, whole run", f"{flops['run'] / 1e12:.4f}"),
    ]
    return _listed(f"{found['title'] or found['method']}: before anything is spent", lines)


def _traffic(sizes: Mapping[str, Any]) -> Table:
    exact = "" if sizes["exact"] else ", at most"
    table = Table(title=f"Traffic{exact}, MB")
    for name in ("direction", "kind", "a client, first round", "a client, later rounds", "whole run, all clients"):
        table.add_column(name, justify="left" if name in ("direction", "kind") else "right")
    for direction in ("up", "down"):
        each = sizes["client"][direction]
        for kind, size in sizes["run"][direction].items():
            later = (_mb(each[when].get(kind, 0.0)) for when in ("first_round", "later_rounds"))
            table.add_row(direction, kind, *later, _mb(size))
    return table


def _listed(title: str, rows: Any) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _spread(values: Any) -> str:
    if values is None:
        return DASH
    several = values if isinstance(values, list) else [values]
    low, high = min(several), max(several)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _word(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.3f}" if size < 1e8 else f"{size / 1e6:,.0f}"
