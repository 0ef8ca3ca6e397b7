"""Folders of runs, finished or not, and of comparisons, as ``Run``s: what every figure and table is made of."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.reporting.digest import Digest
from fedlora.runs.file_names import COMPARISON, CONFIG, METRICS, SUMMARY
from fedlora.runs.folder import RunFolder, read_json
from fedlora.schema import construct_by_name
from fedlora.tasks import TASKS
from fedlora.tasks.metrics.scores import KNOWN_METRICS
from fedlora.text import display_safe

NAME = 80  # characters of a run's name


@dataclass(frozen=True)
class Run:
    """One run's folder, read. ``label`` says which runs are seeds of one and the same thing."""

    folder: Path
    label: str
    table: Mapping[str, Any]  # the resolved configuration
    metric: str
    higher: bool  # is better
    digest: Digest = field(repr=False)
    summary: Mapping[str, Any] | None = None  # None: under way, or broken off without a word
    failure: str | None = None  # why it diverged
    rows: Mapping[str, Any] | None = None  # rows.json
    personal: Mapping[str, Any] | None = None  # personal.json

    @property
    def name(self) -> str:
        """The folder's name, fit to be shown."""
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

    @property
    def personal_method(self) -> bool:
        """Whether each client holds a model of its own, as far as the run says."""
        return bool((self.summary or {}).get("personal", False))


def runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of all folders: of a run, itself; of a comparison, finished or not, its runs.

    ``ValueError`` where a folder has no run, or where the runs are judged by different metrics.
    """
    found = [run for path in dict.fromkeys(Path(f).expanduser() for f in folders) for run in _of_folder(path)]
    metrics = dict.fromkeys(run.metric for run in found)
    if len(metrics) > 1:
        raise ValueError(
            f"the runs are judged by {' and by '.join(map(display_safe, metrics))}, which no table can compare; report "
            "on runs of one metric at a time."
        )
    return labelled(found)


def labelled(found: Sequence[Run]) -> list[Run]:
    """Runs that differ in nothing but the seed share a label; two that differ otherwise never do.

    A comparison brings its labels along. Another run's is its method's name, and its folder's beside it where that
    name is taken.
    """
    seen: dict[tuple[str, int], int] = {}
    keys = []
    for run in found:
        same = json.dumps({k: v for k, v in run.table.items() if k not in ("seed", "engine", "compare")}, default=str)
        again = seen[same, run.seed] = seen.get((same, run.seed), -1) + 1  # a repeated run is no further seed
        keys.append((run.label, same, again))
    names: dict[tuple[str, str, int], str] = {}
    for run, key in zip(found, keys):
        if key not in names:
            alone = len({other for other in keys if other[0] == run.label}) == 1
            names[key] = _free(run.label if alone else f"{run.label} ({run.name})", set(names.values()))
    return [replace(run, label=names[key]) for run, key in zip(found, keys)]


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where another has it already."""
    more = (f"{name}, {count}" for count in itertools.count(2))
    return next(one for one in itertools.chain([name], more) if one not in taken)


def _of_folder(path: Path) -> list[Run]:
    if (path / COMPARISON).exists():
        cells = read_json(path / COMPARISON).get("runs", [])
        found = [_cell(path, cell) for cell in cells]
        return [run for run in found if run is not None] or _nothing(path)
    if (path / METRICS).exists() or (path / SUMMARY).exists():
        return [opened(path)]
    inside = sorted(p.parent for p in path.glob(f"*/{METRICS}")) if path.is_dir() else []
    return [opened(p, p.name.rpartition("-seed")[0] or p.name) for p in inside] or _nothing(path)


def _nothing(path: Path) -> list[Run]:
    raise ValueError(
        f"{display_safe(path)!r} holds no run: it has no {METRICS}; name a folder that `fedlora run` or `fedlora "
        "compare` made."
    )


def _cell(path: Path, cell: Mapping[str, Any]) -> Run | None:
    """One run of a comparison, whose folders may have been moved together."""
    folder = path / Path(str(cell.get("folder") or f"{cell['label']}-seed{cell['seed']}")).name
    return opened(folder, str(cell["label"]), cell.get("failure")) if (folder / METRICS).exists() else None


def opened(folder: Path, label: str | None = None, failure: str | None = None) -> Run:
    """One run's folder. ``ValueError`` where a file in it is not readable."""
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"{display_safe(folder)!r} has no {CONFIG}; name a folder that `fedlora run` made, as it left it."
        )
    run = RunFolder(folder)
    table, summary = run.table, run.summary if run.has_summary else None
    metric, higher = _metric(table, summary)
    digest = Digest(int(table.get("rounds", 1)), metric, new=int(table.get("clients", {}).get("new", 0)))
    for record in run.each_record():
        digest.take(record)
    name = label or str(table.get("method", {}).get("name", "fedit"))
    return Run(
        folder, display_safe(name, NAME), table, metric, higher, digest, summary, failure, run.rows, run.personal
    )


def _metric(table: Mapping[str, Any], summary: Mapping[str, Any] | None) -> tuple[str, bool]:
    """What a run is judged by, and whether more of it is better."""
    if summary is not None and summary.get("metric"):
        return str(summary["metric"]["name"]), bool(summary["metric"]["higher"])
    about = table.get("task", {})
    task = construct_by_name(TASKS, "task", about)
    return task.metric, KNOWN_METRICS[task.metric].higher
