"""What was run, in plain words, and the command that runs it again."""

import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedlora.reporting.load import Run
from fedlora.reporting.tables.by_round import metric_of
from fedlora.reporting.tables.comparison import final, ranking, scored_clients
from fedlora.runs.attendance import describe_scored, fault_lines, is_complete
from fedlora.runs.file_names import CONFIG
from fedlora.runs.table import group_by
from fedlora.security.privacy import Privacy
from fedlora.text import display_safe

SOME = 12  # names in a sentence
WORDS = 120  # characters of a name in a sentence
STATES = {"under way": "is not finished (under way, or broken off)", "interrupted": "was interrupted",
          "diverged": "diverged"}  # fmt: skip


def opening(runs: Sequence[Run]) -> str:
    """What was run and what it came to, in a few sentences."""
    labels = list(group_by(runs, lambda run: run.label))
    about = _setting(runs[0].table, _adapters(runs))
    if any(_setting(run.table, "") != _setting(runs[0].table, "") for run in runs):
        about = "The runs differ in model, data or clients; their configurations are below"
    seeds = sorted({run.seed for run in runs})
    drawn = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({_listed([str(s) for s in seeds])})"
    many = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    said = " ".join(text for text in (_came_to(runs), _fewer(runs), _states(runs)) if text)
    return f"{about}, combined by {_listed(labels)}: {many}, {drawn}. {said}"


def _adapters(runs: Sequence[Run]) -> str:
    """The adapters of all runs: methods bring their own kinds."""
    tables = [run.table.get("adapter", {"name": "lora"}) for run in runs]
    names = [_short(one.get("name", "lora")) + (f" (rank {one['rank']})" if one.get("rank") else "") for one in tables]
    return _listed(list(dict.fromkeys(names))) + " "


def _setting(table: Mapping[str, Any], adapters: str) -> str:
    clients, training, task = table.get("clients", {}), table.get("training", {}), table.get("task", {})
    count, asked, epochs = clients.get("count", 10), clients.get("per_round"), training.get("local_epochs")
    cohort = f", {asked} of them a round," if asked and asked != count else ""
    work = f"{epochs} epochs" if epochs else f"{training.get('local_steps', 10)} steps"
    partition = clients.get("partition", {"name": "iid"})
    said = [f"{key} {_short(partition[key])}" for key in ("alpha", "column", "labels_per_client") if key in partition]
    rows = _short(task.get("name", "a task")) + (f" ({_short(task['data'])})" if task.get("data") else "")
    how = f"rows split by {_short(partition.get('name', 'iid'))}{f' ({said[0]})' if said else ''}"
    who = f"{count} {'client' if count == 1 else 'clients'}{cohort}"
    model = _short(table.get("model", {}).get("name", "a model"))
    return f"{who} trained {adapters}adapters of {model} for {rows}, {how}, in {table.get('rounds')} rounds of {work}"


def _came_to(runs: Sequence[Run]) -> str:
    """The best method by each kind of model, where the paired test over seeds says that it is."""
    said = []
    for key, what in (("global", "shared model"), ("clients", "clients' own models, in the mean,")):
        there = {label: own for label, own in _values(runs, key).items() if own}
        found = ranking({_short(label): own for label, own in there.items()}, runs[0].higher)
        if found is not None:
            verb = "did best with" if not found.level else "had no winner; ahead by the mean was"
            said.append(f"the {what} {verb} {found.first}: {metric_of(runs)} {found.mean:.4f} ({found.verdict})")
        elif there:
            said.append(f"the {what} reached {metric_of(runs)} {fmean(next(iter(there.values())).values()):.4f}")
    return ("At the last evaluated round " + "; ".join(said) + ".") if said else "No round has been evaluated yet."


def _fewer(runs: Sequence[Run]) -> str:
    """Which runs' figures of clients are not over all of them."""
    few = [f"{who} in {run.name}" for run in runs if (who := scored_clients(run)) != "all"]
    return f"The clients' own figures are over {_listed(few)}." if few else ""


def _values(runs: Sequence[Run], key: str) -> dict[str, dict[int, float]]:
    """Label -> the figure of each seed."""
    groups = group_by([run for run in runs if run.failure is None], lambda run: run.label)
    found = {label: {run.seed: final(run)[key] for run in own} for label, own in groups.items()}
    return {label: {k: x for k, x in own.items() if x is not None} for label, own in found.items()}


def _states(runs: Sequence[Run]) -> str:
    states = group_by([run for run in runs if run.state != "finished"], lambda run: run.state)
    said = "; ".join(f"{_listed([run.name for run in own])} {STATES[state]}" for state, own in states.items())
    return f"Of these, {said}." if said else ""


def commands(runs: Sequence[Run]) -> list[str]:
    """What repeats each run: the same configuration and seed, the same bits."""
    files = [shlex.quote(display_safe(run.folder / CONFIG, 4000)) for run in runs]
    return [f"fedlora run {file} --out {shlex.quote(f'again/{run.name}')}" for file, run in zip(files, runs)]


def hardware(run: Run) -> list[tuple[str, str]]:
    """State, seed, versions, hardware and guarantee of one run, a name and a text each."""
    summary = run.summary or {}
    rows = [
        ("state", run.state),
        ("seed", str(run.seed)),
        ("rounds", f"{len(run.digest.rounds)} of {run.digest.asked}"),
    ]
    rows += [(f"version of {display_safe(k, 60)}", display_safe(v, 60)) for k, v in summary.get("versions", {}).items()]
    rows += [(display_safe(k, 60), display_safe(v, 60)) for k, v in summary.get("machine", {}).items()]
    if not summary:
        rows.append(("versions and hardware", "written when the run ends"))
    if run.failure:
        rows.append(("why it diverged", display_safe(run.failure)))
    if summary and not is_complete(summary):
        rows.append(("clients' own figures are over", describe_scored(summary)))
        rows += fault_lines(summary)
    rows += [("resumed after round", ", ".join(map(str, summary["resumed"])))] if summary.get("resumed") else []
    rows += (
        [(name, display_safe(value)) for name, value in Privacy.describe(summary["privacy"])]
        if summary.get("privacy")
        else []
    )
    return rows + [("note", display_safe(note, 2000)) for note in summary.get("notes", ())]


def _short(value: object) -> str:
    return display_safe(value, WORDS)


def _listed(names: Sequence[str]) -> str:
    """Names with commas, and how many more there are."""
    more = f" and {len(names) - SOME} more" if len(names) > SOME else ""
    if more or len(names) == 1:
        return ", ".join(names[:SOME]) + more
    return f"{', '.join(names[:-1])} and {names[-1]}"
