"""Weights & Biases: a run of a project, on its servers or, offline, in files that ``wandb sync`` sends later."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedlora.runs.trackers._base import ATTENDANCE, Session, Told, Tracker


@dataclass(frozen=True)
class WandB(Tracker):
    """``track.wandb``. The key is what ``wandb login`` keeps, or ``WANDB_API_KEY``."""

    project: str = "fedlora"
    entity: str | None = None  # a team or user
    mode: Literal["online", "offline"] | None = None  # None: as WANDB_MODE says, which is online where it is not set
    folder: str | None = None  # where its files go; None: into the run's own folder

    package, extra = "wandb", "track-wandb"

    def open(self, told: Told) -> Session:
        return Sent(self, told)

    def refusals(self) -> tuple[type[Exception], ...]:
        from wandb.errors import Error

        return (Error, OSError, ValueError)


class Sent(Session):
    """One W&B run. Figures and settings only: no console, no code, nothing of the machine."""

    def __init__(self, settings: WandB, told: Told):
        import wandb
        from wandb.errors import Error

        self.errors = (Error, OSError)
        quiet = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        here = settings.folder or told.folder
        self.session = wandb.init(
            project=settings.project, entity=settings.entity, mode=settings.mode, name=told.name, id=told.known,
            resume=None if told.known is None or settings.mode == "offline" else "must", reinit="create_new",
            config=dict(told.settings), dir=None if here is None else str(here), settings=quiet,
        )  # fmt: skip
        self.run = self.session.id

    def log(self, number: int, values: Mapping[str, float]) -> None:
        self.session.log(dict(values), step=number, commit=True)

    def describe(self, number: int, text: str) -> None:
        self.session.summary[ATTENDANCE] = text

    def close(self, state: str) -> None:
        self.session.finish(exit_code=0 if state == "finished" else 1)
