"""The same federation under several methods and seeds: same data, splits, initial weights and budgets."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedlora.adapters import ADAPTERS, LoRA
from fedlora.engines.loop import Event, Watch
from fedlora.files import save_json
from fedlora.methods import METHODS, Method, load_merging_method, merging_methods
from fedlora.registry import nearest
from fedlora.runs.comparison import Cell, Compared, rows
from fedlora.runs.config import Config, ConfigError, Table, build, merge_tables
from fedlora.runs.counterfactual import asked
from fedlora.runs.file_names import COMPARISON, CONFIG, ORACLE
from fedlora.runs.folder import RunFolder
from fedlora.runs.run import check_same, run
from fedlora.schema import construct_by_name
from fedlora.text import safe_filename

CENTRALISED = "centralised"
Done = Callable[[Cell], None]


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
    safe_filename(label, "a compared run")
    every = table.get("compare", {})
    base = {key: value for key, value in table.items() if key != "compare"}
    if label == CENTRALISED:
        return merge_tables(_centralised(base), every.get(label, {}))
    name = _method_of(label, every)
    own = _fitted(base, name)
    if table.get("method", {}).get("name") == name and own.get("adapter") == base.get("adapter"):
        own["method"] = table["method"]
    return merge_tables(own, every.get(label, {}))


def _fitted(table: Table, method: str) -> Table:
    """The table under a method with its defaults, and with an adapter that the method is defined for."""
    kind, given = METHODS.load(method), {"name": "lora", **table.get("adapter", {})}
    equal = {"weighting": "uniform"} if _by_client(table) else {}
    own = {**table, "method": {"name": method, **equal}}
    if not issubclass(ADAPTERS.load(given["name"]), kind.adapters):
        adapter = kind.adapters[0].like(construct_by_name(ADAPTERS, "adapter", given))
        values = {key: value for key, value in asdict(adapter).items() if value is not None}
        own["adapter"] = {"name": ADAPTERS.name_of(type(adapter)), **values}
    return own


def _method_of(label: str, every: Mapping[str, Any]) -> str:
    """The method's name behind a label."""
    if label in METHODS.names() or label not in every:
        return label
    found = every[label].get("method", {}).get("name") if isinstance(every[label], Mapping) else None
    if not isinstance(found, str) and not every[label]:
        return label  # which the list of methods is asked for
    if not isinstance(found, str):
        near = nearest(label, METHODS.names())
        hint = f"; did you mean {near!r}? If not," if near else ";"
        raise ConfigError(f"[compare.{label}] is no method's name, and says none{hint} give it method.name.")
    return found


def _centralised(table: Table) -> Table:
    config = build(table)
    steps = {} if config.training.local_epochs else {"local_steps": _cohort_steps(config)}
    gone = ("clients", "method", *(["privacy"] if _by_client(table) else []))  # one client is hidden among no others
    own = {key: value for key, value in table.items() if key not in gone}
    return merge_tables({**_fitted(own, "fedit"), "clients": {"count": 1}}, {"training": steps})


def _by_client(table: Table) -> bool:
    """Whether the guarantee is about whole clients, whose weights must then be equal."""
    return bool(table.get("privacy", {}).get("level") == "client")


def _cohort_steps(config: Config) -> int:
    """Optimiser steps that a round's cohort does together, in the mean over the rounds."""
    clients, usual, seed = config.clients, config.training.steps(1), config.seed
    done = sum(clients.steps(usual, r, k, seed) for r in range(config.rounds) for k in clients.remaining(r, seed))
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
    if out is not None and (Path(out).expanduser() / COMPARISON).exists():
        raise ConfigError(f"{str(out)!r} holds a comparison already; choose another folder with --out.")
    folder = None if out is None else Path(out).expanduser()
    cells = plan(table, list(dict.fromkeys(labels)), list(dict.fromkeys(seeds)), folder)
    finished: dict[tuple[str, int], Cell] = {}
    for cell in executed(cells, jobs, watch):
        finished[cell.label, cell.seed] = cell
        done(cell)
    ordered = Compared(finished[key] for cell in cells if (key := (cell.label, cell.seed)) in finished)
    if folder is not None:
        save_json(folder / COMPARISON, {"rows": rows(ordered), "runs": [asdict(cell) for cell in ordered]})
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
    labels = labels or list(merging_methods())
    others = {label: replace(_asked(table, label), adapter=adapter) for label in labels}
    records = run(config, out, watch, lambda *round: asked(*round, others)).records
    found = [record["oracle"] for record in records]
    table_rows = [_oracle_row(label, found) for label in others if label in found[0]["methods"]]
    means = {"tail": statistics.fmean(x["tail"] for x in found)}
    means |= {f"angle {leaf}": statistics.fmean(x["angles"][leaf] for x in found) for leaf in found[0]["angles"]}
    if out is not None:
        save_json(Path(out).expanduser() / ORACLE, {"rows": table_rows, "uploads": means})
    return table_rows, means


def _asked(table: Table, label: str) -> Method:
    """A method by its name with its defaults, or as ``[compare.LABEL]`` sets it."""
    kind = load_merging_method(_method_of(label, table.get("compare", {})))
    set_here = table.get("compare", {}).get(label, {}).get("method")
    return build(for_label(table, label)).method if set_here else kind()


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
    table = merge_tables(cell.table, {"engine": {"threads": threads}} if threads else {})
    config: Config = build(table)
    folder = None if cell.folder is None else Path(cell.folder)
    begun = folder is not None and (folder / CONFIG).exists()
    if folder is not None and begun and RunFolder(folder).is_finished(config.rounds):
        check_same(config, folder)
        return Cell(cell.label, cell.seed, config.table, cell.folder, RunFolder(folder).summary)
    try:
        result = run(config, cell.folder, watch, again=begun)
    except FloatingPointError as error:
        return Cell(cell.label, cell.seed, config.table, cell.folder, failure=str(error))
    if result.summary["interrupted"]:
        raise KeyboardInterrupt
    return Cell(cell.label, cell.seed, config.table, cell.folder, result.summary)


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
