"""Trackio: a run of a project in local SQLite files (``TRACKIO_DIR``), or in a Space. ``trackio show`` shows it."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass

from fedlora.runs.trackers._base import ATTENDANCE, Session, Told, Tracker


@dataclass(frozen=True)
class Trackio(Tracker):
    """``track.trackio``."""

    project: str = "fedlora"
    space: str | None = None  # a Hugging Face Space, "owner/name", instead of files on this machine

    package, extra = "trackio", "track-trackio"

    def open(self, told: Told) -> Session:
        return Kept(self, told)


class Kept(Session):
    """One Trackio run; it writes in a thread of its own, and says itself what it could not send."""

    def __init__(self, settings: Trackio, told: Told):
        import trackio

        with redirect_stdout(io.StringIO()):  # it greets on stdout, where our answers go
            self.session = trackio.init(
                settings.project, told.known or told.name, space_id=settings.space, config=dict(told.settings),
                resume="never" if told.known is None else "must", embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        self.run = self.session.name

    def log(self, number: int, values: Mapping[str, float]) -> None:
        self.session.log(dict(values), step=number)

    def describe(self, number: int, text: str) -> None:
        import trackio

        self.session.log({ATTENDANCE: trackio.Markdown("\n".join(f"    {x}" for x in text.splitlines()))}, step=number)

    def close(self, state: str) -> None:
        import trackio
        from trackio import context_vars

        ours = context_vars.current_run.get() is self.session  # then it would be finished, aloud, once more at exit
        with redirect_stdout(io.StringIO()):
            (trackio if ours else self.session).finish()
