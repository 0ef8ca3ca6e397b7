"""Every method on the embedded demo, round by round: what the curves on the methods' pages are drawn from.

``python -m benchmarks.curves --seeds 0,1,2`` adds one JSON line a method and seed to docs/results/demo-curves.jsonl. A
line that is there is never measured again; ``--again`` measures anew, and ``--of DIR`` first takes what a finished
comparison of this configuration (a ``fedlora demo``, say) holds already.
One learning rate for all: these curves show how a
method behaves, and do not rank methods.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

BOOK = Path(__file__).parents[1] / "docs" / "results" / "demo-curves.jsonl"

DECIDES = ("rounds", "seed", "model", "task", "clients", "adapter", "method", "training")  # its figures follow from


def read(book: Path = BOOK) -> list[dict[str, Any]]:
    """What was measured; none where nothing was."""
    return [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []


def table() -> dict[str, Any]:
    """The configuration of ``fedlora demo``."""
    from fedlora.schema import read_table

    with as_file(files("fedlora.cli") / "templates" / "demo.toml") as path:
        return read_table(path)


def points(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each round: accuracy of the shared model and of the clients' own, megabytes so far, the error served."""
    found = []
    sizes = itertools.accumulate(sum(sum(row["bytes"][d].values()) for d in ("up", "down")) for row in records)
    for row, size in zip(records, sizes):
        shared = row.get("global", {}).get("accuracy")
        error = row.get("errors", {}).get("served")
        point = {"round": row["round"], "mb": round(size / 1e6, 4), "clients": round(row["clients"]["mean"], 4)}
        point |= {} if shared is None else {"global": round(shared, 4)}
        found.append(point | ({} if error is None else {"error": round(error, 5)}))
    return found


def measure(name: str, seed: int) -> dict[str, Any]:
    """One run of the demo under a method."""
    from fedlora.runs.compare import execute, plan_cells
    from fedlora.runs.folder import RunFolder

    with tempfile.TemporaryDirectory() as folder:
        (cell,) = plan_cells(table(), [name], [seed], Path(folder))
        done = execute(cell)
        found = points(RunFolder(Path(str(done.folder))).records) if done.failure is None else []
    return {"method": name, "seed": seed, "failure": done.failure, "rounds": found}


def taken(folder: Path, known: set[tuple[str, int]]) -> list[dict[str, Any]]:
    """The runs of a comparison of the demo that are not known yet; ``ValueError`` for another configuration."""
    from fedlora.runs.compare import for_label
    from fedlora.runs.config import build
    from fedlora.runs.folder import RunFolder

    found = []
    for run in json.loads((folder / "comparison.json").read_text())["runs"]:
        if (run["label"], run["seed"]) in known or run["failure"]:
            continue
        due = build({**for_label(table(), run["label"]), "seed": run["seed"]})
        if any(_differs(run["table"].get(key), due.table[key]) for key in DECIDES):
            raise ValueError(f"{run['label']} in {folder} is no run of the demo's configuration; name another folder.")
        rounds = points(RunFolder(folder / Path(run["folder"]).name).records)
        found.append({"method": run["label"], "seed": run["seed"], "failure": None, "rounds": rounds})
    return found


def _differs(there: Any, due: Any) -> bool:
    """Whether a setting is another; one that a version does not know yet has its default."""
    if isinstance(there, Mapping) and isinstance(due, Mapping):
        return any(key not in due or _differs(value, due[key]) for key, value in there.items())
    return bool(there != due)


def add(row: Mapping[str, Any]) -> None:
    """One more line."""
    with BOOK.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['method']}, seed {row['seed']}: {row['failure'] or row['rounds'][-1]}", flush=True)


def main() -> None:
    """Measures what is missing, seed by seed."""
    from fedlora.methods import METHODS

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--of", type=Path, help="a finished comparison to take runs from")
    options.add_argument("--again", action="store_true", help="measure anew")
    asked = options.parse_args()
    if asked.again:
        BOOK.unlink(missing_ok=True)
    known = {(row["method"], row["seed"]) for row in read()}
    for row in taken(asked.of, known) if asked.of else ():
        add(row)
    known = {(row["method"], row["seed"]) for row in read()}
    for seed, name in itertools.product([int(seed) for seed in asked.seeds.split(",") if seed], METHODS.names()):
        if (name, seed) not in known:
            add(measure(name, seed))


if __name__ == "__main__":
    main()
