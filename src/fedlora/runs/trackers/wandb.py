"""Weights & Biases: one run of a project, on its servers or, offline, in files for ``wandb sync``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedlora.runs.trackers._base import ATTENDANCE, RunInfo, Tracker, TrackerSession


@dataclass(frozen=True)
class WandB(Tracker):
    """``track.wandb``. The key is that of ``wandb login`` or ``WANDB_API_KEY``."""

    project: str = "fedlora"
    entity: str | None = None  # a team or user
    mode: Literal["online", "offline"] | None = None  # None: WANDB_MODE, or online
    folder: str | None = None  # for its files; None: the run's own folder

    package, extra = "wandb", "track-wandb"

    def open(self, info: RunInfo) -> TrackerSession:
        return WandBSession(self, info)

    def open_errors(self) -> tuple[type[Exception], ...]:
        from wandb.errors import Error

        return (Error, OSError, ValueError)


class WandBSession(TrackerSession):
    """One W&B run with figures and settings only: no console, no code, no facts about the machine."""

    def __init__(self, settings: WandB, info: RunInfo):
        import wandb
        from wandb.errors import Error

        self.errors = (Error, OSError)
        quiet = wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, x_disable_stats=True, x_disable_meta=True,
            x_save_requirements=False,
        )  # fmt: skip
        folder = settings.folder or info.folder
        self.session = wandb.init(
            project=settings.project, entity=settings.entity, mode=settings.mode, name=info.name, id=info.known,
            resume=None if info.known is None or settings.mode == "offline" else "must", reinit="create_new",
            config=dict(info.settings), dir=None if folder is None else str(folder), settings=quiet,
        )  # fmt: skip
        self.run = self.session.id

    def log(self, number: int, values: Mapping[str, float]) -> None:
        self.session.log(dict(values), step=number, commit=True)

    def describe(self, number: int, text: str) -> None:
        self.session.summary[ATTENDANCE] = text

    def close(self, state: str) -> None:
        self.session.finish(exit_code=0 if state == "finished" else 1)
