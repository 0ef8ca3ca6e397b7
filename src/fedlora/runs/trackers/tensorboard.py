"""TensorBoard: event files, by default in the run's folder. ``tensorboard --logdir runs`` shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora.runs.trackers._base import ATTENDANCE, RunInfo, Tracker, TrackerSession
from fedlora.schema import ConfigError


@dataclass(frozen=True)
class TensorBoard(Tracker):
    """``track.tensorboard``."""

    folder: str | None = None  # has a folder of event files for each run; None: the run's own folder

    package, extra = "tensorboard", "track-tensorboard"

    def open(self, info: RunInfo) -> TrackerSession:
        if self.folder is None and info.folder is None:
            raise ConfigError("the run has no folder for event files, and track.tensorboard.folder names none")
        folder = info.folder / "tensorboard" if self.folder is None else Path(self.folder).expanduser() / info.name
        return TensorBoardSession(folder, info)


class TensorBoardSession(TrackerSession):
    """Event files in one folder; TensorBoard shows all files of a folder as one run."""

    def __init__(self, folder: Path, info: RunInfo):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.run, self.writer = str(folder), SummaryWriter(str(folder))
        if info.known is None:
            rows = "\n".join(f"    {key} = {value!r}" for key, value in info.settings.items())
            self.writer.add_text("config", rows)

    def log(self, number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, number)
        self.writer.flush()

    def describe(self, number: int, text: str) -> None:
        self.writer.add_text(ATTENDANCE, "\n".join(f"    {line}" for line in text.splitlines()), number)

    def close(self, state: str) -> None:
        self.writer.close()
