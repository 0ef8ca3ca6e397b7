"""The same federation under several methods and seeds: same data, splits, initial weights and budgets."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedlora import methods
from fedlora.adapters import KINDS, Adapter, LoRA
from fedlora.engines.loop import Event, Watch
from fedlora.export.aggregate import applicable, method_for
from fedlora.files import save_json
from fedlora.methods._base import Method
from fedlora.registry import nearest
from fedlora.runs import attendance
from fedlora.runs.config import Config, ConfigError, Table, build, construct, merged
from fedlora.runs.counterfactual import asked
from fedlora.runs.result import Compared
from fedlora.runs.run import CONFIG, SUMMARY, check_same, finished, run
from fedlora.text import plain_name

CENTRALISED = "centralised"
Done = Callable[["Cell"], None]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    label: str
    seed: int
    table: Table
    folder: str | None
    summary: Mapping[str, Any] | None = None  # None: not run yet, or it diverged
    failure: str | None = None


def plan(table: Table, labels: Sequence[str], seeds: Sequence[int], out: Path | None) -> list[Cell]:
    """Every run of the comparison, each configuration checked before the first begins."""
    cells = []
    for label in labels:
        for seed in seeds:
            own = {**for_label({**table, "seed": seed}, label), "seed": seed}  # a draw from it decides some budgets
            build(own)
            folder = None if out is None else str(out / f"{label.replace(':', '-')}-seed{seed}")
            cells.append(Cell(label, seed, own, folder))
    return cells


def for_label(table: Table, label: str) -> Table:
    """The table under another method; its ``[compare.LABEL]`` table is laid over, for tuned settings of its own.

    ``label`` is a method's name; or a name of one's own, whose ``[compare.LABEL]`` table says ``method.name``; or
    ``centralised``: one client with all the data and the cohort's steps.
    Where the method is not defined for the run's adapter, it gets one of its own kind with as many numbers.
    """
    plain_name(label, "a compared run")
    every = table.get("compare", {})
    base = {key: value for key, value in table.items() if key != "compare"}
    if label == CENTRALISED:
        return merged(_centralised(base), every.get(label, {}))
    name = _method_of(label, every)
    own = _fitted(base, name)
    if table.get("method", {}).get("name") == name and own.get("adapter") == base.get("adapter"):
        own["method"] = table["method"]
    return merged(own, every.get(label, {}))


def _fitted(table: Table, method: str) -> Table:
    """The table under a method with its defaults, and with an adapter that the method is defined for."""
    kind, given = methods.load(method), table.get("adapter", {"name": "lora"})
    equal = {"weighting": "uniform"} if _by_client(table) else {}
    own, name = {**table, "method": {"name": method, **equal}}, given.get("name", "lora")
    if name in KINDS and not issubclass(KINDS[name], kind.adapters):
        adapter = construct(KINDS[name], "adapter", {k: v for k, v in given.items() if k != "name"})
        own["adapter"] = _as_table(kind.adapters[0].like(adapter))
    return own


def _method_of(label: str, every: Mapping[str, Any]) -> str:
    """The method's name behind a label."""
    if label in methods.names() or label not in every:
        return label
    found = every[label].get("method", {}).get("name") if isinstance(every[label], Mapping) else None
    if not isinstance(found, str) and not every[label]:
        return label  # which the list of methods is asked for
    if not isinstance(found, str):
        near = nearest(label, methods.names())
        hint = f"; did you mean {near!r}? If not," if near else ";"
        raise ConfigError(f"[compare.{label}] is no method's name, and says none{hint} give it method.name.")
    return found


def _as_table(adapter: Adapter) -> Table:
    name = next(key for key, value in KINDS.items() if type(adapter) is value)
    return {"name": name, **{k: v for k, v in asdict(adapter).items() if v is not None}}


def _centralised(table: Table) -> Table:
    config = build(table)
    steps = {} if config.training.local_epochs else {"local_steps": _cohort_steps(config)}
    gone = ("clients", "method", *(["privacy"] if _by_client(table) else []))  # one client is hidden among no others
    own = {key: value for key, value in table.items() if key not in gone}
    return merged({**_fitted(own, "fedit"), "clients": {"count": 1}}, {"training": steps})


def _by_client(table: Table) -> bool:
    """Whether the guarantee is about whole clients, whose weights must then be equal."""
    return bool(table.get("privacy", {}).get("level") == "client")


def _cohort_steps(config: Config) -> int:
    """Optimiser steps that a round's cohort does together, in the mean over the rounds."""
    clients, usual, seed = config.clients, config.training.steps(1), config.seed
    done = sum(clients.steps(usual, r, k, seed) for r in range(config.rounds) for k in clients.staying(r, seed))
    return max(1, round(done / max(1, config.rounds)))


def compare(
    table: Table,
    labels: Sequence[str],
    seeds: Sequence[int] = (0,),
    out: str | Path | None = None,
    jobs: int = 1,
    watch: Callable[[Cell, Event], None] = lambda cell, event: None,
    done: Done = lambda cell: None,
) -> Compared:
    """Runs every cell, and writes ``comparison.json`` into ``out``. A method that diverges fills its row with that.

    Where ``out`` holds the beginning of this comparison, it goes on with it: runs that are finished stay, and a run
    that was broken off goes on from its checkpoint. ``ValueError`` where a run there is of another configuration, or
    the data have changed since.
    """
    if out is not None and (Path(out).expanduser() / "comparison.json").exists():
        raise ConfigError(f"{str(out)!r} holds a comparison already; choose another folder with --out.")
    folder = None if out is None else Path(out).expanduser()
    cells = plan(table, list(dict.fromkeys(labels)), list(dict.fromkeys(seeds)), folder)
    finished: dict[tuple[str, int], Cell] = {}
    for cell in executed(cells, jobs, watch):
        finished[cell.label, cell.seed] = cell
        done(cell)
    ordered = Compared(finished[key] for cell in cells if (key := (cell.label, cell.seed)) in finished)
    if folder is not None:
        save_json(folder / "comparison.json", {"rows": rows(ordered), "runs": [asdict(cell) for cell in ordered]})
    return ordered


def oracle(
    table: Table, labels: Sequence[str] | None = None, out: str | Path | None = None, watch: Watch = lambda event: None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One run as the table says, and what other methods would have served of its uploads, round by round.

    Returns a row a method (its errors and how far it moved the factors) and the means of ``tail`` and ``angles``.
    ``ConfigError`` names a method that combines no finished factors.
    """
    config = build({key: value for key, value in table.items() if key != "compare"})
    if config.privacy.hides_figures:
        raise ConfigError("the oracle looks at every upload, which [privacy] covers; set privacy.figures = true.")
    adapter = config.method.adapter
    if not isinstance(adapter, LoRA):
        raise ConfigError("the oracle compares what methods make of LoRA factors; set adapter.name to 'lora'.")
    others = {label: replace(_asked(table, label), adapter=adapter) for label in labels or applicable()}
    records = run(config, out, watch, lambda *round: asked(*round, others)).records
    found = [record["oracle"] for record in records]
    table_rows = [_oracle_row(label, found) for label in others if label in found[0]["methods"]]
    means = {"tail": statistics.fmean(x["tail"] for x in found)}
    means |= {f"angle {leaf}": statistics.fmean(x["angles"][leaf] for x in found) for leaf in found[0]["angles"]}
    if out is not None:
        save_json(Path(out).expanduser() / "oracle.json", {"rows": table_rows, "uploads": means})
    return table_rows, means


def _asked(table: Table, label: str) -> Method:
    """A method by its name with its defaults, or as ``[compare.LABEL]`` sets it."""
    found = method_for(_method_of(label, table.get("compare", {})))
    set_here = table.get("compare", {}).get(label, {}).get("method")
    return build(for_label(table, label)).method if set_here else found


def _oracle_row(label: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mine = [x["methods"][label] for x in found]
    errors = [x["error"] for x in mine]
    row = {"method": label, "error": statistics.fmean(errors), "first": errors[0], "last": errors[-1]}
    return {**row, "gauge": statistics.fmean(x["gauge"] for x in mine) if "gauge" in mine[0] else None}


def executed(cells: Sequence[Cell], jobs: int, watch: Callable[[Cell, Event], None]) -> Iterator[Cell]:
    """Each cell once it has run: one after the other here, or as they end where there are several jobs."""
    return _parallel(cells, jobs) if jobs > 1 else (execute(c, lambda e, c=c: watch(c, e)) for c in cells)


def execute(cell: Cell, watch: Callable[[Event], None] = lambda event: None, threads: int | None = None) -> Cell:
    """One run, in this process."""
    table = merged(cell.table, {"engine": {"threads": threads}} if threads else {})
    config: Config = build(table)
    folder = None if cell.folder is None else Path(cell.folder)
    begun = folder is not None and (folder / CONFIG).exists()
    if folder is not None and begun and finished(folder, config.rounds):
        check_same(config, folder)
        return Cell(cell.label, cell.seed, config.table, cell.folder, _summary(folder))
    try:
        result = run(config, cell.folder, watch, again=begun)
    except FloatingPointError as error:
        return Cell(cell.label, cell.seed, config.table, cell.folder, failure=str(error))
    if result.summary["interrupted"]:
        raise KeyboardInterrupt
    return Cell(cell.label, cell.seed, config.table, cell.folder, result.summary)


def _summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / SUMMARY).read_text(encoding="utf-8")))


def _parallel(cells: Sequence[Cell], jobs: int) -> Iterator[Cell]:
    """Runs in processes of their own, one torch thread each: two busy threads on one core would wait for each other."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting: list[Future[Cell]] = [pool.submit(execute, cell, threads=1) for cell in cells]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row a method: mean and sample standard deviation over its seeds, of final-round figures."""
    found = []
    for label in dict.fromkeys(cell.label for cell in cells):
        own = [cell for cell in cells if cell.label == label]
        good = [cell.summary for cell in own if cell.summary is not None]
        row: dict[str, Any] = {"method": label, "seeds": [cell.seed for cell in own], "diverged": len(own) - len(good)}
        row["metric"] = good[0]["metric"] if good else None
        for name, read in COLUMNS.items():
            values = [value for value in map(read, good) if value is not None]
            row[name] = _over_seeds(values)
        row["by_seed"] = {name: _by_seed(own, COLUMNS[name]) for name in ("global", "clients")}
        row |= attendance.over_seeds([(cell.seed, cell.summary) for cell in own if cell.summary is not None])
        groups = _groups(good)
        found.append({**row, "capability": groups} if groups else row)
    return found


def _by_seed(cells: Sequence[Cell], read: Callable[[Mapping[str, Any]], float | None]) -> dict[str, float]:
    """A figure of each seed, for paired tests; the keys are texts, as JSON has them."""
    found = {str(cell.seed): read(cell.summary) for cell in cells if cell.summary is not None}
    return {seed: value for seed, value in found.items() if value is not None}


def _over_seeds(values: Sequence[float]) -> dict[str, float] | None:
    return {"mean": statistics.fmean(values), "std": _std(values)} if values else None


def _groups(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The clients' own figures by capability, the weakest first, over seeds."""
    seen: dict[float, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        for group in summary.get("final", {}).get("clients", {}).get("capability", []):
            seen.setdefault(group["capability"], []).append(group)
    return [
        {"capability": level, "clients": statistics.fmean(group["clients"] for group in same)}
        | {key: _over_seeds([group[key] for group in same]) for key in ("mean", "worst")}
        for level, same in sorted(seen.items())
    ]


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _final(*keys: str) -> Callable[[Mapping[str, Any]], float | None]:
    def read(summary: Mapping[str, Any]) -> float | None:
        value: Any = summary.get("final", {})
        for key in keys:
            value = value.get(key, {}) if isinstance(value, Mapping) else {}
        return None if value == {} else float(value)

    return read


COLUMNS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "global": lambda s: _final("global", s["metric"]["name"])(s),
    "clients": _final("clients", "mean"),
    "examples": _final("clients", "examples_mean"),
    "worst": _final("clients", "worst"),
    "mb_up": lambda s: sum(s["bytes"]["up"].values()) / 1e6,
    "mb_down": lambda s: sum(s["bytes"]["down"].values()) / 1e6,
    "error": lambda s: s["errors"].get("served"),
    "error_fedit": lambda s: s["errors"].get("fedit"),
    "error_best": lambda s: s["errors"].get("best"),
    "drift": lambda s: s["errors"].get("drift"),
    "seconds": lambda s: s["seconds"]["whole"],
}
