"""Tables of one run: its final figures, and its rounds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedlora.engines.record import RoundRecord
from fedlora.runs.attendance import describe_scored_clients, fault_lines
from fedlora.runs.record import DIRECTIONS
from fedlora.runs.table import Column, Table, from_pairs, mean_std
from fedlora.security.privacy import Privacy

ERRORS = {
    "served": "aggregation error, served",
    "fedit": "aggregation error, FedIT's on the same uploads",
    "best": "aggregation error, best of this rank",
    "drift": "client drift",
    "concentration": "concentration of the mix on one client",
}


def tabulate_summary(found: Mapping[str, Any], records: Sequence[RoundRecord] = ()) -> list[Table]:
    """Build the tables of a run's ``summary.json`` and, if any, of its records."""
    title = f"{found['title'] or found['method']}, {found['rounds']} rounds, seed {found['seed']}"
    tables = [from_pairs(title, _list_figures(found))]
    return [*tables, tabulate_rounds(records, found["metric"]["name"])] if records else tables


def _list_figures(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    final, metric = found.get("final", {}), found["metric"]["name"]
    for name, value in final.get("global", {}).items():
        if name == metric or name != "loss":
            yield f"global {name.replace('_', ' ')}", f"{value:.4f}"
    if "clients" in final:
        yield from _list_clients(found, metric)
    if "attack" in final:
        yield "attack's success", f"{final['attack']['success']:.4f}"
    yield from fault_lines(found)
    if "privacy" in found:
        yield from Privacy.describe(found["privacy"])
    for direction in ("up", "down"):
        for kind, size in found["bytes"][direction].items():
            yield f"MB {direction}, {kind}", f"{size / 1e6:.3f}"
    for name, value in found["errors"].items():
        yield ERRORS.get(name, name), f"{value:.4f}"
    for name in ("train", "evaluate", "total"):
        if name in found["seconds"]:
            yield f"seconds, {name}", f"{found['seconds'][name]:.1f}"


def _list_clients(found: Mapping[str, Any], metric: str) -> Iterator[tuple[str, str]]:
    """List the figures of the clients' own models."""
    clients, last, name = found["final"]["clients"], found["last_rounds"], metric.replace("_", " ")
    over = describe_scored_clients(found)
    yield f"clients' own {name}, mean over {over}", f"{clients['mean']:.4f}"
    yield f"clients' own {name}, over all their rows", f"{clients['examples_mean']:.4f}"
    for other, value in clients.get("figures", {}).items():
        if other not in (metric, "loss"):
            yield f"clients' own {other.replace('_', ' ')}, mean over {over}", f"{value:.4f}"
    yield f"worst client (number {clients['worst_client']})", f"{clients['worst']:.4f}"
    yield f"spread over {over}", f"{clients['spread']:.4f}"
    for group in clients.get("capability", ()):
        who = f"capability {group['capability']:g}, {group['clients']} clients: mean, worst"
        yield who, f"{group['mean']:.4f}, {group['worst']:.4f}"
    least, of = last.get("fewest"), found.get("scored", {}).get("of")
    few = "" if least in (None, of) else f", of at least {least} of {of} clients"
    yield f"clients' own {name}, last {last['rounds']} evaluated rounds{few}", f"{last['clients']:.4f}"


def tabulate_rounds(records: Sequence[RoundRecord], metric: str) -> Table:
    """Build the table of mean loss, scores and bytes by round."""
    rows = []
    for record in records:
        loss, clients = mean_std(record["loss"].values()), record.get("clients", {})
        row = {"round": record["round"], "loss": None if loss is None else loss.mean}
        row |= {"global": record.get("global", {}).get(metric), "clients": clients.get("mean")}
        row |= {d: sum(record["bytes"][d].values()) / 1e6 for d in DIRECTIONS}
        rows.append({**row, "worst": clients.get("worst")})
    columns = (Column("round", "round", 0), Column("loss", "loss", 4), Column("global", "global", 4),
               Column("clients", "clients' own", 4), Column("worst", "worst", 4), Column("up", "MB up", 3),
               Column("down", "MB down", 3))  # fmt: skip
    return Table("rounds", f"Rounds ({metric.replace('_', ' ')})", columns, rows)
