"""The small twins of the papers' experiments: tuned with equal trials, run with several seeds, kept as JSON lines.

``python -m benchmarks.studies NAME... --models DIR --data DIR --minutes 60`` runs what is still missing and stops in
time; what was finished is never run again. ``python -m benchmarks.study_tables`` makes the tables of it.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedlora import run
from fedlora.export.peft import export_model
from fedlora.runs.compare import execute, for_label
from fedlora.runs.comparison import Cell
from fedlora.runs.config import build
from fedlora.runs.folder import RunFolder
from fedlora.schema import Table, apply_overrides, read_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
TUNING_SEED = 100  # another split, start and order than any seed that is reported
STARTING_SEED = 1000  # of the run that a study's start is taken from
SEEDS = (0, 1, 2)
STARTS = ROOT / "build" / "starts"
# Ids of the configurations -> folders of --models and --data, for machines without a network.
LOCAL = {
    "sentence-transformers/all-MiniLM-L6-v2": "minilm-l6-h384", "vit-mini-cifar10": "vit-mini-cifar10",
    "mteb/banking77": "banking77", "nyu-mll/glue": "glue_qnli_dev", "pneumoniamnist": "pneumoniamnist",
    "femnist_digits": "femnist_digits", "stories260k-llama": "stories260k-llama",
    "shakespeare_roles": "shakespeare_roles", "databricks/databricks-dolly-15k": "dolly15k",
}  # fmt: skip
SPENT = ("epsilon", "delta", "noise_multiplier", "clip", "sampling_rate")
SHARED_METHODS = ("fedit", "ffa-lora", "rolora", "flexlora", "fedex-lora", "flora-na", "fedrot-lora", "svd")


@dataclass(frozen=True)
class Study:
    """One comparison in one or several settings; each label tunes one number, all in as many trials."""

    config: str
    labels: tuple[str, ...]
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})  # name -> overrides
    rates: tuple[float, ...] = (6e-3, 2e-2, 6e-2)  # what is tried of ``tuned``
    tuned: str = "training.learning_rate"
    tuned_at: str = ""  # the setting in which rates are tried
    clients: bool = False  # judge by the clients' own models, for shared models too
    start: tuple[str, ...] = ()  # overrides of a run whose adapter all runs begin at; none: each begins at nothing


SKEWS = {
    "Dirichlet 0.5": "clients.partition.alpha=0.5",
    "Dirichlet 0.1": "clients.partition.alpha=0.1",
    "inner Dirichlet 0.1": "clients.partition={name='inner-dirichlet', alpha=0.1}",
}


def _cohorts(many: str = "Dirichlet 0.1") -> dict[str, tuple[str, ...]]:
    """Sizes by skew; ``many``: the strong one of 10 and 50 clients, of whom some may get no row of few labels."""
    sizes = {
        "3 clients": ("clients.count=3", "training.local_steps=10"),
        "10 clients": (),
        "50 clients": ("clients.count=50", "clients.per_round=10"),
    }
    strong = [("3 clients", "Dirichlet 0.1"), ("10 clients", many), ("50 clients", many)]
    pairs = [*((size, "Dirichlet 0.5") for size in sizes), *strong]
    return {f"{size}, {skew}": (*sizes[size], SKEWS[skew]) for size, skew in pairs}


RAVAN = ("fedit", "ffa-lora", "fedex-lora", "fed-sb", "ravan", "constant-scales", "normal-basis")
FEDSA = (
    "fedit", "local", "ffa-lora", "fedsa-lora", "fedit-rslora", "fedsa-rslora", "fedit-vera", "fedsa-vera",
)  # fmt: skip
ALONE = ("clients.count=1", "rounds=3", "evaluation.every=3", "training.local_steps=100", "training.learning_rate=2e-3")
WRITING = ("fedit", "local", "fedex-lora", "flexlora", "flora-na", "svd", "fedsa-lora")
PRIVATE = ("fedit", "ffa-lora", "fedsa-lora", "ravan")
# Noise grows with the numbers that are sent, so few are; at the client level it falls with the size of a cohort.
SMALL = ("clients.partition={name='iid'}", "adapter.rank=2", "adapter.alpha=4")
BY_CLIENT = (
    "privacy.level=client", "clients.count=800", "clients.sampling=poisson", "clients.rate=0.1",
    "rounds=20", "evaluation.every=20", "training.local_steps=1", *SMALL,
)  # fmt: skip
BY_EXAMPLE = (
    "privacy.level=example", "clients.count=3", "training.batch_size=48",
    "rounds=5", "evaluation.every=5", "training.local_steps=8", *SMALL,
)  # fmt: skip


def _epsilons(level: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Budgets by name; without noise a run only clips: the line to beat."""
    budgets = {f"ε = {target}": f"privacy.target_epsilon={target}" for target in (20, 8, 3)}
    return {name: (*level, own) for name, own in {"no noise": "privacy.noise_multiplier=0.0", **budgets}.items()}


STUDIES = {
    "privacy-client": Study(
        "fedrot-lora/banking77-small.toml", PRIVATE, _epsilons(BY_CLIENT), (0.3, 1, 3, 10), "privacy.clip", "ε = 8"
    ),
    "privacy-example": Study(
        "fedrot-lora/banking77-small.toml", PRIVATE, _epsilons(BY_EXAMPLE), (6e-3, 2e-2, 6e-2, 2e-1), tuned_at="ε = 8"
    ),
    "aggregation-banking77": Study(
        "fedrot-lora/banking77-small.toml", SHARED_METHODS, _cohorts(), tuned_at="10 clients, Dirichlet 0.5"
    ),
    "aggregation-qnli": Study(
        "fedrot-lora/qnli-small.toml",
        SHARED_METHODS,
        _cohorts(many="inner Dirichlet 0.1"),
        (6e-4, 2e-3, 6e-3),
        tuned_at="10 clients, Dirichlet 0.5",
        start=(*ALONE, f"seed={STARTING_SEED}"),
    ),
    "fedsa-label-skew": Study("fedsa-lora/label-skew-small.toml", FEDSA, rates=(2e-3, 6e-3, 2e-2, 6e-2), clients=True),
    "fedsa-concept-shift": Study(
        "fedsa-lora/concept-shift-small.toml", FEDSA, rates=(2e-3, 6e-3, 2e-2, 6e-2), clients=True
    ),
    "ravan-pneumonia": Study("ravan/pneumonia-small.toml", RAVAN, rates=(1.5e-4, 5e-4, 2e-3, 6e-3, 2e-2)),
    "ravan-femnist": Study("ravan/femnist-small.toml", RAVAN, rates=(5e-4, 2e-3, 6e-3, 2e-2)),
    "ravan-capability": Study(
        "ravan/capability-small.toml",
        ("flexlora", "hetlora", "ravan"),
        {name: (f"clients.capability={name}",) for name in ("uniform", "bell", "skewed")},
        rates=(5e-4, 2e-3, 6e-3, 2e-2),
        tuned_at="uniform",
    ),
    "generation-shakespeare": Study("flora-na/shakespeare-small.toml", WRITING, rates=(2e-3, 6e-3, 2e-2), clients=True),
    "generation-dolly": Study("flora-na/dolly-small.toml", WRITING, rates=(2e-3, 6e-3, 2e-2), clients=True),
}


@dataclass
class Book:
    """The finished runs of a study, a JSON line each."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, folder: Path = RESULTS) -> "Book":
        path = folder / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return cls(path, [json.loads(line) for line in lines])

    def find(self, **keys: Any) -> dict[str, Any] | None:
        return next(iter(self.all(**keys)), None)

    def all(self, **keys: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if all(row.get(k) == v for k, v in keys.items())]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def missing(study: Study, book: Book) -> Iterator[tuple[dict[str, Any], Sequence[str]]]:
    """What is still to run, with its overrides: first every trial, then the seeds at the best rate."""
    for label in study.labels:
        for rate in study.rates:
            key = {"phase": "trial", "setting": study.tuned_at, "label": label, "rate": rate, "seed": TUNING_SEED}
            if book.find(**key) is None:
                yield key, (*study.settings[study.tuned_at], "task.test_split=validation")
    for seed in SEEDS:
        for setting, overrides in study.settings.items():
            for label in study.labels:
                rate = best_rate(study, book, label)
                key = {"phase": "run", "setting": setting, "label": label, "rate": rate, "seed": seed}
                if book.find(**key) is None:
                    yield key, overrides


def best_rate(study: Study, book: Book, label: str) -> float:
    """The rate whose trial ended best; a trial that diverged is the worst."""
    trials = [book.find(phase="trial", label=label, rate=rate) for rate in study.rates]
    done = [row for row in trials if row is not None and row["value"] is not None]
    if not done:
        raise ValueError(f"every trial of {label} diverged; give it smaller rates.")
    best = max if done[0]["higher"] else min
    return float(best(done, key=lambda row: row["value"])["rate"])


def table(study: Study, key: Mapping[str, Any], overrides: Sequence[str], models: Path, data: Path) -> Table:
    """The configuration of one run, on local copies where there are any."""
    found = apply_overrides(read_table(ROOT / "examples" / "papers" / study.config), overrides)
    found = for_label(found, key["label"])
    found = apply_overrides(found, [f"{study.tuned}={key['rate']}", f"seed={key['seed']}"])
    if study.start:
        found["model"] = {**found["model"], "start": str(start(study, models, data))}
    return local(found, models, data, "validation" if key["phase"] == "trial" else "test")


def start(study: Study, models: Path, data: Path) -> Path:
    """The PEFT adapter that a study's runs begin at, trained where it is not there yet."""
    folder = STARTS / Path(study.config).stem
    if not folder.exists():
        own = apply_overrides(read_table(ROOT / "examples" / "papers" / study.config), study.start)
        with TemporaryDirectory() as made:
            found = run(build(local(own, models, data, "test")), Path(made) / "run").summary["final"]["global"]
            export_model(RunFolder.open(Path(made) / "run"), folder)
        print("start of", study.config, json.dumps(found), flush=True)
    return folder


def local(found: Table, models: Path, data: Path, split: str) -> Table:
    """A configuration on local copies, which are one configuration of their data and have all three splits."""
    for section, entry, folder in (("model", "name", models), ("task", "data", data)):
        copy = folder / LOCAL[found[section][entry]]
        if not copy.exists():
            raise ValueError(f"there is no {str(copy)!r}; --models and --data name folders of local copies.")
        found[section][entry] = str(copy)
    if "data_config" in found["task"]:
        found["task"] = {k: v for k, v in found["task"].items() if k not in ("data_config", "train_rows", "test_split")}
        found["task"]["test_split"] = split
    return found


def figures(cell: Cell, clients: bool) -> dict[str, Any]:
    """What is kept of a run: the metric (``clients``: always the mean over clients), all figures, errors and bytes."""
    if cell.summary is None:
        return {"value": None, "higher": True, "failure": cell.failure}
    s = cell.summary
    final = s["final"]
    own = s["personal"] or clients
    value = final["clients"]["mean"] if own else final["global"][s["metric"]["name"]]
    return {
        "value": value,
        "metric": s["metric"]["name"],
        "higher": s["metric"]["higher"],
        "global": final.get("global"),
        "clients": {k: v for k, v in final["clients"].items() if clients or k != "each"},
        "errors": s["errors"],
        "bytes": {d: sum(s["bytes"][d].values()) for d in ("up", "down")},
        "seconds": s["seconds"]["whole"],
        **({"privacy": {k: s["privacy"][k] for k in SPENT}} if "privacy" in s else {}),
    }


def main() -> None:
    """Runs what is missing of the named studies, as far as the time goes."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", default=list(STUDIES), choices=[*STUDIES, []])
    options.add_argument("--models", type=Path, required=True, help="folder of models")
    options.add_argument("--data", type=Path, required=True, help="folder of data sets")
    options.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    asked, began = options.parse_args(), time.monotonic()
    for name in asked.names or STUDIES:
        study, book = STUDIES[name], Book.of(name)
        while time.monotonic() - began < asked.minutes * 60:
            following = next(missing(study, book), None)
            if following is None:
                break
            key, overrides = following
            own = table(study, key, overrides, asked.models, asked.data)
            build(own)
            row = {**key, **figures(execute(Cell(key["label"], key["seed"], own, None), threads=1), study.clients)}
            book.add(row)
            print(name, json.dumps({k: row.get(k) for k in (*key, "value", "seconds")}), flush=True)


if __name__ == "__main__":
    main()
