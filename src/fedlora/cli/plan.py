"""Commands before a run: sweep, plan."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from fedlora.cli import _completion as completing
from fedlora.cli._options import ConfigPath, Json, Override, answer, names, numbered, numbers, say

Swept = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads Optional
    typer.Option(
        "-o", "--override", metavar="KEY=A,B,C",
        help="Values to try, e.g. -o training.learning_rate=1e-4,1e-3; one value is set for all trials.",
    ),
]  # fmt: skip
Methods = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Methods by name, with commas [default: the config's].", autocompletion=completing.methods),
]


def sweep(
    config: ConfigPath,
    override: Swept = None,
    methods: Methods = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas; a trial's figure is their mean.")] = "0",
    holdout: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Choose by this share of the training rows [default: the data's validation rows, or 0.1]."),
    ] = None,
    trials: Annotated[Optional[int], typer.Option(min=1, help="Draw so many instead of all combinations.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="A folder; a sweep that was stopped goes on there.")] = None,  # noqa: UP045
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each on one thread.")] = 1,
    as_json: Json = False,
) -> None:
    """Try settings on validation rows, as many for every method, and write down the best."""
    from fedlora.reporting import terminal
    from fedlora.reporting.tables import sweep as tables
    from fedlora.runs.config import read_table
    from fedlora.runs.progress import Cells
    from fedlora.runs.sweep import Sweep

    drawn = numbers(seeds, int, "--seeds", "0,1,2")
    planned = Sweep.plan(read_table(config), override or [], names(methods), drawn, holdout, trials)
    folder = out or numbered(Path("runs") / f"{config.stem}-sweep")
    with Cells(len(planned.trials) * len(planned.seeds), planned.table.get("rounds", 20)) as progress:
        try:
            found = planned.run(folder, jobs, progress.watch, progress.done)
        except KeyboardInterrupt:
            say(f"Finished trials are in {folder}; the same command with --out {folder} goes on.")
            raise
    command = tables.next_command(found, str(folder))
    answer(as_json, {**found, "folder": str(folder)}, lambda: terminal.show(*tables.sweep(found), whole=command))
    say(f"sweep.json, chosen.toml and the trials are in {folder}.")


def plan(config: ConfigPath, override: Override = None, methods: Methods = None, as_json: Json = False) -> None:
    """Say what a run will take before anything is spent: bytes, memory, operations, and what is wrong."""
    from fedlora.reporting import terminal
    from fedlora.reporting.tables.plan import plan as one
    from fedlora.reporting.tables.plan import plans
    from fedlora.runs.config import apply_overrides, read_table
    from fedlora.runs.plan.plan import planned, problems

    table = apply_overrides(read_table(config), override or [])
    wrong = problems(table)
    if wrong:
        for sentence in wrong:
            say(f"fedlora: {' '.join(sentence.split())}")
        answer(as_json, {"problems": wrong}, lambda: None)
        raise typer.Exit(2)
    found = planned(table, names(methods))
    answer(as_json, found, lambda: terminal.show(*(one(found[0]) if len(found) == 1 else plans(found))))
