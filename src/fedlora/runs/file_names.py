"""Names of the files and folders in the folder of a run, and of a comparison of runs."""

CONFIG = "config.toml"  # every setting of the run: enough to repeat it
METRICS = "metrics.jsonl"  # a ``RoundRecord`` a line, in the order of the rounds
SUMMARY = "summary.json"  # written last, when the run has ended
SHARED = "shared.safetensors"  # the leaves that all clients share after the last round
BASE_UPDATES = "base_update.safetensors"  # the sum of all updates of the base, part by part, where there are any
CLIENTS = "clients"  # the folder of ``K.safetensors``: the leaves that client K keeps for itself
BEST = "best"  # the model of the best round, as the folder of a run
ROWS = "rows.json"  # the clients' numbers of rows and labels
PROGRESS = "progress.json"  # the state of a run under way, for ``fedlora watch``
TRACKERS = "trackers.json"  # the name of the run at each tracker, and the number of rounds that it has
PERSONAL = "personal.json"  # the result of ``fedlora personal``
ERROR_LOG = "error.log"  # tracebacks of unexpected errors
TOKEN = "run.json"  # the id of a run over Flower, under which clients keep their state

COMPARISON = "comparison.json"  # in the folder of a comparison: its rows and its runs
ORACLE = "oracle.json"  # the result of ``fedlora compare --oracle``
INITIAL = "initial.safetensors"  # the first leaves of a model of PEFT, which no seed determines
PEFT_CONFIG = "peft_config.json"  # the configuration of the PEFT adapter that a run trained, for its export
