"""MLflow: a run of an experiment, in a database, a folder or on a server. ``mlflow ui`` shows it."""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from fedlora.runs.trackers._base import ATTENDANCE, Session, Told, Tracker
from fedlora.schema import ConfigError

STATES = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
LONG = 500  # characters of a setting: what every store takes
TAG = 5000  # the same of a tag


@dataclass(frozen=True)
class MLflow(Tracker):
    """``track.mlflow``. Names and passwords of a server are MLflow's own environment variables."""

    uri: str | None = (
        None  # e.g. "sqlite:///mlflow.db", "https://mlflow.example.org"; None: as MLFLOW_TRACKING_URI says
    )
    experiment: str = "fedlora"

    package, extra = "mlflow", "track-mlflow"

    def __post_init__(self):
        if self.uri is not None and urlsplit(self.uri).password is not None:
            raise ConfigError(
                "track.mlflow.uri holds a password, and a configuration is kept and sent around; set the whole address "
                "by MLFLOW_TRACKING_URI instead."
            )

    def open(self, told: Told) -> Session:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing is reported to anybody
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it would tell of every table it makes
        return Logged(self, told)

    def refusals(self) -> tuple[type[Exception], ...]:
        from mlflow.exceptions import MlflowException

        return (MlflowException, OSError, ValueError)


class Logged(Session):
    """One MLflow run, through a client of its own: the process' active run is left alone."""

    def __init__(self, settings: MLflow, told: Told):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.errors = (MlflowException, OSError)
        self.client = MlflowClient(tracking_uri=settings.uri)
        if told.known is not None:
            self.run = told.known
            self.client.update_run(self.run, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(settings.experiment)
        place = self.client.create_experiment(settings.experiment) if found is None else found.experiment_id
        self.run = self.client.create_run(place, run_name=told.name).info.run_id
        for key, value in told.settings.items():
            self.client.log_param(self.run, key, str(value)[:LONG])

    def log(self, number: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, number) for name, value in values.items()])

    def describe(self, number: int, text: str) -> None:
        self.client.set_tag(
            self.run, ATTENDANCE, text if len(text) <= TAG else f"{text[: TAG - 40]} … summary.json has the rest"
        )

    def close(self, state: str) -> None:
        self.client.set_terminated(self.run, status=STATES[state])
