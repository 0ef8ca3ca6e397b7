"""Commands on finished runs and adapters: show, personal, aggregate, export."""

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._options import Json, parse_numbers, print_result


def show_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's or a comparison's folder.")],
    as_json: Json = False,
) -> None:
    """Show the results of a run or of a comparison."""
    from fedlora.reporting.tables.comparison import tabulate_comparison
    from fedlora.reporting.tables.run import tabulate_summary
    from fedlora.runs.file_names import COMPARISON
    from fedlora.runs.folder import RunFolder, read_json

    if (folder / COMPARISON).exists():
        result = read_json(folder / COMPARISON)
        return print_result(as_json, result, lambda: tabulate_comparison(result["rows"]))
    run = RunFolder(folder)
    lines = (*run.summary.get("notes", ()), f"Folder: {folder}")
    result = {"summary": run.summary, "records": run.records}
    print_result(as_json, result, lambda: tabulate_summary(run.summary, run.records), lines)


def personal_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; its data must still be there.")],
    steps: Annotated[int, typer.Option(min=1, help="Of the local fine-tuning.")] = 20,
    as_json: Json = False,
) -> None:
    """Score global, personal, fine-tuned, local-only and centralised models side by side, client by client."""
    from fedlora.reporting.tables.run import tabulate_personal
    from fedlora.runs.folder import RunFolder
    from fedlora.runs.personalization import evaluate_personalization
    from fedlora.runs.progress import Progress

    run = RunFolder.open(folder)
    with Progress(2 * run.summary["rounds"]) as progress:  # of the local-only and of the centralised run
        result = evaluate_personalization(run, steps, progress.watch)
    print_result(as_json, result, lambda: tabulate_personal(result), [f"Folder: {folder}"])


def aggregate_command(
    adapters: Annotated[list[Path], typer.Argument(metavar="DIR...", help="PEFT adapter folders.")],
    out: Annotated[Path, typer.Option(help="The combined adapter: a new folder that PEFT loads.")],
    method: Annotated[str | None, typer.Option(help="[default: svd, or flora with --exact]")] = None,
    weights: Annotated[str | None, typer.Option(help="Shares, e.g. 3,1,1 [default: equal].")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the result [default: the largest].")] = None,
    residual: Annotated[Path | None, typer.Option(help="A second adapter: the method's base update.")] = None,
    exact: Annotated[bool, typer.Option(help="One adapter with everything, of the sum of the ranks.")] = False,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="The adapters' base models are one, under different names.")
    ] = False,
    option: Annotated[list[str] | None, typer.Option("-o", help="A setting of the method: key=value.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor [default: all].")] = None,
    as_json: Json = False,
) -> None:
    """Combine trained LoRA adapters; no base model is needed."""
    from fedlora.api import aggregate
    from fedlora.export.aggregate import tabulate_aggregation

    shares = None if weights is None else parse_numbers(weights, float, "--weights", "3,1,1")
    report = aggregate(
        adapters, out, method, shares, rank, residual, exact, same_base=same_base, settings=option or [], device=device,
        threads=threads,
    )  # fmt: skip
    result = report.as_table()
    print_result(as_json, result, lambda: [tabulate_aggregation(result)])


def export_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Annotated[Path, typer.Option(help="A new folder; with --all-clients, one folder a client in it.")],
    client: Annotated[int | None, typer.Option(help="This client's own model.")] = None,
    all_clients: Annotated[bool, typer.Option("--all-clients", help="Every client's own model.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="A whole model instead of an adapter.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Truncate to this rank, and report the loss.")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's result as a PEFT adapter or a merged model, and check it by loading it again."""
    from fedlora.export.peft import export_model, tabulate_exports
    from fedlora.files import check_new_folder
    from fedlora.runs.folder import RunFolder

    if all_clients and client is not None:
        raise ValueError("--client and --all-clients exclude each other; keep one of them.")
    run = RunFolder.open(folder)
    targets = {check_new_folder(out) / str(k): k for k in run.clients()} if all_clients else {out: client}
    result = [export_model(run, path, number, rank, merged) for path, number in targets.items()]
    print_result(as_json, result, lambda: [tabulate_exports(result)])
