"""Tables of one run: its final figures, its rounds, and the models of ``fedlora personal``."""

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
SIDES = {
    "global": "global",
    "held": "what it holds",
    "tuned": "after {steps} steps of its own",
    "local": "alone",
    "centralised": "centralised",
}
MEANS = {"mean": "mean over clients", "examples_mean": "over all their rows", "worst": "worst client"}


def tabulate_summary(result: Mapping[str, Any], records: Sequence[RoundRecord] = ()) -> list[Table]:
    """Build the tables of a run's ``summary.json`` and, if any, of its records."""
    title = f"{result['title'] or result['method']}, {result['rounds']} rounds, seed {result['seed']}"
    tables = [from_pairs(title, _list_figures(result))]
    return [*tables, tabulate_rounds(records, result["metric"]["name"])] if records else tables


def _list_figures(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    final, metric = result.get("final", {}), result["metric"]["name"]
    for name, value in final.get("global", {}).items():
        if name == metric or name != "loss":
            yield f"global {name.replace('_', ' ')}", f"{value:.4f}"
    if "clients" in final:
        yield from _list_clients(result, metric)
    if "attack" in final:
        yield "attack's success", f"{final['attack']['success']:.4f}"
    yield from fault_lines(result)
    if "privacy" in result:
        yield from Privacy.describe(result["privacy"])
    for direction in ("up", "down"):
        for kind, size in result["bytes"][direction].items():
            yield f"MB {direction}, {kind}", f"{size / 1e6:.3f}"
    for name, value in result["errors"].items():
        yield ERRORS.get(name, name), f"{value:.4f}"
    for name in ("train", "evaluate", "total"):
        if name in result["seconds"]:
            yield f"seconds, {name}", f"{result['seconds'][name]:.1f}"


def _list_clients(result: Mapping[str, Any], metric: str) -> Iterator[tuple[str, str]]:
    """List the figures of the clients' own models."""
    clients, last, name = result["final"]["clients"], result["last_rounds"], metric.replace("_", " ")
    over = describe_scored_clients(result)
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
    least, of = last.get("fewest"), result.get("scored", {}).get("of")
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


def tabulate_personal(result: Mapping[str, Any]) -> list[Table]:
    """Build the tables of means, the worst and each client; and those of the clients that never took part."""
    name = result["metric"]["name"].replace("_", " ").capitalize()
    titles = {"columns": f"{name} on the clients' own test rows, {result['title']}",
              "new": f"{name} of clients that never took part"}  # fmt: skip
    return [_tabulate_side_by_side(result[key], title, result["steps"]) for key, title in titles.items() if result[key]]


def _tabulate_side_by_side(columns: Mapping[str, Any], title: str, steps: int) -> Table:
    scored = {name: column for name, column in columns.items() if column is not None}
    rows = [{"client": what, **{name: one[key] for name, one in scored.items()}} for key, what in MEANS.items()]
    clients = [k for k, value in enumerate(next(iter(scored.values()))["each"]) if value is not None]
    rows += [{"client": str(k), **{name: one["each"][k] for name, one in scored.items()}} for k in clients]
    figures = (Column(name, SIDES[name].format(steps=steps), 4) for name in columns)
    return Table("personal", title, (Column("client", "client"), *figures), rows, rules=frozenset({len(MEANS)}))
