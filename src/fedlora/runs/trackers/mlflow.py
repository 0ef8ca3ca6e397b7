"""MLflow: one run of an experiment, in a database, a folder or on a server. ``mlflow ui`` shows it."""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from fedlora.runs.trackers._base import ATTENDANCE, RunInfo, Tracker, TrackerSession
from fedlora.schema import ConfigError

STATES = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
SETTING_LENGTH, TAG_LENGTH = 500, 5000  # characters that every store accepts


@dataclass(frozen=True)
class MLflow(Tracker):
    """``track.mlflow``. The user and the password of a server are in MLflow's own environment variables."""

    uri: str | None = None  # "sqlite:///mlflow.db", "https://mlflow.example.org"; None: MLFLOW_TRACKING_URI
    experiment: str = "fedlora"

    package, extra = "mlflow", "track-mlflow"

    def __post_init__(self):
        if self.uri is not None and urlsplit(self.uri).password is not None:
            raise ConfigError(
                "track.mlflow.uri holds a password, and a configuration is kept and sent around; set the whole address "
                "by MLFLOW_TRACKING_URI instead."
            )

    def open(self, info: RunInfo) -> TrackerSession:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it logs every table
        return MLflowSession(self, info)

    def open_errors(self) -> tuple[type[Exception], ...]:
        from mlflow.exceptions import MlflowException

        return (MlflowException, OSError, ValueError)


class MLflowSession(TrackerSession):
    """One MLflow run, through its own client; the active run of the process is not changed."""

    def __init__(self, settings: MLflow, info: RunInfo):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.errors = (MlflowException, OSError)
        self.client = MlflowClient(tracking_uri=settings.uri)
        if info.known is not None:
            self.run = info.known
            self.client.update_run(self.run, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(settings.experiment)
        id = experiment.experiment_id if experiment else self.client.create_experiment(settings.experiment)
        self.run = self.client.create_run(id, run_name=info.name).info.run_id
        for key, value in info.settings.items():
            self.client.log_param(self.run, key, str(value)[:SETTING_LENGTH])

    def log(self, number: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, number) for name, value in values.items()])

    def describe(self, number: int, text: str) -> None:
        cut = text if len(text) <= TAG_LENGTH else f"{text[: TAG_LENGTH - 40]} … summary.json has the rest"
        self.client.set_tag(self.run, ATTENDANCE, cut)

    def close(self, state: str) -> None:
        self.client.set_terminated(self.run, status=STATES[state])
