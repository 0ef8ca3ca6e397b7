"""Loading of runs, finished or not, and of comparisons as ``Run`` values, the input of all figures and tables."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.reporting.digest import Digest
from fedlora.runs.comparison import Cell
from fedlora.runs.file_names import COMPARISON, CONFIG, METRICS, SUMMARY
from fedlora.runs.folder import RunFolder, read_json
from fedlora.schema import construct_by_name
from fedlora.tasks import TASKS
from fedlora.text import display_safe

NAME = 80  # characters of a run's name


@dataclass(frozen=True)
class Run:
    """The contents of one run's folder. Runs with the same ``label`` differ in the seed only."""

    folder: Path
    label: str
    table: Mapping[str, Any]  # the resolved configuration
    metric: str
    higher: bool  # is better
    digest: Digest = field(repr=False)
    summary: Mapping[str, Any] | None = None  # None: under way, or broken off
    failure: str | None = None  # why it diverged
    rows: Mapping[str, Any] | None = None  # rows.json
    personal: Mapping[str, Any] | None = None  # personal.json

    @property
    def name(self) -> str:
        """The folder's name, safe to display."""
        return display_safe(self.folder.resolve().name, NAME)

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.table.get("seed", 0))

    @property
    def state(self) -> str:
        """``finished``, ``interrupted``, ``diverged`` or ``under way``."""
        if self.failure is not None:
            return "diverged"
        if self.summary is None:
            return "under way"
        return "interrupted" if self.summary.get("interrupted") else "finished"


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Load the runs in folders of runs and of comparisons.

    Raises ``ValueError`` if a folder has no run, or if the runs have different metrics.
    """
    runs = [run for path in dict.fromkeys(Path(f).expanduser() for f in folders) for run in _load_folder(path)]
    metrics = dict.fromkeys(run.metric for run in runs)
    if len(metrics) > 1:
        raise ValueError(
            f"the runs are judged by {' and by '.join(map(display_safe, metrics))}, which no table can compare; report "
            "on runs of one metric at a time."
        )
    return assign_labels(runs)


def load_cells(cells: Sequence[Cell]) -> list[Run]:
    """Load the finished runs of a comparison."""
    return [load_run(Path(cell.folder), cell.label) for cell in cells if cell.folder and cell.summary is not None]


def assign_labels(runs: Sequence[Run]) -> list[Run]:
    """Give runs the same label if and only if they differ in the seed only.

    A run keeps its label, the comparison's or its method's name, with the folder's name beside it if that is taken.
    """
    seen: dict[tuple[str, int], int] = {}
    keys = []
    for run in runs:
        same = json.dumps({k: v for k, v in run.table.items() if k not in ("seed", "engine", "compare")}, default=str)
        again = seen[same, run.seed] = seen.get((same, run.seed), -1) + 1  # a repeated run is not a further seed
        keys.append((run.label, same, again))
    names: dict[tuple[str, str, int], str] = {}
    for run, key in zip(runs, keys):
        if key not in names:
            alone = len({other for other in keys if other[0] == run.label}) == 1
            name = run.label if alone else f"{run.label} ({run.name})"
            more = (f"{name}, {count}" for count in itertools.count(2))
            names[key] = next(x for x in itertools.chain([name], more) if x not in names.values())
    return [replace(run, label=names[key]) for run, key in zip(runs, keys)]


def _load_folder(path: Path) -> list[Run]:
    """Load a run, or the runs of a comparison, whose folders may have been moved together."""
    if (path / COMPARISON).exists():
        runs = []
        for cell in read_json(path / COMPARISON).get("runs", []):
            folder = path / Path(str(cell.get("folder") or f"{cell['label']}-seed{cell['seed']}")).name
            if (folder / METRICS).exists():
                runs.append(load_run(folder, str(cell["label"]), cell.get("failure")))
    elif (path / METRICS).exists() or (path / SUMMARY).exists():
        runs = [load_run(path)]
    else:
        folders = sorted(p.parent for p in path.glob(f"*/{METRICS}")) if path.is_dir() else []
        runs = [load_run(p, p.name.rpartition("-seed")[0] or p.name) for p in folders]
    if runs:
        return runs
    raise ValueError(
        f"{display_safe(path)!r} holds no run: it has no {METRICS}; name a folder that `fedlora run` or `fedlora "
        "compare` made."
    )


def load_run(folder: Path, label: str | None = None, failure: str | None = None) -> Run:
    """Load one run's folder; ``ValueError`` if a file in it is not readable."""
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"{display_safe(folder)!r} has no {CONFIG}; name a folder that `fedlora run` made, as it left it."
        )
    run = RunFolder(folder)
    table, summary = run.table, run.summary if run.has_summary else None
    if summary is not None and summary.get("metric"):
        metric, higher = str(summary["metric"]["name"]), bool(summary["metric"]["higher"])
    else:
        task = construct_by_name(TASKS, "task", table.get("task", {}))
        metric, higher = task.metric, task.is_higher_better
    digest = Digest(int(table.get("rounds", 1)), metric, new=int(table.get("clients", {}).get("new", 0)))
    for record in run.each_record():
        digest.take(record)
    name = display_safe(label or str(table.get("method", {}).get("name", "fedit")), NAME)
    return Run(folder, name, table, metric, higher, digest, summary, failure, run.rows, run.personal)
