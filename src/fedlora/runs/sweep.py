"""Tune methods: as many trials for each method, compared on rows that are neither training rows nor test rows."""

import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedlora.engines.loop import Event
from fedlora.files import save_json, write
from fedlora.runs.attendance import describe_scored_clients
from fedlora.runs.compare import execute_all, for_label, own_method
from fedlora.runs.comparison import Cell
from fedlora.runs.config import build
from fedlora.runs.run import check_same
from fedlora.runs.search_space import Grid, Values
from fedlora.schema import ConfigError, Table, dumps, get_key, remove_key, set_keys, table_difference
from fedlora.tasks.data import rows as source
from fedlora.tasks.data.sources import load_data

REPORT, CHOSEN = "sweep.json", "chosen.toml"
VALIDATION = ("validation", "val", "valid", "dev")  # names of validation splits
HELD_OUT = 0.1  # of the training rows, for data without a validation split
CHEAP = {"evaluation.every": 2**31, "evaluation.measure": False}  # evaluates the last round only


@dataclass(frozen=True)
class Trial:
    """One method with one set of values."""

    label: str
    number: int  # from 1, within the method
    values: Values
    table: Table  # the configuration without seed, and with the user's test split

    def folder_name(self, seed: int) -> str:
        """Return the name of the folder of one run."""
        return f"{self.label.replace(':', '-')}-{self.number}-seed{seed}"


@dataclass(frozen=True)
class Sweep:
    """The trials of all methods; their configurations are valid."""

    table: Table  # the configuration, with the overrides that have one value
    grid: Grid
    trials: list[Trial]
    seeds: list[int]
    split: str  # used as the test split

    @classmethod
    def plan(
        cls, table: Table, space: Sequence[str] | Mapping[str, Any], labels: Sequence[str] = (),
        seeds: Sequence[int] = (0,), holdout: float | None = None, trials: int | None = None,
    ) -> "Sweep":  # fmt: skip
        """Build the trials of each method, and check every configuration. Raises ``ConfigError``.

        ``space`` is as in ``Grid.read``. ``labels`` are those of a comparison; without any, the table's method is
        tuned.
        """
        grid = Grid.read(space)
        table = set_keys(table, grid.fixed)
        labels = list(dict.fromkeys(labels or [own_method(table)]))
        split = find_validation_split(table, holdout)
        points = grid.points_by_label(labels, trials, table.get("seed", 0))
        all_trials = [
            Trial(label, number, values, build_trial_table(table, label, values))
            for label in labels
            for number, values in enumerate(points[label], 1)
        ]
        sweep = cls(table, grid, all_trials, list(dict.fromkeys(seeds)), split)
        for trial in all_trials:
            build(sweep.run_table(trial, sweep.seeds[0]))
            twin = next(t for t in all_trials if t.label == trial.label and t.table == trial.table)
            if twin is not trial:
                raise ConfigError(
                    f"trials {twin.number} and {trial.number} of {trial.label!r} are one and the same: "
                    f"{' and '.join(trial.values)} make no difference to it; sweep something that does."
                )
        return sweep

    def run_table(self, trial: Trial, seed: int) -> Table:
        """Return the configuration of one run: on validation rows, with one evaluation at the end."""
        return set_keys(trial.table, {"seed": seed, "task.test_split": self.split, **CHEAP})

    @property
    def _digest(self) -> str:
        """The identity of the sweep: another sweep cannot be resumed from its trials."""
        tables = [[self.run_table(trial, seed) for trial in self.trials] for seed in self.seeds]
        return hashlib.blake2b(json.dumps(tables, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

    def run(
        self,
        out: str | Path,
        jobs: int = 1,
        watch: Callable[[Cell, Event], None] = lambda cell, event: None,
        done: Callable[[Cell], None] = lambda cell: None,
    ) -> dict[str, Any]:
        """Run the trials that ``out`` does not have, and write ``sweep.json`` and, at the end, ``chosen.toml``.

        A trial that diverges counts as a trial, and is not chosen. Raises ``ConfigError`` if ``out`` has other content.
        """
        folder = Path(out).expanduser()
        outcomes = self._read_outcomes(folder)
        self._check_same(folder, outcomes)
        cells = []
        for trial, seed in product(self.trials, self.seeds):
            path = folder / "trials" / trial.folder_name(seed)
            if path.name not in outcomes:
                shutil.rmtree(path, ignore_errors=True)  # an interrupted trial
                cells.append(Cell(f"{trial.label} {trial.number}", seed, self.run_table(trial, seed), str(path)))
        self._save(folder, outcomes)
        for cell in execute_all(cells, jobs, watch):
            outcomes[Path(str(cell.folder)).name] = _outcome(cell)
            self._save(folder, outcomes)
            done(cell)
        report = self._report(outcomes)
        write(folder / CHOSEN, dumps(self._chosen_table(report)).encode())
        return report

    def _read_outcomes(self, folder: Path) -> dict[str, Any]:
        """Read the outcomes of the finished trials, by the name of their folder."""
        file = folder / REPORT
        if not file.exists():
            if folder.exists() and any(folder.iterdir()):
                raise ConfigError(f"{str(folder)!r} holds something else; choose another folder with --out.")
            return {}
        report = json.loads(file.read_text(encoding="utf-8"))
        if report.get("digest") != self._digest:
            raise ConfigError(
                f"{str(folder)!r} holds another sweep; choose another folder with --out, or ask for the same."
            )
        return dict(report["runs"])

    def _check_same(self, folder: Path, outcomes: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if the data have changed since the finished trials; checks one trial of each seed."""
        for seed in self.seeds:
            places = {trial.folder_name(seed): trial for trial in self.trials}
            done = next((name for name in places if name in outcomes and (folder / "trials" / name).exists()), None)
            if done is not None:
                check_same(build(self.run_table(places[done], seed)), folder / "trials" / done)

    def _save(self, folder: Path, outcomes: Mapping[str, Any]) -> None:
        save_json(folder / REPORT, {**self._report(outcomes), "digest": self._digest, "runs": outcomes})

    def _report(self, outcomes: Mapping[str, Any]) -> dict[str, Any]:
        """Return each method's trials and its best one."""
        metric = next((run["metric"] for run in outcomes.values() if run["metric"]), None)
        labels = list(dict.fromkeys(trial.label for trial in self.trials))
        return {
            "validation": self.split,
            "metric": metric,
            "seeds": self.seeds,
            "finished": len(outcomes) == len(self.trials) * len(self.seeds),
            "methods": [self._row(label, outcomes, metric) for label in labels],
        }

    def _row(self, label: str, outcomes: Mapping[str, Any], metric: Mapping[str, Any] | None) -> dict[str, Any]:
        trials = [self._trial_row(trial, outcomes) for trial in self.trials if trial.label == label]
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

    def _trial_row(self, trial: Trial, outcomes: Mapping[str, Any]) -> dict[str, Any]:
        runs = [run for seed in self.seeds if (run := outcomes.get(trial.folder_name(seed))) is not None]
        values = [run["value"] for run in runs]
        is_whole = len(values) == len(self.seeds) and None not in values
        return {
            "trial": trial.number,
            "values": trial.values,
            "value": statistics.fmean(values) if is_whole else None,
            "each": values,
            "by": next((run["by"] for run in runs if run["by"]), None),
            "over": next((run["over"] for run in runs if run.get("over") not in (None, "clients")), None),
            "diverged": values.count(None),
            "seconds": sum(run["seconds"] for run in runs),
        }

    def _chosen_table(self, report: Mapping[str, Any]) -> Table:
        """Return the configuration with the best values of each method in its ``[compare.METHOD]`` table."""
        tables = {}
        chosen = {(row["method"], row["chosen"]) for row in report["methods"]}
        for trial in self.trials:
            if (trial.label, trial.number) in chosen:
                base = for_label(remove_key(self.table, ["compare", trial.label]), trial.label)
                swept = {key: value for key, value in trial.values.items() if get_key(trial.table, key) == value}
                tables[trial.label] = set_keys(table_difference(trial.table, base), swept)
        return {**self.table, "compare": {**self.table.get("compare", {}), **tables}}


def build_trial_table(table: Table, label: str, values: Values) -> Table:
    """Return a method's configuration with these values, which replace those of the table.

    If the method's adapter is of another kind, it gets as many parameters, as in a comparison.
    """
    tuned = table.get("compare", {}).get(label, {})
    for key in values:
        tuned = remove_key(tuned, key.split("."))
    of_method = {key: value for key, value in values.items() if key.startswith("method.")}
    table = set_keys(table, {key: value for key, value in values.items() if key not in of_method})
    table = {**table, "compare": {**table.get("compare", {}), label: tuned}}
    return set_keys(for_label(table, label), of_method)


def find_validation_split(table: Table, share: float | None) -> str:
    """Return the data's validation split, or ``share`` of its training rows. Raises ``ConfigError`` without rows."""
    config = build({key: value for key, value in table.items() if key != "compare"})
    task: Any = config.task
    if task.is_own_code:
        raise ConfigError(
            "a sweep chooses by validation rows of its task's data, and the data are Python objects; give "
            "fedlora.compare a test set of validation rows instead."
        )
    if config.clients.own_data or not hasattr(task, "test_split"):
        raise ConfigError(
            "there is no validation data to choose by, since every client has its own rows elsewhere; "
            "sweep on a data set of your own, and take over the chosen values."
        )
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"--holdout is {share}; it is a share of the training rows, between 0 and 1.")
    names = load_data(task.data, task.data_config, source.text_format(task)) if share is None else {}
    unused = [name for name in VALIDATION if name in names and name not in (task.train_split, task.test_split)]
    return unused[0] if unused else source.held_out_split(task.train_split, share or HELD_OUT)


def _outcome(cell: Cell) -> dict[str, Any]:
    """Return the final figure of a run, None if it diverged: of the shared model, or else the clients' mean."""
    outcome: dict[str, Any] = {"value": None, "by": None, "metric": None, "seconds": 0.0, "failure": cell.failure}
    if cell.summary is None:
        return outcome
    final, metric = cell.summary["final"], cell.summary["metric"]
    by = "global" if "global" in final else "clients"
    value = float(final["global"][metric["name"]] if by == "global" else final["clients"]["mean"])
    return outcome | {
        "value": value if math.isfinite(value) else None,
        "by": by,
        "over": describe_scored_clients(cell.summary) if by == "clients" else None,
        "metric": metric,
        "seconds": cell.summary["seconds"]["whole"],
    }
