"""Tables on stdout."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlora.reporting.console import Plain, printed, stdout
from fedlora.reporting.tables.paired import ranking
from fedlora.runs import attendance
from fedlora.security.privacy import Privacy

__all__ = ["DASH", "Plain", "printed", "stdout"]
DASH = "–"
FEWER = " *"  # after a figure that is not over all clients


def comparison(rows: Sequence[Mapping[str, Any]]) -> None:
    """A row a method: mean ± standard deviation over seeds."""
    name = next((row["metric"]["name"] for row in rows if row["metric"]), "accuracy")
    spread = ", mean ± standard deviation over seeds" if _seeds(rows) > 1 else ""
    table = Table(title=f"{name.replace('_', ' ').capitalize()} in the final round{spread}")
    table.add_column("method")
    for name in ("global", "clients' own", "worst client", "MB up", "MB down", "aggregation error", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        mark = FEWER if row.get("over") else ""
        cells = [_pm(row["global"], 3), _pm(row["clients"], 3) + mark, _pm(row["worst"], 3) + mark]
        cells += [
            _pm(row["mb_up"], 2, False),
            _pm(row["mb_down"], 2, False),
            _pm(row["error"], 4),
            _pm(row["seconds"], 0, False),
        ]
        name = row["method"] if not row["diverged"] else f"{row['method']} ({row['diverged']} diverged)"
        table.add_row(name, *cells)
    console = stdout()
    console.print(table)
    if any("capability" in row for row in rows):
        console.print(_by_capability(rows))
    console.print(
        "global: the shared model on the global test rows. clients' own: what each client holds on its own test rows,\n"
        "mean over clients. aggregation error: served against the exact mean, relative, mean over weights and rounds."
    )
    for row in rows:
        if row.get("over"):
            console.print(f"{row['method']}{FEWER}: clients' own over {', '.join(row['over'])}", soft_wrap=True)
        for who in row.get("missing", ()):
            console.print(f"{row['method']}: {who}", soft_wrap=True)
    if rows:
        console.print(reading(rows))


def _by_capability(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The clients' own models, in groups by what the clients can do."""
    levels = sorted({group["capability"] for row in rows for group in row.get("capability", ())})
    table = Table(title="Clients' own models by the clients' capability: mean (worst)")
    table.add_column("method")
    for level in levels:
        table.add_column(f"{level:g}", justify="right")
    for row in rows:
        found = {group["capability"]: group for group in row.get("capability", ())}
        cells = [f"{_pm(g['mean'], 3)} ({_pm(g['worst'], 3)})" if (g := found.get(k)) else DASH for k in levels]
        table.add_row(row["method"], *cells)
    return table


def reading(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the table comes to, in a sentence or two."""
    said = [text for key, what in MODELS.items() if (text := _ahead(rows, key, what))]
    sent = {row["method"]: row["mb_up"]["mean"] + row["mb_down"]["mean"] for row in rows if row["mb_up"]}
    if sent := {name: size for name, size in sent.items() if size > 0}:
        least = min(sent.values())
        names = [name for name, size in sent.items() if size == least]
        said.append(f"{' and '.join(names)} {'sends' if len(names) == 1 else 'send'} least ({least:.2f} MB)")
    seeds = "one seed: differences of a point or two may be chance" if _seeds(rows) == 1 else f"{_seeds(rows)} seeds"
    return "; ".join(said) + f" ({seeds})."


MODELS = {"global": "shared model", "clients": "clients' own models"}


def _ahead(rows: Sequence[Mapping[str, Any]], key: str, what: str) -> str | None:
    """Which method is the best, where the paired test says so; else who is level with the one ahead."""
    there = [row for row in rows if row[key]]
    found = ranking({row["method"]: row.get("by_seed", {}).get(key) or {0: row[key]["mean"]} for row in there},
                    bool(there) and there[0]["metric"]["higher"])  # fmt: skip
    if found is None:
        return None if not there else f"{what}: {there[0][key]['mean']:.3f} ({there[0]['method']})"
    verb = "best with" if not found.level else "no winner, ahead by the mean is"
    return f"{what}: {verb} {found.first} ({found.mean:.3f}; {found.said})"


def _seeds(rows: Sequence[Mapping[str, Any]]) -> int:
    return max((len(row["seeds"]) for row in rows), default=0)


def _pm(value: Mapping[str, float] | None, digits: int, spread: bool = True) -> str:
    if value is None:
        return DASH
    text = f"{value['mean']:.{digits}f}"
    return f"{text} ± {value['std']:.{digits}f}" if spread and value["std"] else text


def oracle(rows: Sequence[Mapping[str, Any]], uploads: Mapping[str, float]) -> None:
    """What each method would have served of one run's uploads."""
    table = Table(title="The same uploads under every method: served against the exact mean, relative")
    for name in ("method", "error, mean", "first round", "last round", "factors moved"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in sorted(rows, key=lambda row: row["error"]):
        table.add_row(row["method"], *(_share(row[key]) for key in ("error", "first", "last", "gauge")))
    console = stdout()
    console.print(table)
    console.print("factors moved: how far the served A and B lie from the clients' means, relative to these.")
    angles = "; ".join(f"{name} {value:.0f} degrees" for name, value in uploads.items() if name != "tail")
    between = f"; between clients, {angles}" if angles else ""
    console.print(f"of the uploads: {uploads['tail']:.1e} of the energy lies beyond the rank{between}.")


def aggregation(found: Mapping[str, Any]) -> None:
    """What combining finished adapters came to."""
    count = found["adapters"]
    table = Table(title=f"{count} adapter{'' if count == 1 else 's'} combined", show_header=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_row("weights", str(len(found["weights"])))
    table.add_row("ranks", ", ".join(map(str, found["ranks"])))
    table.add_row("error against the exact mean", _share(found["error"]))
    table.add_row("the same, of the averaged factors", _share(found["error_fedit"]))
    worst = max(found["weights"], key=lambda part: found["weights"][part]["served"])
    table.add_row(f"largest error, at {worst}", _share(found["weights"][worst]["served"]))
    table.add_row("folder", found["folder"])
    stdout().print(table)


def exports(found: Sequence[Mapping[str, Any]]) -> None:
    """What was written, and how far it is from the run's own model."""
    table = Table(title="Exported, loaded again and compared")
    for name in ("folder", "client", "ranks", "cut off", "largest difference of logits"):
        table.add_column(name)
    for row in found:
        ranks = ", ".join(map(str, row["ranks"]))
        client = "shared" if row["client"] is None else str(row["client"])
        table.add_row(row["folder"], client, ranks, _share(row["error"]), _share(row["difference"]))
    stdout().print(table)


def similarity(weights: Mapping[str, Mapping[str, float]], mean: Mapping[str, float]) -> None:
    """How alike the clients' factors are."""
    table = Table(title="Likeness of the clients' factors, mean over pairs of clients")
    table.add_column("weight")
    for name in mean:
        table.add_column(f"{name}, degrees" if name.endswith("angle") else name, justify="right")
    for part, row in [*weights.items(), ("mean", mean)]:
        digits = {name: 1 if name.endswith("angle") else 3 for name in mean}
        table.add_row(part, *(f"{row[name]:.{digits[name]}f}" for name in mean))
    console = stdout()
    console.print(table)
    console.print(
        "A, B: cosine of the factors as they are. A change: cosine of what training added to the common start."
    )


def grades(found: Mapping[str, Any]) -> None:
    """What a file of programs came to."""
    table = Table(title=f"{found['answers']} answers to {found['problems']} problems", show_header=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in found["figures"].items():
        table.add_row(name, f"{value:.4f}")
    table.add_row("answers that pass", str(found["passed"]))
    if found["missing"]:
        table.add_row("problems without an answer, counted as wrong", str(found["missing"]))
    table.add_row("verdicts", found["verdicts"])
    stdout().print(table)


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.2e}"


def summary(found: Mapping[str, Any], folder: str, records: Sequence[Mapping[str, Any]] = ()) -> None:
    """What one run came to."""
    table = Table(
        title=f"{found['title'] or found['method']}, {found['rounds']} rounds, seed {found['seed']}", show_header=False
    )
    table.add_column("what")
    table.add_column("figure", justify="right")
    final = found.get("final", {})
    metric = found["metric"]["name"]
    name = metric.replace("_", " ")
    for other, value in final.get("global", {}).items():
        if other == metric or other != "loss":
            table.add_row(f"global {other.replace('_', ' ')}", f"{value:.4f}")
    if "clients" in final:
        clients = final["clients"]
        who = attendance.over(found)
        table.add_row(f"clients' own {name}, mean over {who}", f"{clients['mean']:.4f}")
        table.add_row(f"clients' own {name}, over all their rows", f"{clients['examples_mean']:.4f}")
        for other, value in clients.get("figures", {}).items():
            if other not in (metric, "loss"):
                table.add_row(f"clients' own {other.replace('_', ' ')}, mean over {who}", f"{value:.4f}")
        table.add_row(f"worst client (number {clients['worst_client']})", f"{clients['worst']:.4f}")
        table.add_row(f"spread over {who}", f"{clients['spread']:.4f}")
        for group in clients.get("capability", ()):
            who = f"capability {group['capability']:g}, {group['clients']} clients: mean, worst"
            table.add_row(who, f"{group['mean']:.4f}, {group['worst']:.4f}")
        last = found["last_rounds"]
        few = attendance.fewest(found)
        table.add_row(f"clients' own {name}, last {last['rounds']} evaluated rounds{few}", f"{last['clients']:.4f}")
    if "attack" in final:
        table.add_row("attack's success", f"{final['attack']['success']:.4f}")
    for line in attendance.lines(found):
        table.add_row(*line)
    for name, value in Privacy.describe(found["privacy"]) if "privacy" in found else ():
        table.add_row(name, value)
    for direction in ("up", "down"):
        for kind, size in found["bytes"][direction].items():
            table.add_row(f"MB {direction}, {kind}", f"{size / 1e6:.3f}")
    for name, value in found["errors"].items():
        table.add_row(ERRORS.get(name, name), f"{value:.4f}")
    for name in ("train", "evaluate", "total"):
        if name in found["seconds"]:
            table.add_row(f"seconds, {name}", f"{found['seconds'][name]:.1f}")
    console = stdout()
    console.print(table)
    if records:
        _rounds(console, records, metric)
    for note in found.get("notes", ()) if records else ():  # of a run that has just ended they were said before
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"Folder: {folder}")


ERRORS = {
    "served": "aggregation error, served",
    "fedit": "aggregation error, FedIT's on the same uploads",
    "best": "aggregation error, best of this rank",
    "drift": "client drift",
    "concentration": "concentration of the mix on one client",
}


def _rounds(console: Console, records: Sequence[Mapping[str, Any]], metric: str) -> None:
    table = Table(title=f"Rounds ({metric.replace('_', ' ')})")
    for name in ("round", "loss", "global", "clients' own", "worst", "MB up", "MB down"):
        table.add_column(name, justify="right")
    for record in records:
        losses = list(record["loss"].values())
        clients = record.get("clients", {})
        table.add_row(
            str(record["round"]), f"{sum(losses) / len(losses):.4f}" if losses else DASH,
            _number(record.get("global", {}).get(metric)),
            *(_number(clients.get(key)) for key in ("mean", "worst")),
            *(f"{sum(record['bytes'][d].values()) / 1e6:.3f}" for d in ("up", "down")),
        )  # fmt: skip
    console.print(table)


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def methods(found: Sequence[Mapping[str, Any]]) -> None:
    """All methods, with claims and bytes."""
    table = Table(title=f"Bytes: {found[0]['bytes_of']}" if found else "No methods")
    for name in ("name", "idea"):
        table.add_column(name, overflow="fold")
    for name in ("exact", "any rank", "personal", "secure aggr."):
        table.add_column(name, justify="center")
    for name in ("up", "down"):
        table.add_column(name, justify="right")
    for one in found:
        claims = [
            "yes" if one["claims"][key] else DASH for key in ("exact", "any_rank", "personal", "secure_aggregation")
        ]
        table.add_row(one["name"], one["idea"], *claims, *(f"{one['bytes'][d]:,.0f}" for d in ("up", "down")))
    stdout().print(table)


def method(one: Mapping[str, Any]) -> None:
    """The page of one method."""
    console = stdout()
    claims = [key.replace("_", " ") for key, value in one["claims"].items() if value] or ["none"]
    console.print(f"{one['title']} ({one['name']}): {one['idea']}.\n\n{one['equation']}\n", markup=False)
    advice = [f"{words} {one[key]}" for words, key in (("Use it when", "use"), ("Not when", "avoid")) if one[key]]
    console.print(f"Paper: {one['reference']}", *advice, sep="\n", markup=False)
    console.print(f"Changes from FedIT: {', '.join(one['changes']) or 'nothing'}", markup=False)
    console.print(f"Claims: {', '.join(claims)}", markup=False)
    console.print(f"Adapters: {', '.join(one['adapters'])}", markup=False)
    console.print(f"Privacy: {one['privacy']}", markup=False)
    console.print(
        f"Settings of [method]: {', '.join(f'{k} = {v!r}' for k, v in one['settings'].items())}", markup=False
    )
    console.print(
        f"Bytes up {one['bytes']['up']:,.0f}, down {one['bytes']['down']:,.0f} ({one['bytes_of']})", markup=False
    )
