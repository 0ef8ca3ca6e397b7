"""What the strategy refuses, and replies that it must survive."""

import logging

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the flower extra")
pytest.importorskip("peft", reason="needs the peft extra")

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from peft import get_peft_model_state_dict

from fedlora.flower import FedLoRA, load, receive, send
from tests.fixtures.flower_strategy import Federation, gap, initial, mean, spoiled, strategy, three
from tests.fixtures.memory_grid import MemoryGrid, identify
from tests.flower.flowertune_app import task
from tests.flower.flowertune_app.before import client_app as plain_app

A0, B0 = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{leaf}.weight" for leaf in "AB")


def put(key, value):
    def change(message):
        message.content["arrays"][key] = Array(value)

    return change


def drop(message):
    del message.content["arrays"][B0]


def metric(key, value):
    def change(message):
        message.content["metrics"] = MetricRecord({**message.content["metrics"], key: value})

    return change


def garbage(message):
    array = message.content["arrays"][B0]
    message.content["arrays"][B0] = Array(array.dtype, array.shape, array.stype, b"no array")


FAULTS = {
    "nan": (put(B0, np.full((16, 4), np.nan, np.float32)), "values that are NaN or infinite"),
    "shape": (put(B0, np.zeros((16, 3), np.float32)), "is needed"),
    "broadcast": (put(B0, np.zeros((1, 4), np.float32)), "is needed"),
    "missing": (drop, f"it lacks '{B0}'"),
    "unknown": (put("base_model.model.model.norm.weight", np.zeros(16, np.float32)), "which the method does not send"),
    "base": (put("base_model.model.x.base_layer.weight", np.zeros(1, np.float32)), "a base model's weight"),
    "whole numbers": (put(B0, np.zeros((16, 4), np.int64)), "where floats are needed"),
    "garbage": (garbage, "cannot be read"),
    "no rows": (metric("num-examples", 0), "where a number above 0 is needed"),
    "nan rows": (metric("num-examples", float("nan")), "where a number above 0 is needed"),
    "list of rows": (metric("num-examples", [1, 2]), "where a number above 0 is needed"),
    "no metrics": (lambda m: m.content.pop("metrics"), "0 records of metrics"),
    "no arrays": (lambda m: m.content.pop("arrays"), "0 records of arrays"),
    "other round": (put("fedlora.turn", np.array([5, 0])), "it answers for round 6"),
    "odd mark": (put("fedlora.turn", np.array([5.5])), "cannot be read"),
}


@pytest.mark.parametrize("method, fault", [*(("fedex-lora", fault) for fault in FAULTS), ("fedit", "nan")])
def test_a_bad_reply_is_left_out_by_name_and_the_others_share_its_weight(monkeypatch, caplog, method, fault):
    change, words = FAULTS[fault]
    world = Federation(monkeypatch, three(), post=spoiled(3, change))
    with caplog.at_level(logging.WARNING, "flwr"):
        result = world.run(strategy(method, fraction_evaluate=0.0))
    said = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(said) == 1 and "node 3 is left out" in said[0] and words in said[0]
    if method == "fedex-lora":
        good = [(rows, after) for rows, _, after in world.trained if rows != 5]
        assert gap(mean([w for _, w in good], [n for n, _ in good]), world.served[1]) <= 1e-5
    assert all(np.isfinite(x.numpy()).all() for x in result.arrays.values())


def test_an_error_and_a_duplicate(monkeypatch, caplog):
    world = Federation(monkeypatch, three())
    pushed = world.grid.send_and_receive

    def twice(messages, timeout=None):
        replies = list(pushed(messages, timeout=timeout))
        return [*replies, *[r for r in replies if not r.has_error()][:1]]  # Flower asks nodes in any order

    monkeypatch.setattr(world.grid, "send_and_receive", twice)
    world.grid._contexts[4].node_config = {}  # the app looks for its partition
    with caplog.at_level(logging.WARNING, "flwr"):
        world.run(strategy("fedex-lora", fraction_evaluate=0.0))
    said = " ".join(r.getMessage() for r in caplog.records)
    assert "node 4 is left out: it reports \"KeyError: 'partition-id'\"" in said and "it has replied already" in said
    turns = [(rows, after) for rows, _, after in world.trained]
    assert gap(mean([w for _, w in turns], [n for n, _ in turns]), world.served[1]) <= 1e-5


def test_too_few_good_replies_leave_the_model_as_it_was(monkeypatch, caplog):
    world = Federation(monkeypatch, three(), post=spoiled(3, drop))
    start = initial()
    with caplog.at_level(logging.WARNING, "flwr"):
        result = world.run(strategy("fedit", min_train_nodes=3), rounds=2, arrays=start)
    assert (
        sum("2 good replies, 3 needed (min_train_nodes): the model stays" in r.getMessage() for r in caplog.records)
        == 2
    )
    assert all(np.array_equal(x.numpy(), result.arrays[key].numpy()) for key, x in start.items())


def test_nobody_answers(monkeypatch):
    world = Federation(monkeypatch, three(), post=lambda message: None)
    assert world.run(strategy("fedit")).arrays.keys() == initial().keys()


def test_metrics_unlike_the_others_and_bad_evaluations_do_not_end_the_run(monkeypatch, caplog):
    def post(message):
        if message.metadata.dst_node_id == 1 and message.metadata.src_node_id == 3:
            metric("more", 1.0)(message)
        if message.metadata.message_type == "evaluate" and message.metadata.src_node_id == 2:
            metric("num-examples", 0)(message)
        return message

    world = Federation(monkeypatch, three(), post=post)
    with caplog.at_level(logging.WARNING, "flwr"):
        result = world.run(strategy("fedit"))
    assert result.train_metrics_clientapp[1].keys() == {"train_loss"}
    assert len(result.evaluate_metrics_clientapp[1]) >= 1
    assert any("evaluation 1: node 2 is left out" in r.getMessage() for r in caplog.records)


def test_an_app_without_the_calls_is_told_so(caplog):
    grid = MemoryGrid(plain_app.app, three())
    with caplog.at_level(logging.WARNING, "flwr"):
        start = initial()
        result = strategy("ffa-lora").start(
            grid=grid, initial_arrays=start, num_rounds=1, train_config=train_config()
        )  # fmt: skip
    assert "FFA-LoRA works at the client, too, and its app does not use fedlora.flower.send" in caplog.text
    assert all(np.array_equal(x.numpy(), result.arrays[key].numpy()) for key, x in start.items())


def train_config():
    return ConfigRecord({"learning-rate": 2.0})


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("fed-sb", {}, "adapter of kind LoRASB, which PEFT's LoRA is not; run it with fedlora's own engine"),
        ("ravan", {}, "adapter of kind MultiHead"),
        ("feddpa", {}, "adapter of kind DualLoRA"),
        ("fedt", {}, "did you mean 'fedit'"),
        ("os:path", {}, "name an installed method"),
        ("svd", {"gage": "anchor"}, "there is no setting 'method_options.gage'"),
        ("svd", {"sweeps": "many"}, "method_options.sweeps is 'many'; it should be"),
        ("svd", {"sweeps": {1}}, "holds what no message can carry"),
        ("hetlora", {"decay": 0.5, "tail_penalty": 0.1}, "adds a penalty to the loss"),
    ],
)
def test_what_cannot_be_done_is_said_when_the_strategy_is_made(method, options, words):
    with pytest.raises(ValueError, match=".") as error:
        FedLoRA(method, lora_alpha=8, method_options=options)
    assert words in str(error.value) and "\n" not in str(error.value)


def arrays(**named):
    return ArrayRecord({key: Array(x) for key, x in named["named"].items()})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d.pop(B0), "do not fit together"),
        (lambda d: d.update({B0: np.zeros((16, 3), np.float32)}), "do not fit together"),
        (lambda d: d.update({B0: np.full((16, 4), np.nan, np.float32)}), "NaN or infinite"),
        (
            lambda d: d.update({B0.replace("lora_B", "lora_magnitude_vector"): np.zeros(3, np.float32)}),
            "no part of s B A",
        ),
        (lambda d: d.update({B0.replace(".weight", ".other.weight"): d[B0]}), "two adapters on one weight"),
        (lambda d: [d.pop(key) for key in list(d)], "hold no LoRA factors"),
    ],
)
def test_initial_arrays_that_cannot_be_combined(change, words):
    named = {key: array.numpy() for key, array in initial().items()}
    change(named)
    grid = MemoryGrid(plain_app.app, three())
    with pytest.raises(ValueError, match=words):
        strategy("fedit").start(grid=grid, initial_arrays=arrays(named=named), num_rounds=1)


def test_ranks_and_starts_that_cannot_be_kept():
    grid = MemoryGrid(plain_app.app, three())
    with pytest.raises(ValueError, match="r is 8, but the initial arrays have ranks"):
        strategy("fedit", r=8).start(grid=grid, initial_arrays=initial(), num_rounds=1)
    named = {key: array.numpy() + 1 for key, array in initial().items()}
    with pytest.raises(ValueError, match="begins every turn afresh and would lose the update"):
        strategy("flora").start(grid=grid, initial_arrays=arrays(named=named), num_rounds=1)


@pytest.mark.parametrize(
    "method, config, words",
    [
        ("fedit", {"rank": 2}, "needs one rank for all"),
        ("svd", {"rank": 8}, "needs no more than that"),
        ("fedit", {"head": True}, "make both with one LoraConfig"),
    ],
)
def test_a_model_that_does_not_fit_is_an_error_of_its_node_alone(monkeypatch, caplog, method, config, words):
    nodes = three()
    nodes[3] |= config
    with caplog.at_level(logging.WARNING, "flwr"):
        Federation(monkeypatch, nodes).run(strategy(method, fraction_evaluate=0.0))
    assert "node 3 is left out" in caplog.text and words in caplog.text


def messages(method, grid):
    made = strategy(method)
    return made.configure_train(1, initial(), train_config(), grid)


def test_calls_in_the_wrong_order_are_said():
    grid = MemoryGrid(plain_app.app, three())
    message = messages("ffa-lora", grid)[0]
    identify(node=message.metadata.dst_node_id)
    context = Context(1, message.metadata.dst_node_id, {}, RecordDict(), {}, series_id=1)
    message.metadata.__dict__["_message_id"] = "one"
    model = task.get_model({"partition-id": 1})
    start = get_peft_model_state_dict(model)[A0].clone()
    with pytest.raises(ValueError, match=r"call fedlora.flower.receive\(model, msg, context\) before training"):
        send(model, message, context)
    receive(model, message, context)
    now = get_peft_model_state_dict(model)[A0]
    arrived = now.clone()
    now.copy_(start)
    with pytest.raises(ValueError, match=r"is not where client \d's turn began, though FFA-LoRA freezes it"):
        send(model, message, context)
    now.copy_(arrived)
    assert {key.split(".")[-3] for key, p in model.named_parameters() if p.requires_grad} == {"lora_B"}
    with pytest.warns(UserWarning, match="training changed no adapter in round 1"):
        assert len(send(model, message, context)) == 4
    with pytest.raises(ValueError, match="give fedlora.flower what PEFT's get_peft_model returns"):
        receive(model.get_base_model(), message, context)
    message.content["fedlora"]["protocol"] = 0
    with pytest.raises(ValueError, match="install one version at both"):
        receive(model, message, context)
    identify()


def test_half_precision_and_names_with_the_adapters_name(monkeypatch):
    """float16 stays float16, `.default.` stays where it was."""
    named = {
        key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): x.numpy().astype(np.float16)
        for key, x in initial().items()
    }
    world = Federation(monkeypatch, three())
    result = world.run(strategy("svd"), arrays=arrays(named=named))
    assert result.arrays.keys() == named.keys()
    assert {x.numpy().dtype for x in result.arrays.values()} == {np.dtype(np.float16)}
    model = load(task.get_model(), result.arrays)
    own = get_peft_model_state_dict(model)
    assert torch.equal(own[B0], torch.tensor(result.arrays[B0.replace("lora_B.", "lora_B.default.")].numpy()).float())


def test_load_says_what_does_not_fit():
    with pytest.raises(ValueError, match="make the model with the server's LoraConfig"):
        load(task.get_model({"rank": 2}), initial())
    with pytest.raises(ValueError, match="give fedlora.flower what PEFT"):
        load(torch.nn.Linear(2, 2), initial())


def test_weights_that_differ_in_kind():
    """A reply of Flower's own shape: a message without content of ours is loaded as PEFT would."""
    identify()
    message = Message(RecordDict({"arrays": initial()}), 2, "train")
    model = receive(task.get_model(), message, Context(1, 2, {}, RecordDict(), {}, series_id=1))
    assert torch.equal(get_peft_model_state_dict(model)[A0], torch.tensor(initial()[A0].numpy()))
