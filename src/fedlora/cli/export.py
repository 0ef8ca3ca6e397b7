"""Commands that work on what is there: show, personal, aggregate, export."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from fedlora.cli._options import Json, answer, numbers


def show(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's or a comparison's folder.")],
    as_json: Json = False,
) -> None:
    """Show what a run or a comparison came to."""
    from fedlora.reporting import terminal
    from fedlora.reporting.tables.comparison import compared
    from fedlora.reporting.tables.run import summary
    from fedlora.runs.file_names import COMPARISON
    from fedlora.runs.folder import RunFolder, read_json

    if (folder / COMPARISON).exists():
        found = read_json(folder / COMPARISON)
        answer(as_json, found, lambda: terminal.show(*compared(found["rows"])))
    else:
        run = RunFolder(folder)
        found = {"summary": run.summary, "records": run.records}
        whole = (*run.summary.get("notes", ()), f"Folder: {folder}")
        answer(as_json, found, lambda: terminal.show(*summary(run.summary, run.records), whole=whole))


def personal(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; its data must still be there.")],
    steps: Annotated[int, typer.Option(min=1, help="Of the local fine-tuning.")] = 20,
    as_json: Json = False,
) -> None:
    """Score global, personal, fine-tuned, local-only and centralised models side by side, client by client."""
    from fedlora.reporting import terminal
    from fedlora.reporting.tables.personalization import personal as tables
    from fedlora.runs.folder import RunFolder
    from fedlora.runs.personalization import personal as score
    from fedlora.runs.progress import Progress

    run = RunFolder.open(folder)
    with Progress(2 * run.summary["rounds"]) as progress:  # of the local-only and of the centralised run
        found = score(run, steps, progress.watch)
    answer(as_json, found, lambda: terminal.show(*tables(found), whole=(f"Folder: {folder}",)))


def aggregate(
    adapters: Annotated[list[Path], typer.Argument(metavar="DIR...", help="PEFT adapter folders.")],
    out: Annotated[Path, typer.Option(help="The combined adapter: a new folder that PEFT loads.")],
    method: Annotated[Optional[str], typer.Option(help="[default: svd, or flora with --exact]")] = None,  # noqa: UP045
    weights: Annotated[Optional[str], typer.Option(help="Shares, e.g. 3,1,1 [default: equal].")] = None,  # noqa: UP045
    rank: Annotated[Optional[int], typer.Option(min=1, help="Of the result [default: the largest].")] = None,  # noqa: UP045
    residual: Annotated[Optional[Path], typer.Option(help="A second adapter: what the method folds.")] = None,  # noqa: UP045
    exact: Annotated[bool, typer.Option(help="One adapter with everything, of the sum of the ranks.")] = False,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="The adapters' base models are one, under different names.")
    ] = False,
    option: Annotated[Optional[list[str]], typer.Option("-o", help="A setting of the method: key=value.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is one.")] = "auto",
    threads: Annotated[Optional[int], typer.Option(min=1, help="Of the processor [default: all].")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Combine LoRA adapters that are trained already; no base model is needed."""
    from fedlora.export import aggregate as aggregation
    from fedlora.reporting import terminal
    from fedlora.reporting.tables.adapters import aggregation as table
    from fedlora.training.device import Engine

    name = method or ("flora" if exact else "svd")
    shares = None if weights is None else numbers(weights, float, "--weights", "3,1,1")
    rule = aggregation.method_for(name, option or [])
    engine = Engine(device=device, threads=threads)
    report = aggregation.aggregate(adapters, rule, out, shares, rank, residual, exact, engine, same_base)
    found = {"method": name, "adapters": len(adapters), "folder": str(out), **report.as_table()}
    answer(as_json, found, lambda: terminal.show(table(found)))


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
    from fedlora.export.peft import export as write
    from fedlora.files import check_new_folder
    from fedlora.reporting import terminal
    from fedlora.reporting.tables.adapters import exports
    from fedlora.runs.folder import RunFolder

    if all_clients and client is not None:
        raise ValueError("--client and --all-clients exclude each other; keep one of them.")
    run = RunFolder.open(folder)
    wanted = {check_new_folder(out) / str(k): k for k in run.clients()} if all_clients else {out: client}
    found = [write(run, path, who, rank, merged) for path, who in wanted.items()]
    answer(as_json, found, lambda: terminal.show(exports(found)))
