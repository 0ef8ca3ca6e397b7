"""The small app with fedlora in it, on nodes of one's own choosing, and its messages and trained weights as witnesses."""

from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from fedlora.flower import FedLoRA, load
from fedlora.flower.testing import MemoryGrid

from .flowertune_app import task
from .flowertune_app.after import client_app

ALPHA = 8


def weights(model):
    """Every adapted weight as the model uses it, ``W + scaling B A``, and every weight trained in full; from PEFT alone."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[path] = (module.base_layer.weight + module.scaling["default"] * B @ A).detach().clone()
        elif "modules_to_save" in path and hasattr(module, "weight"):
            found[path] = module.weight.detach().clone()
    return found


def outputs(model):
    """Every ``B``."""
    return {key: p.detach().clone() for key, p in model.named_parameters() if "lora_B" in key}


def mean(several, shares):
    """The weighted mean of several models' weights."""
    return {key: sum(s * w[key] for s, w in zip(shares, several)) / sum(shares) for key in several[0]}


def gap(one, other):
    """The largest difference."""
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def initial(**config):
    """The server's arrays before the first round."""
    return ArrayRecord(get_peft_model_state_dict(task.get_model(config)))


@dataclass
class Federation:
    """Runs a strategy and keeps what crossed, what each node trained, and the global model of each round."""

    monkeypatch: object
    nodes: dict
    server: dict = field(default_factory=dict)
    post: object = None
    messages: list = field(default_factory=list)
    trained: list = field(default_factory=list)  # (rows, weights before, weights after), in the order of training
    factors: list = field(default_factory=list)  # (rows, B before, B after)
    served: dict = field(default_factory=dict)  # round -> the global model's weights
    arrays: dict = field(default_factory=dict)  # round -> the arrays of the global model

    def __post_init__(self):
        fit = task.fit

        def witnessed(model, rows, rate):
            before, began = weights(model), outputs(model)
            loss = fit(model, rows, rate)
            self.trained.append((len(rows), before, weights(model)))
            self.factors.append((len(rows), began, outputs(model)))
            return loss

        self.monkeypatch.setattr(client_app, "fit", witnessed)
        self.grid = MemoryGrid(client_app.app, self.nodes, post=self._post)

    def _post(self, message):
        found = self.post(message) if self.post else message
        self.messages += [found] if found is not None else []
        return found

    def run(self, strategy, rounds=1, arrays=None):
        """The result after some rounds."""

        def judge(server_round, arrays):
            model = load(task.get_model(self.server), arrays)
            self.served[server_round], self.arrays[server_round] = weights(model), arrays
            return MetricRecord({"loss": 0.0})

        return strategy.start(
            grid=self.grid, initial_arrays=arrays or initial(**self.server), num_rounds=rounds,
            train_config=ConfigRecord({"learning-rate": 2.0}), evaluate_fn=judge,
        )  # fmt: skip

    def sent_up(self):
        """The replies to training."""
        return [m for m in self.messages if m.metadata.message_type == "train" and m.metadata.dst_node_id == 1]

    def sent_down(self):
        """The messages that ask for training."""
        return [m for m in self.messages if m.metadata.message_type == "train" and m.metadata.dst_node_id != 1]


def three(**more):
    """Three nodes of unequal numbers of rows."""
    return {node: {"partition-id": node - 2, **more} for node in (2, 3, 4)}


def strategy(method, **more):
    """A strategy for them; the small app trains at a rate at which honest updates differ more than tenfold."""
    wide = {"norm_limit": 1e6, "factor_limit": 1e6}
    return FedLoRA(method, **{"lora_alpha": ALPHA, "min_train_nodes": 2, "hygiene": wide, **more})
