"""Runs the benchmarks that are named, or all of them, in the order of ``ALL``."""

import argparse
import json
import os
import platform
from pathlib import Path

import torch

from benchmarks import (
    aggregation,
    agreement,
    checkpoints,
    engines,
    federate,
    federation,
    levers,
    logits,
    merging,
    startup,
    training,
)

ALL = {
    "training": training.measure,
    "levers": levers.measure,
    "logits": logits.measure,
    "memory": federation.memory,
    "overhead": federation.overhead,
    "federate": federate.measure,
    "aggregation": aggregation.measure,
    "merging": merging.measure,
    "agreement": agreement.measure,
    "engines": engines.measure,
    "checkpoints": checkpoints.measure,
    "startup": startup.measure,
}


def main() -> None:
    """Prints each result as it comes, and writes all as JSON where asked."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", default=list(ALL), choices=[*ALL, []])
    options.add_argument("--models", type=Path, required="FEDLORA_SHARED" not in os.environ, help="folder of models")
    options.add_argument("--data", type=Path, required="FEDLORA_SHARED" not in os.environ, help="folder of data sets")
    options.add_argument("--out", type=Path, help="a JSON file for the results")
    asked = options.parse_args()
    root = Path(os.environ.get("FEDLORA_SHARED", "."))
    models, data = asked.models or root / "models", asked.data or root / "data"
    found = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    for name in asked.names:
        found[name] = ALL[name](models, data)
        print(json.dumps({name: found[name]}, indent=2), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
