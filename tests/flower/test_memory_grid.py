"""The grid without processes: Flower's own strategy runs on it, and nothing is shared between the two sides."""

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from tests.fixtures.memory_grid import MemoryGrid


def app():
    made = ClientApp()

    @made.train()
    def train(message, context):
        arrays = message.content["arrays"].to_numpy_ndarrays()
        context.state["turns"] = MetricRecord({"n": context.state.get("turns", {"n": 0})["n"] + 1})
        if context.node_config["add"] < 0:
            raise ValueError("no data")
        sent = ArrayRecord([x + context.node_config["add"] for x in arrays])
        return Message(
            RecordDict({"arrays": sent, "metrics": MetricRecord({"num-examples": 1, **context.state["turns"]})}),
            reply_to=message,
        )

    @made.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 1.0})}), reply_to=message)

    return made


def test_flowers_own_strategy_runs_unmodified():
    grid = MemoryGrid(app(), {2: {"add": 1}, 3: {"add": 3}})
    result = FedAvg().start(grid=grid, initial_arrays=ArrayRecord([np.zeros(3)]), num_rounds=2)
    np.testing.assert_array_equal(result.arrays.to_numpy_ndarrays()[0], [4.0, 4.0, 4.0])
    assert result.train_metrics_clientapp[2]["n"] == 2, "a node's context lasts"


def test_an_exception_is_an_error_reply_and_a_lost_message_is_none():
    def lose(message):
        return None if message.metadata.dst_node_id == 2 else message

    lost = MemoryGrid(app(), {2: {"add": 1}, 3: {"add": -1}}, post=lose)
    content = RecordDict({"arrays": ArrayRecord([np.zeros(1)])})
    replies = list(lost.send_and_receive([Message(content, node, "train") for node in (2, 3)]))
    assert [reply.error.reason for reply in replies] == ["ValueError: no data"]
    lost.leave(3)
    assert list(lost.get_node_ids()) == [2]
