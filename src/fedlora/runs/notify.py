"""Who is told of a run: the file that ``fedlora watch`` reads, the trackers of ``[track]``, and the caller's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.runs.callbacks import Callback, Callbacks, End
from fedlora.runs.config import Config
from fedlora.runs.progress_writer import ProgressWriter
from fedlora.runs.trackers._callback import Tracking


def callbacks(config: Config, own: Sequence[Any], folder: Path | None) -> Callbacks:
    """All of them. ``ConfigError`` for an object that is no callback, or a tracker that is not installed."""
    config.track.check()
    built: list[Callback] = [] if folder is None else [ProgressWriter(folder)]
    if config.track.trackers:
        built.append(Tracking(config.track.trackers))
    return Callbacks(own, built)


def ended(summary: dict[str, Any]) -> End:
    """The end of a run that was not an error."""
    return End("interrupted" if summary["interrupted"] else "finished", summary)
