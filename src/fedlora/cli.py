"""The command line: each command parses, calls one function and prints. ``--help`` imports nothing heavy."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

DISK_FULL = "the disk is full; what was written before is kept: free some space, or choose another --out."

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Fine-tune one pretrained transformer together without sharing data: federated LoRA, done exactly.",
)  # fmt: skip


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Fine-tune one pretrained transformer together without sharing data: federated LoRA, done exactly."""


Override = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads Optional
    typer.Option("-o", "--override", metavar="KEY=VALUE", help="Set one value, e.g. -o training.learning_rate=1e-3."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What to run.")]


@app.command()
def run(
    config: ConfigPath,
    override: Override = None,
    out: Annotated[Optional[Path], typer.Option(help="A new folder for the run [default: runs/NAME-N].")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Run one federation, and keep it in a folder."""
    from fedlora.config import read
    from fedlora.report import tables
    from fedlora.report.progress import Progress
    from fedlora.runs import run as execute

    resolved = read(config, override or [])
    out = out or _numbered(Path("runs") / config.stem)
    with Progress(resolved.rounds) as progress:
        result = execute(resolved, out, progress.watch)
    _print(as_json, result.summary, lambda: tables.summary(result.summary, str(out)))
    if result.summary["interrupted"]:
        _say(f"Stopped after {result.summary['rounds']} of {resolved.rounds} rounds; what was finished is in {out}.")
        raise typer.Exit(130)


@app.command()
def compare(
    config: ConfigPath,
    methods: Annotated[str, typer.Option(help="Methods by name, with commas; 'centralised' is the upper line.")],
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0",
    override: Override = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for all runs [default: runs/NAME-compare-N].")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each on one thread.")] = 1,
    as_json: Json = False,
) -> None:
    """Run the same federation under several methods and seeds, and compare them."""
    from fedlora.comparison import compare as execute
    from fedlora.comparison import rows
    from fedlora.config import overridden, read_table
    from fedlora.report import plots, tables
    from fedlora.report.progress import Cells

    table = overridden(read_table(config), override or [])
    labels = [label.strip() for label in methods.split(",") if label.strip()]
    numbers = _numbers(seeds, int, "--seeds", "0,1,2")
    out = out or _numbered(Path("runs") / f"{config.stem}-compare")
    with Cells(len(labels) * len(numbers), table.get("rounds", 20)) as progress:
        cells = execute(table, labels, numbers, out, jobs, progress.watch, progress.done)
    plots.draw(cells, out)
    _print(as_json, {"rows": rows(cells), "folder": str(out)}, lambda: tables.comparison(rows(cells)))
    _say(f"Runs, comparison.json and plots are in {out}.")


@app.command()
def methods(
    name: Annotated[Optional[str], typer.Argument(help="One method; all, where none is named.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """List the methods with their claims and costs, or show one."""
    from fedlora import catalogue
    from fedlora.report import tables

    if name is None:
        found = catalogue.entries()
        _print(as_json, found, lambda: tables.methods(found))
    else:
        one = catalogue.entry(name)
        _print(as_json, one, lambda: tables.method(one))


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's or a comparison's folder.")],
    as_json: Json = False,
) -> None:
    """Show what a run or a comparison came to."""
    from fedlora.report import read, tables

    found = read.folder(folder)
    if "rows" in found:
        _print(as_json, found, lambda: tables.comparison(found["rows"]))
    else:
        _print(as_json, found, lambda: tables.summary(found["summary"], str(folder), found["records"]))


@app.command()
def aggregate(
    adapters: Annotated[list[Path], typer.Argument(metavar="DIR...", help="PEFT adapter folders.")],
    out: Annotated[Path, typer.Option(help="The combined adapter: a new folder that PEFT loads.")],
    method: Annotated[Optional[str], typer.Option(help="[default: svd, or flora with --exact]")] = None,  # noqa: UP045
    weights: Annotated[Optional[str], typer.Option(help="Shares, e.g. 3,1,1 [default: equal].")] = None,  # noqa: UP045
    rank: Annotated[Optional[int], typer.Option(min=1, help="Of the result [default: the largest].")] = None,  # noqa: UP045
    residual: Annotated[Optional[Path], typer.Option(help="A second adapter: what the method folds.")] = None,  # noqa: UP045
    exact: Annotated[bool, typer.Option(help="One adapter with everything, of the sum of the ranks.")] = False,
    option: Annotated[Optional[list[str]], typer.Option("-o", help="A setting of the method: key=value.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Combine LoRA adapters that are trained already; no base model is needed."""
    from fedlora import aggregation
    from fedlora.report import tables

    name = method or ("flora" if exact else "svd")
    shares = None if weights is None else _numbers(weights, float, "--weights", "3,1,1")
    rule = aggregation.method_for(name, option or [])
    report = aggregation.aggregate(adapters, rule, out, shares, rank, residual, exact)
    found = {"method": name, "adapters": len(adapters), "folder": str(out), **report.as_table()}
    _print(as_json, found, lambda: tables.aggregation(found))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Annotated[Path, typer.Option(help="A new folder; with --all-clients, one folder a client in it.")],
    client: Annotated[Optional[int], typer.Option(help="This client's own model.")] = None,  # noqa: UP045
    all_clients: Annotated[bool, typer.Option("--all-clients", help="Every client's own model.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="A whole model instead of an adapter.")] = False,
    rank: Annotated[Optional[int], typer.Option(min=1, help="Cut to this rank; says what that loses.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Write a run's result as a PEFT adapter or a merged model, and check it by loading it again."""
    from fedlora import export as exporting
    from fedlora.report import tables
    from fedlora.state import absent

    if all_clients and client is not None:
        raise ValueError("--client and --all-clients exclude each other; keep one of them.")
    run = exporting.Run.open(folder)
    wanted = {absent(out) / str(k): k for k in run.clients()} if all_clients else {out: client}
    found = [exporting.export(run, path, who, rank, merged) for path, who in wanted.items()]
    _print(as_json, found, lambda: tables.exports(found))


@app.command()
def demo(
    out: Annotated[Optional[Path], typer.Option(help="A new folder [default: runs/demo-N].")] = None,  # noqa: UP045
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = max(1, min(2, os.cpu_count() or 1)),
    as_json: Json = False,
) -> None:
    """Ten parties learn handwritten digits with eight methods: no network, about a minute."""
    from fedlora.demo import play
    from fedlora.report import tables

    out = out or _numbered(Path("runs") / "demo")
    rows, figures = play(out, jobs, _say)
    _print(as_json, {"rows": rows, "figures": [str(figure) for figure in figures]}, lambda: tables.comparison(rows))
    for figure in figures:
        _say(f"Plot: {figure}")
    _say("Next: copy the configuration beside these plots, put in your own model and data, and run `fedlora run`:")
    _say(f"      fedlora run {out / 'demo.toml'} -o method.name=fedsa-lora -o rounds=20")


@app.command("new-method")
def new_method(
    name: Annotated[str, typer.Argument(help="Lower-case words joined by '-', e.g. fed-svd.")],
    paper: Annotated[Optional[str], typer.Option(help="Where it is published.")] = None,  # noqa: UP045
    root: Annotated[Path, typer.Option(help="The checkout to write into.")] = Path("."),
) -> None:
    """Write a method's skeleton and its test; the laws find it by themselves."""
    from fedlora.scaffold import new_method as write

    for path in write(name, paper, root):
        typer.echo(path)


def main() -> None:
    """The entry point: a user's mistake is one sentence on stderr and exit status 2, without a traceback."""
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        typer.echo(f"fedlora {version('fedlora')}")
        return
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        _say("Stopped.")
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("FEDLORA_TRACEBACK"):
            raise
        full = getattr(error, "errno", None) == errno.ENOSPC
        text = DISK_FULL if full else str(error)
        _say(f"fedlora: {' '.join(text.split())}")
        sys.exit(2)


def _numbers(text: str, kind: type, option: str, example: str) -> list:
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} is {text!r}; it should be {what} with commas, e.g. {example}.") from error


def _print(as_json: bool, value, table) -> None:
    if as_json:
        typer.echo(json.dumps(value, indent=2))
    else:
        table()


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _numbered(folder: Path) -> Path:
    """``folder-1``, or the first number that is free."""
    number = 1
    while (path := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return path
