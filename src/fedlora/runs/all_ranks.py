"""A run whose clients train in several processes: every rank does the same, and the first one writes the folder."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.engines.checkpoint import FOLDER as CHECKPOINTS
from fedlora.engines.loop import Watch
from fedlora.runs.config import Config
from fedlora.runs.file_names import CONFIG, INITIAL, METRICS, SUMMARY
from fedlora.runs.run import Result, run_config
from fedlora.runs.trackers import Track
from fedlora.training.ranks import (
    check_equal,
    copy_from_first_rank,
    end_run,
    is_first_rank,
    is_parallel,
    share_failure,
)

SAVED = (CONFIG, METRICS, SUMMARY, INITIAL, CHECKPOINTS)  # files that a run goes on from
LATE = 2**31  # rounds, more than a run has


def run_on_all_ranks(config: Config, out: Path | None, watch: Watch, callbacks: Sequence[Any], again: bool) -> Result:
    """Run a configuration on each of the processes that train together; with one process it is ``run_config``.

    The result has a folder on the first rank.
    """
    with share_failure():
        if not is_parallel():
            return run_config(config, out, watch, callbacks=callbacks, again=again)
        check_equal("the configuration", config.table)
        # Other ranks have a temporary folder: then all do the same, also when they go on from a checkpoint.
        with nullcontext() if out is None else copy_from_first_rank(out, SAVED if again else ()) as folder:
            if is_first_rank():
                result = run_config(config, folder, watch, callbacks=callbacks, again=again)
            else:
                rare = replace(config.checkpoint, every=LATE, best=None)
                quiet = replace(config, track=Track(), checkpoint=rare)
                result = replace(run_config(quiet, folder, again=again), folder=None)
            end_run(result.summary["interrupted"])
        return result
