"""Compare methods over seeds: with the same data, partition, initial weights and budgets."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedlora.adapters import ADAPTERS, Adapter, LoRA
from fedlora.engines.loop import Event, Watch
from fedlora.files import save_json
from fedlora.methods import METHODS, load_merging_method, merging_methods
from fedlora.registry import nearest
from fedlora.runs.comparison import Cell, Compared, comparison_rows
from fedlora.runs.config import (
    AnyConfig,
    Config,
    Overrides,
    build,
    check_compare,
    default_adapter,
    keep_objects,
    section_table,
    to_table,
)
from fedlora.runs.counterfactual import compare_uploads
from fedlora.runs.file_names import COMPARISON, CONFIG, ORACLE
from fedlora.runs.folder import RunFolder
from fedlora.runs.run import check_same, run_config
from fedlora.schema import ConfigError, Table, construct_by_name, merge_tables, remove_key
from fedlora.tasks._base import Task
from fedlora.text import safe_filename

CENTRALISED = "centralised"


def plan_cells(table: Table, labels: Sequence[str], seeds: Sequence[int], out: Path | None) -> list[Cell]:
    """Return all runs of a comparison; every configuration is checked."""
    cells = []
    for label in labels:
        for seed in seeds:
            cell_table = {**for_label({**table, "seed": seed}, label), "seed": seed}  # the seed decides some budgets
            build(cell_table)
            folder = None if out is None else str(out / f"{label.replace(':', '-')}-seed{seed}")
            cells.append(Cell(label, seed, cell_table, folder))
    return cells


def for_label(table: Table, label: str) -> Table:
    """Return the table of one method of a comparison, with the settings of its ``[compare.LABEL]`` table.

    ``label`` is a method's name; or another name, whose ``[compare.LABEL]`` table has ``method.name``; or
    ``centralised``: one client with all the data and the cohort's steps. The table's own method keeps its settings. If
    a method is not defined for the run's adapter, it gets an adapter of its own kind with as many parameters.
    """
    safe_filename(label, "a compared run")
    labels = table.get("compare", {})
    check_compare(labels)
    base = _name_adapter({key: value for key, value in table.items() if key != "compare"})
    if label == CENTRALISED:
        return merge_tables(_centralise(base), labels.get(label, {}))
    name = _method_name(label, labels)
    switched = _switch_method(base, name)
    if METHODS.load(own_method(table)) is METHODS.load(name) and switched.get("adapter") == base.get("adapter"):
        switched["method"] = {**section_table(table, "method"), "name": name}
    return merge_tables(switched, labels.get(label, {}))


def own_method(table: Table) -> str:
    """Return the name of a table's method."""
    return str(section_table(table, "method")["name"])


def _name_adapter(table: Table) -> Table:
    """Return the table with the adapter that its run has, if that is the default of its method and no LoRA."""
    adapter = default_adapter(METHODS.load(own_method(table)))
    if "adapter" in table or adapter is None or isinstance(adapter, LoRA):
        return table
    return {**table, "adapter": _adapter_table(adapter)}


def _adapter_table(adapter: Adapter) -> Table:
    values = {key: value for key, value in asdict(adapter).items() if value is not None}
    return {"name": ADAPTERS.name_of(type(adapter)), **values}


def _switch_method(table: Table, method: str) -> Table:
    """Return the table with a method's defaults, and with an adapter that the method is defined for."""
    kind, settings = METHODS.load(method), section_table(table, "adapter")
    equal = {"weighting": "uniform"} if _has_client_privacy(table) else {}
    switched = {**table, "method": {"name": method, **equal}}
    if not issubclass(ADAPTERS.load(settings["name"]), kind.adapters):
        adapter = kind.adapters[0].like(construct_by_name(ADAPTERS, "adapter", settings))
        switched["adapter"] = _adapter_table(adapter)
    return switched


def _method_name(label: str, labels: Mapping[str, Any]) -> str:
    if label in METHODS.names() or label not in labels:
        return label
    name = labels[label].get("method", {}).get("name") if isinstance(labels[label], Mapping) else None
    if not isinstance(name, str) and not labels[label]:
        return label  # the registry explains it
    if not isinstance(name, str):
        near = nearest(label, METHODS.names())
        hint = f"; did you mean {near!r}? If not," if near else ";"
        raise ConfigError(f"[compare.{label}] is no method's name, and says none{hint} give it method.name.")
    return name


def _centralise(table: Table) -> Table:
    """Return the table of one client with all the data, and with the mean number of steps of a round's cohort."""
    config, training = build(table), {}
    if config.clients.own_data:
        raise ConfigError(
            f"{CENTRALISED!r} trains on the rows of all clients together, but clients.partition is 'own': every party "
            "has rows and columns of its own; leave it out."
        )
    if not config.training.local_epochs:
        clients, steps, seed, rounds = config.clients, config.training.steps(1), config.seed, range(config.rounds)
        total = sum(clients.steps(steps, r, k, seed) for r in rounds for k in clients.remaining(r, seed))
        training = {"local_steps": max(1, round(total / max(1, config.rounds)))}
    # One client has nobody to hide among, to attack or to guard against.
    dropped = ("clients", "method", "robust", "attack", *(["privacy"] if _has_client_privacy(table) else []))
    base = {key: value for key, value in table.items() if key not in dropped}
    base = merge_tables({**_switch_method(base, "fedit"), "clients": {"count": 1}}, {"training": training})
    return remove_key(remove_key(base, ["flower", "secure_aggregation"]), ["flower", "secure_threshold"])


def _has_client_privacy(table: Table) -> bool:
    """Whether the privacy guarantee is for whole clients, so that their weights must be equal."""
    return bool(section_table(table, "privacy").get("level") == "client")


def compare_methods(
    config: AnyConfig,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    out: str | Path | None = None,
    jobs: int = 1,
    watch: Callable[[Cell, Event], None] = lambda cell, event: None,
    done: Callable[[Cell], None] = lambda cell: None,
    overrides: Overrides = (),
    callbacks: Sequence[Any] = (),
) -> Compared:
    """Run all methods with all seeds; see ``fedlora.compare`` for the arguments and the errors."""
    folder = None if out is None else Path(out).expanduser()
    if folder is not None and (folder / COMPARISON).exists():
        raise ConfigError(f"{str(out)!r} holds a comparison already; choose another folder with --out.")
    table = to_table(config, overrides)
    labels = _list_once("methods", [own_method(table)] if methods is None else methods, str, '["fedit", "local"]')
    cells = plan_cells(table, labels, _list_once("seeds", seeds, int, "[0, 1, 2]"), folder)
    task = config.task if isinstance(config, Config) and config.task.is_own_code else None
    if task is not None and jobs > 1:
        raise ConfigError(f"the model and data are Python objects of this process, but jobs is {jobs}; set it to 1.")
    if callbacks and jobs > 1:
        raise ConfigError(f"callbacks run in this process, but jobs is {jobs}; set it to 1, or leave callbacks out.")
    finished: dict[tuple[str, int], Cell] = {}
    for cell in execute_all(cells, jobs, watch, callbacks, task):
        finished[cell.label, cell.seed] = cell
        done(cell)
    ordered = Compared(finished[key] for cell in cells if (key := (cell.label, cell.seed)) in finished)
    if folder is not None:
        runs = [asdict(cell) for cell in ordered]
        save_json(folder / COMPARISON, {"rows": comparison_rows(ordered), "runs": runs})
    return ordered


def _list_once(name: str, values: Any, kind: type, example: str) -> list[Any]:
    """Return the values of an argument without repetitions. Raises ``ConfigError`` unless they are of their kind."""
    listed = [] if isinstance(values, str | int) or not isinstance(values, Iterable) else list(dict.fromkeys(values))
    if not listed or not all(isinstance(value, kind) for value in listed):
        raise ConfigError(f"{name} is {values!r}; it should be a list of at least one, e.g. {example}.")
    return listed


def compare_aggregation(
    table: Table, labels: Sequence[str] | None = None, out: str | Path | None = None, watch: Watch = lambda event: None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Run the table's method, and aggregate the uploads of each round with other methods as well.

    Returns a row for each method (its errors, and how far it moved the factors) and the means of ``tail`` and
    ``angles``. Raises ``ConfigError`` for a method that does not combine finished factors.
    """
    config = build({key: value for key, value in table.items() if key != "compare"})
    if config.privacy.hides_figures:
        raise ConfigError("the oracle looks at every upload, which [privacy] covers; set privacy.figures = true.")
    adapter = config.method.adapter
    if not isinstance(adapter, LoRA):
        raise ConfigError("the oracle compares what methods make of LoRA factors; set adapter.name to 'lora'.")
    settings, methods = table.get("compare", {}), {}
    for label in labels or merging_methods():
        kind = load_merging_method(_method_name(label, settings))
        has_settings = settings.get(label, {}).get("method")
        methods[label] = replace(build(for_label(table, label)).method if has_settings else kind(), adapter=adapter)
    records = run_config(config, out, watch, lambda *round: compare_uploads(*round, methods)).records
    results = [record["oracle"] for record in records]
    rows = [_aggregation_row(label, results) for label in methods if label in results[0]["methods"]]
    means = {"tail": statistics.fmean(x["tail"] for x in results)}
    means |= {f"angle {leaf}": statistics.fmean(x["angles"][leaf] for x in results) for leaf in results[0]["angles"]}
    if out is not None:
        save_json(Path(out).expanduser() / ORACLE, {"rows": rows, "uploads": means})
    return rows, means


def _aggregation_row(label: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rounds = [x["methods"][label] for x in results]
    errors = [x["error"] for x in rounds]
    row = {"method": label, "error": statistics.fmean(errors), "first": errors[0], "last": errors[-1]}
    return {**row, "gauge": statistics.fmean(x["gauge"] for x in rounds) if "gauge" in rounds[0] else None}


def execute_all(
    cells: Sequence[Cell], jobs: int, watch: Callable[[Cell, Event], None], callbacks: Sequence[Any] = (),
    task: Task | None = None,
) -> Iterator[Cell]:  # fmt: skip
    """Yield each cell when it has run; several jobs run in processes of their own, without callbacks.

    ``task`` has the Python objects of all cells, if they run on some.
    """
    if jobs <= 1:
        for cell in cells:
            yield execute(cell, partial(watch, cell), callbacks=callbacks, task=task)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        # One torch thread each: two busy threads on one core would wait for each other.
        futures: list[Future[Cell]] = [pool.submit(execute, cell, threads=1) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def execute(
    cell: Cell, watch: Watch = lambda event: None, threads: int | None = None, callbacks: Sequence[Any] = (),
    task: Task | None = None,
) -> Cell:  # fmt: skip
    """Run a cell in this process, or resume it. A finished cell is read from its folder."""
    config = build(merge_tables(cell.table, {"engine": {"threads": threads}} if threads else {}))
    config = config if task is None else keep_objects(config, task)
    cell = replace(cell, table=config.table)
    folder = None if cell.folder is None else RunFolder(Path(cell.folder))
    again = folder is not None and (folder.path / CONFIG).exists()
    if folder is not None and again and folder.is_finished(config.rounds):
        check_same(config, folder.path)
        return replace(cell, summary=folder.summary)
    try:
        result = run_config(config, cell.folder, watch, again=again, callbacks=callbacks)
    except FloatingPointError as error:
        return replace(cell, failure=str(error))
    if result.summary["interrupted"]:
        raise KeyboardInterrupt
    return replace(cell, summary=result.summary)
