"""Commands that plan and run federations: plan, run, resume, compare, sweep, demo."""

import os
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli import _completion
from fedlora.cli._options import (
    ConfigPath,
    Json,
    Methods,
    Override,
    choose_folder,
    parse_names,
    parse_numbers,
    print_result,
    say,
)  # fmt: skip

DEMO_METHODS = ("fedit", "ffa-lora", "rolora", "flora-na", "fedrot-lora", "fedsa-lora", "ravan", "local")
EngineName = Annotated[str | None, typer.Option(help="inprocess or flower-simulation.")]


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


def run_command(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="The configuration; not needed with --parties.")
    ] = None,
    override: Override = None,
    parties: Annotated[
        str | None,
        typer.Option(
            help="The TOML files of parties with their own data, with commas: play them all here, a client each."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for the run [default: runs/NAME-N].")] = None,
    engine: EngineName = None,
    as_json: Json = False,
) -> None:
    """Run one federation, and keep it in a folder."""
    from fedlora.runs.config import read
    from fedlora.runs.party_files import read_parties
    from fedlora.runs.progress import Progress
    from fedlora.runs.run import run_config

    overrides = [*(override or []), *([f"engine.name={engine}"] if engine else [])]
    if parties is not None:
        resolved = read_parties(parse_names(parties), config, overrides, lambda text: say(f"Note: {text}"))
    elif config is not None:
        resolved = read(config, overrides)
    else:
        raise ValueError("no configuration is named; name a TOML file, or those of all parties with --parties.")
    out = out or choose_folder(config.stem if config is not None else "parties")
    with Progress(resolved.rounds) as progress:
        result = run_config(resolved, out, progress.watch)
    _print_summary(result.summary, out, as_json)


def resume_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was broken off.")],
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds in all [default: as configured].")] = None,
    override: Override = None,
    engine: EngineName = None,
    as_json: Json = False,
) -> None:
    """Continue a run from its last checkpoint, with the bits of one that was never broken off."""
    from fedlora.runs.folder import RunFolder
    from fedlora.runs.progress import Progress
    from fedlora.runs.resume import read_resumable
    from fedlora.runs.run import run_config

    resolved = read_resumable(folder, rounds, [*(override or []), *([f"engine.name={engine}"] if engine else [])])
    with Progress(resolved.rounds - len(RunFolder(folder).records)) as progress:
        result = run_config(resolved, folder, progress.watch, again=True)
    _print_summary(result.summary, folder, as_json)


def _print_summary(summary, folder: Path, as_json: bool) -> None:
    """Print a run's results; exit with status 130 if Ctrl-C ended it."""
    from fedlora.reporting.tables.run import tabulate_summary

    print_result(as_json, summary, lambda: tabulate_summary(summary), [f"Folder: {folder}"])
    if summary["interrupted"]:
        done = f"{summary['rounds']} of {summary['rounds_asked']} rounds"
        say(f"Stopped after {done}; what was finished is in {folder}: `fedlora resume {folder}` goes on.")
        raise typer.Exit(130)


def compare_command(
    config: ConfigPath,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods by name, with commas; 'centralised' is the upper line.",
            autocompletion=_completion.complete_methods,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0",
    override: Override = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for all runs [default: runs/NAME-compare-N].")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each on one thread.")] = 1,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="One run, and the aggregates of other methods for its uploads.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the same federation under several methods and seeds, and compare them."""
    from fedlora.reporting.figures import draw_comparison
    from fedlora.reporting.load import load_cells
    from fedlora.reporting.tables.comparison import tabulate_comparison
    from fedlora.runs.compare import compare_methods
    from fedlora.runs.comparison import comparison_rows
    from fedlora.runs.progress import Cells
    from fedlora.schema import apply_overrides, read_table

    table, labels = apply_overrides(read_table(config), override or []), parse_names(methods)
    if oracle:
        return _compare_uploads(table, labels, out or choose_folder(f"{config.stem}-oracle"), as_json)
    if not labels:
        raise ValueError("--methods names no method; write them with commas, e.g. --methods fedit,fedsa-lora,local.")
    numbers = parse_numbers(seeds, int, "--seeds", "0,1,2")
    out = out or choose_folder(f"{config.stem}-compare")
    with Cells(len(labels) * len(numbers), table.get("rounds", 20)) as progress:
        try:
            cells = compare_methods(table, labels, numbers, out, jobs, progress.watch, progress.finish)
        except KeyboardInterrupt:
            say(
                f"The runs that were finished are in {out}, each in a folder of its own; the same command with "
                f"--out {out} goes on."
            )
            raise
    draw_comparison(load_cells(cells), out)
    result = comparison_rows(cells)
    print_result(as_json, {"rows": result, "folder": str(out)}, lambda: tabulate_comparison(result))
    say(f"Runs, comparison.json and plots are in {out}.")


def _compare_uploads(table, labels: list[str], out: Path, as_json: bool) -> None:
    from fedlora.reporting.tables.comparison import tabulate_oracle
    from fedlora.runs.compare import compare_aggregation
    from fedlora.runs.progress import Progress

    with Progress(table.get("rounds", 20)) as progress:
        result, uploads = compare_aggregation(table, labels, out, progress.watch)
    value = {"rows": result, "uploads": uploads, "folder": str(out)}
    print_result(as_json, value, lambda: tabulate_oracle(result, uploads))
    say(f"The run and oracle.json are in {out}.")


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


def demo_command(
    out: Annotated[Path | None, typer.Option(help="A new folder [default: runs/demo-N].")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at the same time [default: 2, or 1 on one core].", show_default=False)
    ] = max(1, min(2, os.cpu_count() or 1)),
    as_json: Json = False,
) -> None:
    """Ten clients learn handwritten digits with eight methods: no network, one to three minutes."""
    from fedlora.reporting.figures import draw_comparison
    from fedlora.reporting.load import load_cells
    from fedlora.reporting.tables.comparison import tabulate_comparison
    from fedlora.runs.compare import compare_methods
    from fedlora.runs.comparison import comparison_rows
    from fedlora.runs.progress import Cells
    from fedlora.schema import read_table

    out = out or choose_folder("demo")
    with as_file(files("fedlora.cli") / "templates" / "demo.toml") as path:
        table = read_table(path)
        say("Ten clients, 1,347 handwritten digits between them, unevenly split; a small ViT that was pretrained on")
        say("letters. Each trains a LoRA of rank 4 on its own digits; eight ways to combine them:")
        with Cells(len(DEMO_METHODS), table["rounds"]) as progress:
            cells = compare_methods(table, DEMO_METHODS, [table["seed"]], out, jobs, progress.watch, progress.finish)
        shutil.copy(path, out / "demo.toml")
    rows, figures = comparison_rows(cells), draw_comparison(load_cells(cells), out)
    result = {"rows": rows, "figures": [str(figure) for figure in figures]}
    print_result(as_json, result, lambda: tabulate_comparison(rows))
    for figure in figures:
        say(f"Plot: {figure}")
    say("Next: copy the configuration beside these plots, put in your own model and data, and run `fedlora run`:")
    say(f"      fedlora run {out / 'demo.toml'} -o method.name=fedsa-lora -o rounds=20")
