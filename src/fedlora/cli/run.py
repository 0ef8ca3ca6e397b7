"""Commands that run federations: run, resume, compare, demo."""

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from fedlora.cli import _completion as completing
from fedlora.cli._options import ConfigPath, Json, Override, answer, names, numbered, numbers, say


def run(
    config: ConfigPath,
    override: Override = None,
    out: Annotated[Optional[Path], typer.Option(help="A new folder for the run [default: runs/NAME-N].")] = None,  # noqa: UP045
    engine: Annotated[Optional[str], typer.Option(help="inprocess or flower-simulation.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Run one federation, and keep it in a folder."""
    from fedlora.runs.config import read
    from fedlora.runs.progress import Progress
    from fedlora.runs.run import run as execute

    resolved = read(config, [*(override or []), *([f"engine.name={engine}"] if engine else [])])
    out = out or numbered(Path("runs") / config.stem)
    with Progress(resolved.rounds) as progress:
        result = execute(resolved, out, progress.watch)
    _answered(result.summary, out, as_json)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was broken off.")],
    rounds: Annotated[Optional[int], typer.Option(min=1, help="Rounds in all [default: as it was asked].")] = None,  # noqa: UP045
    override: Override = None,
    engine: Annotated[Optional[str], typer.Option(help="inprocess or flower-simulation.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Go on with a run from its last checkpoint, with the bits of one that was never broken off."""
    from fedlora.runs.folder import RunFolder
    from fedlora.runs.progress import Progress
    from fedlora.runs.resume import continued
    from fedlora.runs.run import run as execute

    resolved = continued(folder, rounds, [*(override or []), *([f"engine.name={engine}"] if engine else [])])
    with Progress(resolved.rounds - len(RunFolder(folder).records)) as progress:
        result = execute(resolved, folder, progress.watch, again=True)
    _answered(result.summary, folder, as_json)


def _answered(summary, folder: Path, as_json: bool) -> None:
    """What a run came to; exit status 130 where Ctrl-C ended it."""
    from fedlora.reporting import terminal
    from fedlora.reporting.tables.run import summary as tables

    answer(as_json, summary, lambda: terminal.show(*tables(summary), whole=(f"Folder: {folder}",)))
    if summary["interrupted"]:
        asked = f"{summary['rounds']} of {summary['rounds_asked']} rounds"
        say(f"Stopped after {asked}; what was finished is in {folder}: `fedlora resume {folder}` goes on.")
        raise typer.Exit(130)


def compare(
    config: ConfigPath,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Methods by name, with commas; 'centralised' is the upper line.", autocompletion=completing.methods
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0",
    override: Override = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for all runs [default: runs/NAME-compare-N].")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each on one thread.")] = 1,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="One run, and what other methods would have served of its uploads.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the same federation under several methods and seeds, and compare them."""
    from fedlora.reporting import terminal
    from fedlora.reporting.figures import draw_comparison
    from fedlora.reporting.load import opened
    from fedlora.reporting.tables.comparison import compared
    from fedlora.runs.compare import compare as execute
    from fedlora.runs.comparison import comparison_rows
    from fedlora.runs.config import apply_overrides, read_table
    from fedlora.runs.progress import Cells

    table = apply_overrides(read_table(config), override or [])
    labels = names(methods)
    if oracle:
        return _oracle(table, labels, out or numbered(Path("runs") / f"{config.stem}-oracle"), as_json)
    if not labels:
        raise ValueError("--methods names no method; write them with commas, e.g. --methods fedit,fedsa-lora,local.")
    drawn = numbers(seeds, int, "--seeds", "0,1,2")
    out = out or numbered(Path("runs") / f"{config.stem}-compare")
    with Cells(len(labels) * len(drawn), table.get("rounds", 20)) as progress:
        try:
            cells = execute(table, labels, drawn, out, jobs, progress.watch, progress.done)
        except KeyboardInterrupt:
            say(
                f"The runs that were finished are in {out}, each in a folder of its own; the same command with "
                f"--out {out} goes on."
            )
            raise
    draw_comparison([opened(Path(c.folder), c.label) for c in cells if c.summary is not None], out)
    found = comparison_rows(cells)
    answer(as_json, {"rows": found, "folder": str(out)}, lambda: terminal.show(*compared(found)))
    say(f"Runs, comparison.json and plots are in {out}.")


def _oracle(table, labels: list[str], out: Path, as_json: bool) -> None:
    from fedlora.reporting import terminal
    from fedlora.reporting.tables.comparison import oracle as tables
    from fedlora.runs.compare import compare_aggregation
    from fedlora.runs.progress import Progress

    with Progress(table.get("rounds", 20)) as progress:
        found, uploads = compare_aggregation(table, labels, out, progress.watch)
    answer(
        as_json, {"rows": found, "uploads": uploads, "folder": str(out)}, lambda: terminal.show(*tables(found, uploads))
    )
    say(f"The run and oracle.json are in {out}.")


def demo(
    out: Annotated[Optional[Path], typer.Option(help="A new folder [default: runs/demo-N].")] = None,  # noqa: UP045
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at the same time [default: 2, or 1 on one core].", show_default=False)
    ] = max(1, min(2, os.cpu_count() or 1)),
    as_json: Json = False,
) -> None:
    """Ten parties learn handwritten digits with eight methods: no network, one to three minutes."""
    from fedlora.cli.demo import play
    from fedlora.reporting import terminal
    from fedlora.reporting.tables.comparison import compared

    out = out or numbered(Path("runs") / "demo")
    rows, figures = play(out, jobs, say)
    found = {"rows": rows, "figures": [str(figure) for figure in figures]}
    answer(as_json, found, lambda: terminal.show(*compared(rows)))
    for figure in figures:
        say(f"Plot: {figure}")
    say("Next: copy the configuration beside these plots, put in your own model and data, and run `fedlora run`:")
    say(f"      fedlora run {out / 'demo.toml'} -o method.name=fedsa-lora -o rounds=20")
