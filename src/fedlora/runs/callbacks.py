"""Callbacks: the one interface of trackers, live views and a program's own code to a running run.

    class Show(fedlora.Callback):
        def on_evaluation(self, record):
            print(record["round"], record["clients"]["mean"])

    fedlora.run(config, callbacks=[Show()])

Any object with one of these methods is accepted. If a callback of the caller raises, the run stops; finished rounds are
kept, and the run can be resumed. ``KeyboardInterrupt`` ends the run as Ctrl-C does.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedlora.engines.loop import Event, Watch
from fedlora.engines.record import RoundRecord
from fedlora.registry import nearest
from fedlora.runs.config import Config
from fedlora.schema import ConfigError

HOOKS = ("on_start", "on_event", "on_fault", "on_round", "on_evaluation", "on_end")
FAULTS = ("absent", "quarantined")  # kinds of events


class CallbackError(RuntimeError):
    """A callback raised ``__cause__``; the text names the callback, the round and the error."""


@dataclass(frozen=True)
class Start:
    """The start of a run, or of its resumption."""

    config: Config
    folder: Path | None
    records: Sequence[RoundRecord]  # of the rounds before, if the run is resumed
    note: Callable[[str], None] = field(repr=False)  # shows a note to the user


@dataclass(frozen=True)
class End:
    """The end of a run."""

    state: Literal["finished", "interrupted", "failed"]
    summary: Mapping[str, Any] | None = None  # None: it failed
    error: str = ""


class Callback:
    """Base class of callbacks; every method does nothing."""

    def on_start(self, start: Start) -> None:
        """Called when the model is loaded, before the first round."""

    def on_event(self, event: Event) -> None:
        """Called for "step", "turn", "evaluation", "round", "absent", "quarantined", "waiting", "node" and "note"."""

    def on_fault(self, event: Event) -> None:
        """Called if a client is left out of a round or its upload is quarantined; ``event.text`` is the reason."""

    def on_round(self, record: RoundRecord) -> None:
        """Called after a round, when its record (a line of ``metrics.jsonl``) and checkpoint are on disk."""

    def on_evaluation(self, record: RoundRecord) -> None:
        """Called after a round with an evaluation: ``record["clients"]`` and, for a shared model, ``["global"]``."""

    def on_end(self, end: End) -> None:
        """Called once, at the end of the run."""


@dataclass
class Callbacks:
    """Calls fedlora's own callbacks, then the caller's. An error of the latter becomes a ``CallbackError``."""

    custom: Sequence[Any] = ()  # the caller's
    builtin: Sequence[Callback] = ()

    def __post_init__(self):
        for number, callback in enumerate(self.custom):
            _check(number, callback)

    def wrap(self, watch: Watch) -> Watch:
        """Return a function that calls ``watch`` and the callbacks."""

        def notify(event: Event) -> None:
            watch(event)
            self._call("on_event", event, f"round {event.round + 1}")
            if event.kind in FAULTS:
                self._call("on_fault", event, f"round {event.round + 1}")

        return notify

    @contextmanager
    def running(self, start: Start) -> Iterator[None]:
        """Call ``on_start``, and ``on_end`` if an error ends the block."""
        try:
            self._call("on_start", start, "the start")
            yield
        except BaseException:
            self._end_with(sys.exc_info()[1])
            raise

    def _end_with(self, error: BaseException | None) -> None:
        is_stop = isinstance(error, KeyboardInterrupt | SystemExit)
        with suppress(CallbackError):  # the first error counts
            self.end(End("interrupted" if is_stop else "failed", None, "" if is_stop else str(error)))

    def round(self, record: RoundRecord) -> None:
        """Call ``on_round`` and ``on_evaluation``."""
        where = f"round {record['round']}"
        self._call("on_round", record, where)
        if "clients" in record or "global" in record:
            self._call("on_evaluation", record, where)

    def end(self, end: End) -> None:
        """Call ``on_end``."""
        self._call("on_end", end, "the end")

    def _call(self, hook: str, argument: Any, where: str) -> None:
        for callback in self.builtin:
            getattr(callback, hook)(argument)
        for callback in self.custom:
            try:
                getattr(callback, hook, lambda argument: None)(argument)
            except Exception:
                error = sys.exc_info()[1]
                raise CallbackError(
                    f"the callback {type(callback).__name__}.{hook} raised {type(error).__name__} in {where}: {error}; "
                    "finished rounds are kept, mend it and go on with fedlora.resume, or leave it out."
                ) from error


def _check(number: int, callback: Any) -> None:
    hooks = [name for name in dir(callback) if name.startswith("on_") and callable(getattr(callback, name, None))]
    subject = f"callbacks[{number}] is a {type(callback).__name__}"
    if isinstance(callback, type):
        name = callback.__name__
        raise ConfigError(f"callbacks[{number}] is the class {name}; pass an instance: {name}().")
    for name in (name for name in hooks if name not in HOOKS):
        near = nearest(name, HOOKS)
        hint = f"did you mean {near!r}?" if near else f"it may have {', '.join(HOOKS)}."
        raise ConfigError(f"{subject} with a method {name!r}, which is never called; {hint}")
    if not hooks:
        raise ConfigError(f"{subject}, which has none of the methods {', '.join(HOOKS)}; extend fedlora.Callback.")
