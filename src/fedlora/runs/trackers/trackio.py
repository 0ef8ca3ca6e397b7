"""Trackio: one run of a project in local SQLite files (``TRACKIO_DIR``), or in a Space. ``trackio show`` shows it."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass

from fedlora.runs.trackers._base import ATTENDANCE, RunInfo, Tracker, TrackerSession


@dataclass(frozen=True)
class Trackio(Tracker):
    """``track.trackio``."""

    project: str = "fedlora"
    space: str | None = None  # a Hugging Face Space, "owner/name", instead of files on this machine

    package, extra = "trackio", "track-trackio"

    def open(self, info: RunInfo) -> TrackerSession:
        return TrackioSession(self, info)


class TrackioSession(TrackerSession):
    """One Trackio run. Trackio writes in its own thread, and reports itself what it could not send."""

    def __init__(self, settings: Trackio, info: RunInfo):
        import trackio

        with redirect_stdout(io.StringIO()):  # it prints a greeting
            self.session = trackio.init(
                settings.project, info.known or info.name, space_id=settings.space, config=dict(info.settings),
                resume="never" if info.known is None else "must", embed=False, auto_log_gpu=False, auto_log_cpu=False,
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

        is_current = context_vars.current_run.get() is self.session  # else Trackio finishes it again at exit
        with redirect_stdout(io.StringIO()):
            (trackio if is_current else self.session).finish()
