"""What a program is told of a run while it goes on: the one interface of trackers, live views and own code.

    class Show(fedlora.Callback):
        def on_evaluation(self, record):
            print(record["round"], record["clients"]["mean"])

    fedlora.run(config, callbacks=[Show()])

An object that extends nothing will do as well, if it has one of these methods. A callback of one's own that raises
stops the run: what was finished is kept, and the run can go on. One that raises ``KeyboardInterrupt`` ends the run as
Ctrl-C would.
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
    """A callback raised; its text says which, where and what, and ``__cause__`` is what was raised."""


@dataclass(frozen=True)
class Start:
    """A run begins, or goes on."""

    config: Config
    folder: Path | None
    records: Sequence[RoundRecord]  # of the rounds before, where it goes on
    say: Callable[[str], None] = field(repr=False)  # a note to whoever watches the run


@dataclass(frozen=True)
class End:
    """How a run ended."""

    state: Literal["finished", "interrupted", "failed"]
    summary: Mapping[str, Any] | None = None  # None: it failed
    error: str = ""


class Callback:
    """Extend it and replace what is wanted; every method does nothing here."""

    def on_start(self, start: Start) -> None:
        """The model is loaded, and the first round is about to begin."""

    def on_event(self, event: Event) -> None:
        """Every step: "step", "turn", "evaluation", "round", "absent", "quarantined", "waiting", "node", "note"."""

    def on_fault(self, event: Event) -> None:
        """A client was left out of a round, or its upload was quarantined; ``event.text`` says why."""

    def on_round(self, record: RoundRecord) -> None:
        """A round is over, and its record (a line of ``metrics.jsonl``) and checkpoint are on disk."""

    def on_evaluation(self, record: RoundRecord) -> None:
        """The same of a round that was evaluated: ``record["clients"]`` and, with one model for all, ``["global"]``."""

    def on_end(self, end: End) -> None:
        """The run is over, however it ended."""


@dataclass
class Callbacks:
    """Tells several what happens: fedlora's own first, then the caller's, whose mistakes are named."""

    own: Sequence[Any] = ()  # the caller's
    built: Sequence[Callback] = ()

    def __post_init__(self):
        for number, one in enumerate(self.own):
            _check(number, one)

    def watched(self, watch: Watch) -> Watch:
        """``watch``, and these with it."""

        def told(event: Event) -> None:
            watch(event)
            self._tell("on_event", event, f"round {event.round + 1}")
            if event.kind in FAULTS:
                self._tell("on_fault", event, f"round {event.round + 1}")

        return told

    @contextmanager
    def running(self, start: Start) -> Iterator[None]:
        """From the start of a run; an error within is told as its end, and goes on."""
        try:
            self._tell("on_start", start, "the start")
            yield
        except BaseException:
            self._broken_off(sys.exc_info()[1])
            raise

    def _broken_off(self, error: BaseException | None) -> None:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        with suppress(CallbackError):  # the first mistake is the one to be told
            self.ended(End("interrupted" if stopped else "failed", None, "" if stopped else str(error)))

    def round(self, record: RoundRecord) -> None:
        """A round is over and on disk."""
        where = f"round {record['round']}"
        self._tell("on_round", record, where)
        if "clients" in record or "global" in record:
            self._tell("on_evaluation", record, where)

    def ended(self, end: End) -> None:
        """The run is over."""
        self._tell("on_end", end, "the end")

    def _tell(self, hook: str, what: Any, where: str) -> None:
        for one in self.built:
            getattr(one, hook)(what)
        for one in self.own:
            if (method := getattr(one, hook, None)) is not None:
                _call(method, what, f"{type(one).__name__}.{hook}", where)


def _call(method: Callable[[Any], None], what: Any, name: str, where: str) -> None:
    try:
        method(what)
    except Exception:
        error = sys.exc_info()[1]
        raise CallbackError(
            f"the callback {name} raised {type(error).__name__} in {where}: {error}; finished rounds are kept, mend it "
            "and go on with fedlora.resume, or leave it out."
        ) from error


def _check(number: int, one: Any) -> None:
    named = [name for name in dir(one) if name.startswith("on_") and callable(getattr(one, name, None))]
    what = f"callbacks[{number}] is a {type(one).__name__}"
    if isinstance(one, type):
        raise ConfigError(f"callbacks[{number}] is the class {one.__name__}; pass an instance: {one.__name__}().")
    for name in named:
        if name not in HOOKS:
            near = nearest(name, HOOKS)
            hint = f"did you mean {near!r}?" if near else f"it may have {', '.join(HOOKS)}."
            raise ConfigError(f"{what} with a method {name!r}, which is never called; {hint}")
    if not named:
        raise ConfigError(f"{what}, which has none of the methods {', '.join(HOOKS)}; extend fedlora.Callback.")
