"""Commands before a run: sweep, plan."""

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli import _completion
from fedlora.cli._options import (
    ConfigPath,
    Json,
    Override,
    choose_folder,
    parse_names,
    parse_numbers,
    print_result,
    say,
)  # fmt: skip

Methods = Annotated[
    str | None,
    typer.Option(
        help="Methods by name, with commas [default: the config's].", autocompletion=_completion.complete_methods
    ),
]


def sweep_command(
    config: ConfigPath,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "-o", "--override", metavar="KEY=A,B,C",
            help="Values to try, e.g. -o training.learning_rate=1e-4,1e-3; one value is set for all trials.",
        ),
    ] = None,
    methods: Methods = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas; a trial's figure is their mean.")] = "0",
    holdout: Annotated[
        float | None,
        typer.Option(help="Choose by this share of the training rows [default: the data's validation rows, or 0.1]."),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Draw so many instead of all combinations.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder; a sweep that was stopped continues there.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each on one thread.")] = 1,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Try settings on validation rows, as many for every method, and write down the best."""
    from fedlora.reporting.tables import sweep as tables
    from fedlora.runs.progress import Cells
    from fedlora.runs.sweep import Sweep
    from fedlora.schema import read_table

    numbers = parse_numbers(seeds, int, "--seeds", "0,1,2")
    sweep = Sweep.plan(read_table(config), override or [], parse_names(methods), numbers, holdout, trials)
    folder = out or choose_folder(f"{config.stem}-sweep")
    with Cells(len(sweep.trials) * len(sweep.seeds), sweep.table.get("rounds", 20)) as progress:
        try:
            result = sweep.run(folder, jobs, progress.watch, progress.finish)
        except KeyboardInterrupt:
            say(f"Finished trials are in {folder}; the same command with --out {folder} goes on.")
            raise
    command = tables.format_next_command(result, str(folder))
    print_result(as_json, {**result, "folder": str(folder)}, lambda: tables.tabulate_sweep(result), command)
    say(f"sweep.json, chosen.toml and the trials are in {folder}.")


def plan_command(config: ConfigPath, override: Override = None, methods: Methods = None, as_json: Json = False) -> None:
    """Estimate the costs of a run before it begins: bytes, memory, operations; and report errors in the settings."""
    from fedlora.reporting.tables.plan import tabulate_plan, tabulate_plans
    from fedlora.runs.plan.plan import find_problems, plan_methods
    from fedlora.schema import apply_overrides, read_table

    table = apply_overrides(read_table(config), override or [])
    errors = find_problems(table)
    if errors:
        for sentence in errors:
            say(f"fedlora: {' '.join(sentence.split())}")
        print_result(as_json, {"problems": errors})
        raise typer.Exit(2)
    result = plan_methods(table, parse_names(methods))
    print_result(as_json, result, lambda: tabulate_plan(result[0]) if len(result) == 1 else tabulate_plans(result))
