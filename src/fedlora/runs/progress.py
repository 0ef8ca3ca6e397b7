"""Progress on stderr (only on a terminal), and lines for a log."""

from statistics import fmean
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fedlora.engines.loop import Event
from fedlora.runs.comparison import Cell
from fedlora.text import display_safe

LENGTH = 4000  # characters of a line


class LiveBar:
    """A progress bar that is shown only on a terminal; ``total`` may be unknown."""

    def __init__(self, total: int | None, unit: str):
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.bar.disable = not self.bar.console.is_terminal
        self.task = self.bar.add_task("starting", total=total)

    def __enter__(self) -> Self:
        try:  # a Ctrl-C in the first drawing must not leave the terminal without its cursor
            self.bar.start()
        except BaseException:
            self.bar.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, count: int, description: str = "running") -> None:
        """Advance the bar."""
        self.bar.update(self.task, description=description, advance=count)


class Progress(LiveBar):
    """The progress of one run."""

    def __init__(self, rounds: int):
        super().__init__(rounds, "rounds")
        self.loss = self.spent = ""

    def watch(self, event: Event) -> None:
        """Show an event."""
        if event.epsilon is not None:
            self.spent = f", ε {event.epsilon:.2f}"
        if event.loss:  # 0 stands for a private loss
            self.loss = f", loss {event.loss:.3f}"
        if event.text:
            self.print(describe_event(event))
            return
        where = f"round {event.round + 1}" + ("" if event.client is None else f", client {event.client}")
        self.advance(1 if event.kind == "round" else 0, f"{where}{self.loss}{self.spent}")


def describe_event(event: Event) -> str:
    """Return the text of an event with its round and client; a note has neither."""
    if event.kind == "note":
        return display_safe(event.text, LENGTH)
    who = "" if event.client is None else f", client {event.client}"
    return f"round {event.round + 1}{who}: {display_safe(event.text, LENGTH)}"


class Lines:
    """Prints a line for each round and for each event with a text, for a log."""

    def __init__(self, rounds: int):
        self.rounds, self.losses = rounds, dict[int | None, float]()

    def watch(self, event: Event) -> None:
        """Print an event."""
        if event.text:
            print(("note: " if event.kind == "note" else "") + describe_event(event), flush=True)
            if event.kind == "quarantined":  # its turn does not count
                self.losses.pop(event.client, None)
        elif event.loss is not None and event.client is not None:
            self.losses[event.client] = event.loss
        elif event.kind == "round":
            mean = f", mean loss {fmean(self.losses.values()):.4f}" if any(self.losses.values()) else ""
            spent = "" if event.epsilon is None else f", ε {event.epsilon:.2f}"
            print(f"round {event.round + 1} of {self.rounds}: {len(self.losses)} clients{mean}{spent}", flush=True)
            self.losses.clear()


class Cells(LiveBar):
    """The progress of a comparison or a sweep."""

    def __init__(self, cells: int, rounds: int):
        super().__init__(cells * rounds, "rounds")
        self.rounds, self.seen, self.notes = rounds, dict[tuple[str, int], int](), set[str]()

    def watch(self, cell: Cell, event: Event) -> None:
        """Show an event of a run in this process."""
        if event.kind == "note":
            self.note(event.text)
        if event.kind == "round":
            self.seen[cell.label, cell.seed] = self.seen.get((cell.label, cell.seed), 0) + 1
            self.advance(1, f"{cell.label}, seed {cell.seed}, round {event.round + 1}")

    def note(self, text: str) -> None:
        """Print a note once, even if several runs have it."""
        if text not in self.notes:
            self.notes.add(text)
            self.print(text)

    def finish(self, cell: Cell) -> None:
        """Show the end of a run; of one in another process, nothing was shown before."""
        for note in (cell.summary or {}).get("notes", ()):
            self.note(note)
        missing = self.rounds - self.seen.get((cell.label, cell.seed), 0)
        self.advance(missing, f"{cell.label}, seed {cell.seed}: done")
