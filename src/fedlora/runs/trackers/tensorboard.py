"""TensorBoard: event files, by default in the run's folder. ``tensorboard --logdir runs`` shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora.runs.trackers._base import ATTENDANCE, Session, Told, Tracker
from fedlora.schema import ConfigError

FOLDER = "tensorboard"


@dataclass(frozen=True)
class TensorBoard(Tracker):
    """``track.tensorboard``."""

    folder: str | None = None  # where the event files go, one folder a run; None: into the run's own folder

    package, extra = "tensorboard", "track-tensorboard"

    def open(self, told: Told) -> Session:
        if self.folder is None and told.folder is None:
            raise ConfigError("the run has no folder to keep event files in, and track.tensorboard.folder names none")
        place = told.folder / FOLDER if self.folder is None else Path(self.folder).expanduser() / told.name
        return Events(place, told)


class Events(Session):
    """Writes event files into one folder; TensorBoard shows several files of a folder as one run."""

    def __init__(self, place: Path, told: Told):
        from torch.utils.tensorboard import SummaryWriter

        place.mkdir(parents=True, exist_ok=True)
        self.run, self.writer = str(place), SummaryWriter(str(place))
        if told.known is None:
            rows = "\n".join(f"    {key} = {value!r}" for key, value in told.settings.items())
            self.writer.add_text("config", rows)

    def log(self, number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, number)
        self.writer.flush()

    def describe(self, number: int, text: str) -> None:
        self.writer.add_text(ATTENDANCE, "\n".join(f"    {line}" for line in text.splitlines()), number)

    def close(self, state: str) -> None:
        self.writer.close()
