"""What trackers kept, read back by their own means: name -> {round: value}, each pair once or it is an error."""

import os
import struct
import tempfile

os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio-"))  # Trackio asks when it is imported
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def once(pairs):
    found = {}
    for name, number, value in pairs:
        assert number not in found.setdefault(name, {}), f"{name} of round {number} is there twice"
        found[name][number] = value
    return found


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return once((tag, event.step, event.value) for tag in read.Tags()["scalars"] for event in read.Scalars(tag))


def tensorboard_text(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return read.Tensors("attendance/text_summary")[-1].tensor_proto.string_val[0].decode()


def mlflow_tag(uri, experiment):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run.data.tags["attendance"]


def mlflow(uri, experiment):
    """The figures and the settings of the experiment's only run, and how it ended."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    every = [m for name in run.data.metrics for m in client.get_metric_history(run.info.run_id, name)]
    return once((m.key, m.step, m.value) for m in every), run.data.params, run.info.status


def wandb(folder):
    """The figures and the ids of the runs in offline files: LevelDB's log format with protobuf records."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    pairs, ids = [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in _chunks(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                pairs += [(k, row["_step"], v) for k, v in row.items() if not k.startswith("_")]
    return once(pairs), ids


def wandb_summary(folder):
    """The text in the newest file's summary."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))[-1:]
    items = [item for data in _chunks(path.read_bytes()) for item in Record.FromString(data).summary.update]
    return [json.loads(item.value_json) for item in items if "attendance" in (item.key, *item.nested_key)][-1]


def _chunks(content, block=32768, head=7):
    """The records of LevelDB's log: blocks of 32 KiB, each piece with checksum, length and kind before it."""
    at, whole = head, b""
    while at + head <= len(content):
        left = block - at % block
        if left < head:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + head])
        if kind == 0:
            return
        whole += content[at + head : at + head + length]
        at += head + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def trackio(project):
    """The figures of the project's only run, and its settings."""
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs(project)
    rows = SQLiteStorage.get_logs(project, run)
    skip = ("step", "timestamp", "attendance")
    return once((k, row["step"], v) for row in rows for k, v in row.items() if k not in skip), run


def trackio_text(project):
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs(project)
    (found,) = [row["attendance"] for row in SQLiteStorage.get_logs(project, run) if "attendance" in row]
    return found if isinstance(found, str) else found["_value"]
