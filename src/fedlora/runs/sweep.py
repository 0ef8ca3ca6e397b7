"""Tuning: every method gets as many trials, and is chosen by rows that are neither trained on nor test rows."""

import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.engines.loop import Event
from fedlora.files import save_json, write
from fedlora.runs.attendance import describe_scored
from fedlora.runs.compare import execute_all, for_label
from fedlora.runs.comparison import Cell
from fedlora.runs.config import ConfigError, Table, apply_overrides, build, dumps, merge_tables
from fedlora.runs.run import check_same
from fedlora.runs.search_space import Grid, Values
from fedlora.schema import get_key, remove_key, set_keys, table_difference
from fedlora.tasks.data import rows as source

REPORT, CHOSEN = "sweep.json", "chosen.toml"
VALIDATION = ("validation", "val", "valid", "dev")  # what data calls the rows that are there for choosing
HELD_OUT = 0.1  # of the training rows, where there are none
CHEAP = {"evaluation": {"every": 2**31, "measure": False}}  # the last round is always evaluated; nothing else is asked


@dataclass(frozen=True)
class Trial:
    """One method's attempt with one set of values."""

    label: str
    number: int  # from 1, within the method
    values: Values
    table: Table  # the whole configuration, without seed and with the test split as the user has it


@dataclass(frozen=True)
class Sweep:
    """All trials, checked; ``run`` does them."""

    table: Table  # as it was given, with the overrides that are no alternatives
    grid: Grid
    trials: list[Trial]
    seeds: list[int]
    split: str  # what stands in for the test split

    @classmethod
    def plan(
        cls, table: Table, overrides: Sequence[str], labels: Sequence[str] = (), seeds: Sequence[int] = (0,),
        holdout: float | None = None, trials: int | None = None,
    ) -> "Sweep":  # fmt: skip
        """Every trial of every method, each configuration checked before the first is run.

        ``labels`` are as of a comparison; none: the table's own method. ``ConfigError`` says what is wrong.
        """
        grid = Grid.read(overrides)
        table = apply_overrides(table, grid.fixed)
        own = table.get("method", {}).get("name", "fedit")
        labels, seeds = list(dict.fromkeys(labels or [own])), list(dict.fromkeys(seeds))
        split = validation_split(table, holdout)
        points = grid.for_all(labels, trials, table.get("seed", 0))
        found = [
            Trial(label, number, values, tried(table, label, values))
            for label in labels
            for number, values in enumerate(points[label], 1)
        ]
        planned = cls(table, grid, found, seeds, split)
        for trial in found:
            build(planned.asked(trial, seeds[0]))
            twin = next(t for t in found if t.label == trial.label and t.table == trial.table)
            if twin is not trial:
                raise ConfigError(
                    f"trials {twin.number} and {trial.number} of {trial.label!r} are one and the same: "
                    f"{' and '.join(trial.values)} make no difference to it; sweep something that does."
                )
        return planned

    def asked(self, trial: Trial, seed: int) -> Table:
        """A trial as it is run: on validation rows, with one evaluation at its end."""
        return merge_tables({**trial.table, "seed": seed}, {"task": {"test_split": self.split}, **CHEAP})

    def cells(self, folder: Path) -> list[Cell]:
        """Every run, each with a folder of its own."""
        return [
            Cell(f"{t.label} {t.number}", seed, self.asked(t, seed), str(folder / "trials" / _name(t, seed)))
            for t in self.trials
            for seed in self.seeds
        ]

    @property
    def digest(self) -> str:
        """Of all that is asked for: another sweep cannot go on from this one's trials."""
        asked = [[self.asked(trial, seed) for trial in self.trials] for seed in self.seeds]
        return hashlib.blake2b(json.dumps(asked, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

    def run(
        self,
        out: str | Path,
        jobs: int = 1,
        watch: Callable[[Cell, Event], None] = lambda cell, event: None,
        done: Callable[[Cell], None] = lambda cell: None,
    ) -> dict[str, Any]:
        """Runs what ``out`` does not hold yet; writes ``sweep.json`` after each trial, ``chosen.toml`` at the end.

        A trial that diverges counts as one, and loses. ``ConfigError`` where ``out`` holds something else.
        """
        folder = Path(out).expanduser()
        known = self._known(folder)
        cells = {cell.folder: cell for cell in self.cells(folder)}
        self._check_same(folder, known)
        waiting = [cell for path, cell in cells.items() if Path(str(path)).name not in known]
        for cell in waiting:  # what an interrupted trial left
            shutil.rmtree(str(cell.folder), ignore_errors=True)
        self._save(folder, known)
        for cell in execute_all(waiting, jobs, watch):
            known[Path(str(cell.folder)).name] = _outcome(cell)
            self._save(folder, known)
            done(cell)
        found = self.report(known)
        write(folder / CHOSEN, dumps(self.chosen(found)).encode())
        return found

    def _known(self, folder: Path) -> dict[str, Any]:
        file = folder / REPORT
        if not file.exists():
            if folder.exists() and any(folder.iterdir()):
                raise ConfigError(f"{str(folder)!r} holds something else; choose another folder with --out.")
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("digest") != self.digest:
            raise ConfigError(
                f"{str(folder)!r} holds another sweep; choose another folder with --out, or ask for the same."
            )
        return dict(found["runs"])

    def _check_same(self, folder: Path, known: Mapping[str, Any]) -> None:
        """``ValueError`` where the data have changed since the trials that are finished: they could not be compared."""
        for seed in self.seeds:
            names = {_name(trial, seed): trial for trial in self.trials}
            done = next((name for name in names if name in known and (folder / "trials" / name).exists()), None)
            if done is not None:
                check_same(build(self.asked(names[done], seed)), folder / "trials" / done)

    def _save(self, folder: Path, known: Mapping[str, Any]) -> None:
        save_json(folder / REPORT, {**self.report(known), "digest": self.digest, "runs": known})

    def report(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """A row a method: its trials with what they came to, and the one to take."""
        metric = next((run["metric"] for run in known.values() if run["metric"]), None)
        labels = list(dict.fromkeys(trial.label for trial in self.trials))
        return {
            "validation": self.split,
            "metric": metric,
            "seeds": self.seeds,
            "finished": len(known) == len(self.trials) * len(self.seeds),
            "methods": [self._row(label, known, metric) for label in labels],
        }

    def _row(self, label: str, known: Mapping[str, Any], metric: Mapping[str, Any] | None) -> dict[str, Any]:
        trials = [self._trial(trial, known) for trial in self.trials if trial.label == label]
        good = [trial for trial in trials if trial["value"] is not None]
        best: dict[str, Any] = {"trial": None, "values": {}, "value": None}
        if good and metric is not None:
            best = (max if metric["higher"] else min)(good, key=lambda trial: trial["value"])
        return {
            "method": label,
            "chosen": best["trial"],
            "values": best["values"],
            "value": best["value"],
            "by": next((t["by"] for t in good), None),
            "edge": self.grid.edges(label, best["values"]),
            "trials": trials,
        }

    def _trial(self, trial: Trial, known: Mapping[str, Any]) -> dict[str, Any]:
        runs = [known.get(_name(trial, seed)) for seed in self.seeds]
        values = [run["value"] for run in runs if run is not None]
        whole = len(values) == len(self.seeds) and None not in values
        return {
            "trial": trial.number,
            "values": trial.values,
            "value": statistics.fmean(values) if whole else None,
            "each": values,
            "by": next((run["by"] for run in runs if run and run["by"]), None),
            "over": next((run["over"] for run in runs if run and run.get("over") not in (None, "clients")), None),
            "diverged": values.count(None),
            "seconds": sum(run["seconds"] for run in runs if run is not None),
        }

    def chosen(self, found: Mapping[str, Any]) -> Table:
        """The given configuration, with each method's values in its ``[compare.METHOD]`` table."""
        tables = {}
        for row in found["methods"]:
            if row["chosen"] is not None:
                trial = next(t for t in self.trials if (t.label, t.number) == (row["method"], row["chosen"]))
                base = for_label(remove_key(self.table, ["compare", trial.label]), trial.label)
                said = {key: value for key, value in trial.values.items() if get_key(trial.table, key) == value}
                tables[trial.label] = set_keys(table_difference(trial.table, base), said)
        return {**self.table, "compare": {**self.table.get("compare", {}), **tables}}


def tried(table: Table, label: str, values: Values) -> Table:
    """A method's configuration with these values, whatever the table says of it already.

    A method whose adapter is of another kind gets one with as many numbers, as in a comparison.
    """
    own = {key: value for key, value in values.items() if key.startswith("method.")}
    rest = {key: value for key, value in values.items() if key not in own}
    table = set_keys(table, rest)
    tuned = table.get("compare", {}).get(label, {})
    for key in values:
        tuned = remove_key(tuned, key.split("."))
    table = {**table, "compare": {**table.get("compare", {}), label: tuned}}
    return set_keys(for_label(table, label), own)


def validation_split(table: Table, share: float | None) -> str:
    """The test split that a sweep uses instead: the data's own validation rows, or a share of the training rows.

    ``ConfigError`` where there is neither.
    """
    config = build({key: value for key, value in table.items() if key != "compare"})
    task: Any = config.task
    if config.clients.own_data or not hasattr(task, "test_split"):
        raise ConfigError(
            "there is no validation data to choose by, since every party has its own rows elsewhere; "
            "sweep on a data set of your own, and take over the chosen values."
        )
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"--holdout is {share}; it is a share of the training rows, between 0 and 1.")
    names = source.split_names(task.data, task.data_config, source.text_format(task)) if share is None else []
    free = [name for name in VALIDATION if name in names and name not in (task.train_split, task.test_split)]
    return free[0] if free else source.held_out_split(task.train_split, share or HELD_OUT)


def _name(trial: Trial, seed: int) -> str:
    return f"{trial.label.replace(':', '-')}-{trial.number}-seed{seed}"


def _outcome(cell: Cell) -> dict[str, Any]:
    """What a trial came to; no figure where it diverged. A shared model is judged on all rows, others by client."""
    found: dict[str, Any] = {"value": None, "by": None, "metric": None, "seconds": 0.0, "failure": cell.failure}
    if cell.summary is None:
        return found
    final, metric = cell.summary["final"], cell.summary["metric"]
    by = "global" if "global" in final else "clients"
    value = float(final["global"][metric["name"]] if by == "global" else final["clients"]["mean"])
    return found | {
        "value": value if math.isfinite(value) else None,
        "by": by,
        "over": describe_scored(cell.summary) if by == "clients" else None,
        "metric": metric,
        "seconds": cell.summary["seconds"]["whole"],
    }
