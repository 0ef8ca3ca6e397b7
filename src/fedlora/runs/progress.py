"""Progress on stderr: round, client, loss and time left; silent where nobody watches."""

from statistics import fmean
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fedlora.engines.loop import Event
from fedlora.runs.comparison import Cell
from fedlora.text import display_safe

NOTE = 4000  # characters of one line


class _Live:
    """A bar that is there only on a terminal."""

    def __init__(self, total: int | None, unit: str):
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.bar.disable = not self.bar.console.is_terminal
        self.task = self.bar.add_task("starting", total=total)

    def __enter__(self) -> Self:
        try:  # after a Ctrl-C in the first drawing, too, the terminal gets its cursor back
            self.bar.start()
        except BaseException:
            self.bar.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


class Progress(_Live):
    """Of one run."""

    def __init__(self, rounds: int):
        super().__init__(rounds, "rounds")
        self.loss = self.spent = ""

    def watch(self, event: Event) -> None:
        """Told of every step."""
        if event.epsilon is not None:
            self.spent = f", ε {event.epsilon:.2f}"
        if event.loss:  # 0 stands for a loss that privacy keeps with its client
            self.loss = f", loss {event.loss:.3f}"
        if event.text:
            self.bar.console.print(told(event), highlight=False, markup=False, soft_wrap=True)
            return
        where = f"round {event.round + 1}" + ("" if event.client is None else f", client {event.client}")
        self.bar.update(
            self.task, description=f"{where}{self.loss}{self.spent}", advance=1 if event.kind == "round" else 0
        )


def told(event: Event) -> str:
    """An event with something to say, as a line; a note is of no round."""
    if event.kind == "note":
        return display_safe(event.text, NOTE)
    who = "" if event.client is None else f", client {event.client}"
    return f"round {event.round + 1}{who}: {display_safe(event.text, NOTE)}"


class Lines:
    """A line for each round and for whatever happens in it, for a log."""

    def __init__(self, rounds: int):
        self.rounds, self.losses = rounds, dict[int | None, float]()

    def watch(self, event: Event) -> None:
        """Told of every step."""
        if event.text:
            print(("note: " if event.kind == "note" else "") + told(event), flush=True)
            if event.kind == "quarantined":  # after its turn, which counts for nothing
                self.losses.pop(event.client, None)
        elif event.loss is not None and event.client is not None:
            self.losses[event.client] = event.loss
        elif event.kind == "round":
            mean = f", mean loss {fmean(self.losses.values()):.4f}" if any(self.losses.values()) else ""
            spent = "" if event.epsilon is None else f", ε {event.epsilon:.2f}"
            print(f"round {event.round + 1} of {self.rounds}: {len(self.losses)} clients{mean}{spent}", flush=True)
            self.losses.clear()


class Cells(_Live):
    """Of a comparison."""

    def __init__(self, cells: int, rounds: int):
        super().__init__(cells * rounds, "rounds")
        self.rounds, self.seen, self.told = rounds, dict[tuple[str, int], int](), set[str]()

    def watch(self, cell: Cell, event: Event) -> None:
        """Told of every step of a run in this process."""
        key = (cell.label, cell.seed)
        if event.kind == "note":
            self.note(event.text)
        if event.kind == "round":
            self.seen[key] = self.seen.get(key, 0) + 1
            self.bar.update(
                self.task, description=f"{cell.label}, seed {cell.seed}, round {event.round + 1}", advance=1
            )

    def note(self, text: str) -> None:
        """Said once, however many runs read the same rows."""
        if text not in self.told:
            self.told.add(text)
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def done(self, cell: Cell) -> None:
        """Told of every finished run; in another process that is all there is to hear."""
        for note in (cell.summary or {}).get("notes", ()):
            self.note(note)
        missing = self.rounds - self.seen.get((cell.label, cell.seed), 0)
        self.bar.update(self.task, description=f"{cell.label}, seed {cell.seed}: done", advance=missing)


class Counted(_Live):
    """Of things that end one by one; how many there will be may be unknown."""

    def __init__(self, unit: str, total: int | None = None):
        super().__init__(total, unit)

    def more(self, several: int) -> None:
        """Told of several at once."""
        self.bar.update(self.task, description="running", advance=several)

    def done(self, one: object) -> None:
        """Told of each."""
        self.bar.update(self.task, description="running", advance=1)
