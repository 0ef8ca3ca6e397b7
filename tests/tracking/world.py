"""A callback that notes what it is told, and a round's record with everything in it."""

import fedlora


class Notes(fedlora.Callback):
    def __init__(self):
        self.seen = []

    def on_start(self, start):
        self.seen.append(("start", len(start.records)))

    def on_event(self, event):
        self.seen.append((event.kind, event.round + 1))

    def on_round(self, record):
        self.seen.append(("on_round", record["round"]))

    def on_evaluation(self, record):
        self.seen.append(("on_evaluation", record["round"], record["clients"]["mean"]))

    def on_end(self, end):
        self.seen.append(("end", end.state))


RECORD = {
    "round": 4, "cohort": [0, 2], "loss": {"0": 2.0, "2": 1.0},
    "weights": {"a": {"served": 0.1, "drift": 1.0}, "b": {"served": 0.3, "drift": 2.0}},
    "global": {"accuracy": 0.5, "loss": 1.2}, "attack": {"success": 0.25, "rows": 8},
    "clients": {"mean": 0.6, "examples_mean": 0.61, "worst": 0.4, "worst_client": 2, "spread": 0.1, "each": [0.8, 0.4]},
    "bytes": {"up": {"adapter": 100, "head": 10}, "down": {}}, "privacy": {"epsilon": 2.5, "delta": 1e-5},
    "absent": {"1": "late"}, "quarantined": {"3": "nan"}, "seconds": {"train": 1.5, "evaluate": 0.5, "total": 2.25},
}  # fmt: skip
