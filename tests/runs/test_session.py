"""Session: a loop of the caller's own, a client at a time, with the bits of federate and of run."""

import gc

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional

import fedlora
from fedlora.engines.trainers import ClientInfo
from fedlora.runs.session import Session
from fedlora.schema import ConfigError
from fedlora.seeds import derive_seed
from tests.fixtures.federation import same
from tests.fixtures.own_models import ConvNet
from tests.fixtures.own_trainers import (
    LORA_METHODS,
    QUERY,
    ROWS,
    SEED,
    TARGETS,
    bert,
    first_rows,
    loops,
    lora,
    own_run,
    own_turn,
    peft_bert,
    sampled,
    words,
)


def first_loss(client, seed):
    """The loss on the rows by which fedlora's own loop chooses what to train, of a turn with this seed."""
    data = words(client)[0]
    batch = torch.utils.data.default_collate([data[row] for row in first_rows(len(data), seed)])
    return lambda model: model(**batch).loss


def play(session, rounds, gradient=False):
    """Rounds of a session with fedlora's own batches and optimizer in a plain loop."""
    for _ in range(rounds):
        for k in session.cohort():
            number, data = session.round - 1, words(k)[0]
            seed = derive_seed(SEED, "turn", number, k)
            with session.client(k, len(data), first_loss(k, seed) if gradient else None) as model:
                session.report_loss(own_turn(model, data, number, k))
        session.aggregate()
    return session


def assert_same_run(mine, other):
    assert same(mine.shared, other.shared) and mine.kept.keys() == other.kept.keys()
    assert all(same(mine.kept[k], other.kept[k]) for k in other.kept)
    assert [x["loss"] for x in mine.records] == [x["loss"] for x in other.records]
    assert [x["bytes"] for x in mine.records] == [x["bytes"] for x in other.records]


# --------------------------------------------------------------------------------------------------- the bits
@pytest.mark.parametrize("method", LORA_METHODS)
def test_the_bits_of_federate_and_of_run(method):
    mine = play(Session(peft_bert(), method, 3, seed=SEED), 2).result
    assert_same_run(mine, fedlora.federate(loops(), 3, method, 2, seed=SEED))
    assert_same_run(mine, own_run(method, 2))


@pytest.mark.parametrize("method", ["fedit", "fedsa-lora", "flora"])
def test_a_trainer_in_a_session_has_the_bits_of_federate(method, tmp_path):
    make, trainers = sampled(tmp_path / "a"), {}
    network = peft_bert()
    session = Session(network, method, 3, seed=SEED)
    for number in range(2):
        for k in session.cohort():
            if k not in trainers:
                trainers[k] = make(ClientInfo(k, 3, SEED, model=network))
            trainer = trainers[k]
            trainer.args.output_dir = f"x/round-{number + 1}"
            with session.client(k, examples=ROWS[k]):
                trainer.optimizer = trainer.lr_scheduler = None
                session.report_loss(trainer.train().training_loss)
        session.aggregate()
    assert_same_run(session.result, fedlora.federate(sampled(tmp_path / "b"), 3, method, 2, seed=SEED))


ATTACHED = {
    "ravan": ("ravan", fedlora.MultiHead(heads=3, head_rank=4), {"name": "multihead", "heads": 3, "head_rank": 4}, {}),
    "ravan, some heads": (
        "ravan", fedlora.MultiHead(heads=4, head_rank=2), {"name": "multihead", "heads": 4, "head_rank": 2}, {"ranks": [1, 4, 2]},
    ),
    "fed-sb": ("fed-sb", fedlora.LoRASB(core_rank=3), {"name": "lora-sb", "core_rank": 3}, {}),
    "feddpa": ("feddpa", fedlora.DualLoRA(rank=2), {"name": "dual-lora", "rank": 2}, {}),
    "vera": ("fedsa-lora", fedlora.VeRA(rank=3), {"name": "vera", "rank": 3}, {}),
    "lora": ("fedex-lora", fedlora.LoRA(rank=2, alpha=4), {"name": "lora", "rank": 2, "alpha": 4.0}, {}),
    "hetlora": ("hetlora", fedlora.LoRA(rank=8, alpha=4), {"name": "lora", "rank": 8, "alpha": 4.0}, {"ranks": [2, 4, 8]}),
    "local": ("local", fedlora.LoRA(rank=2, alpha=4), {"name": "lora", "rank": 2, "alpha": 4.0}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACHED)
def test_every_adapter_through_attach_has_the_bits_of_run(name):
    method, adapter, table, clients = ATTACHED[name]
    clients = {"count": 3, **clients}
    network = fedlora.attach(bert(), adapter, list(TARGETS), ["classifier"], seed=9)
    mine = play(Session(network, method, clients, seed=SEED), 2).result
    assert_same_run(mine, own_run(method, 2, clients=clients, adapter=table))


def test_a_choice_by_gradient_takes_the_callers_loss():
    method = {"name": "ravan", "score": "gradient"}
    adapter, table = fedlora.MultiHead(heads=4, head_rank=2), {"name": "multihead", "heads": 4, "head_rank": 2}
    clients = {"count": 3, "ranks": [1, 2, 3]}

    def session():
        network = fedlora.attach(bert(), adapter, list(TARGETS), ["classifier"])
        return Session(network, method, clients, seed=SEED)

    mine = play(session(), 2, gradient=True).result
    assert_same_run(mine, own_run(method, 2, clients=clients, adapter=table))
    with (
        pytest.raises(ValueError, match=r"Ravan chooses what to train by a gradient .* loss=lambda model"),
        session().client(0),
    ):
        pass
    with pytest.raises(ValueError, match="asks for a gradient before training"):
        fedlora.federate(
            loops(lambda: fedlora.attach(bert(), adapter, list(TARGETS), ["classifier"])), clients, method, 1, seed=SEED
        )


def test_any_module_of_ones_own():
    torch.manual_seed(0)
    network = fedlora.attach(ConvNet(), fedlora.MultiHead(heads=2, head_rank=3), ["fc1", "fc2"], head=["out"])
    x, y = torch.randn(12, 1, 8, 8), torch.randint(0, 3, (12,))
    session = Session(network, "ravan", 2)
    before = network.body[1].running_mean.clone()
    for _ in range(3):
        for k in session.cohort():
            with session.client(k, examples=12) as model:
                optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
                for _ in range(4):
                    optimizer.zero_grad()
                    loss = functional.cross_entropy(model(x), y)
                    loss.backward()
                    optimizer.step()
                session.report_loss(loss)
        session.aggregate()
    losses = [record["loss"][0] for record in session.records]
    assert losses[-1] < losses[0] and torch.equal(network.body[1].running_mean, before)
    with pytest.raises(ValueError, match=r"changes its buffer 'body.1.running_mean'"), session.client(0) as model:
        model.train()
        model(x)


# ------------------------------------------------------------------------------------------------ a round's rules
def test_the_order_of_calls_is_checked():
    session = Session(peft_bert(), "fedit", {"count": 3, "per_round": 2}, seed=SEED)
    inside = session.cohort()
    outside = next(k for k in range(3) if k not in inside)
    with pytest.raises(ValueError, match=rf"client {outside} is not in the cohort of round 1"), session.client(outside):
        pass
    with pytest.raises(ValueError, match="no client has finished a turn in this round"):
        session.aggregate()
    with pytest.raises(ValueError, match="no client's turn is open"):
        _ = session.turn
    with pytest.raises(ValueError, match="no client's turn is open"):
        session.report_loss(1.0)
    with pytest.raises(ValueError, match="needs at least one"), session.client(inside[0], examples=0):
        pass
    with session.client(inside[0]) as model:
        assert session.turn.client == inside[0] and session.turn.round == 0
        own_turn(model, words(0)[0], 0, inside[0])
        with pytest.raises(ValueError, match="turn is open"), session.client(inside[1]):
            pass
        with pytest.raises(ValueError, match="turn is open"):
            session.model()
        with pytest.raises(ValueError, match="no client has finished"):
            session.aggregate()
    with pytest.raises(ValueError, match="its turn is over"), session.client(inside[0]):
        pass
    record = session.aggregate()
    assert record["cohort"] == [inside[0]] and list(record["absent"]) == [inside[1]], "no turn: away"
    assert session.round == 2


def test_a_block_that_raises_may_be_repeated():
    session, other = (Session(peft_bert(), "fedsa-lora", 2, seed=SEED) for _ in range(2))
    for k in (0, 1):
        with pytest.raises(RuntimeError, match="no memory"), session.client(k) as model:
            own_turn(model, words(k)[0], 0, k)
            raise RuntimeError("no memory")
    for each in (session, other):
        for k in (0, 1):
            with each.client(k, examples=5) as model:
                own_turn(model, words(k)[0], 0, k)
        each.aggregate()
    assert_same_run(session.result, other.result)


def test_a_session_with_a_number_of_rounds_ends():
    session = play(Session(peft_bert(), "fedit", 3, rounds=1, seed=SEED), 1)
    with pytest.raises(ValueError, match="the session has finished its 1 rounds"):
        session.cohort()


def test_dropouts_and_weights_are_those_of_run():
    clients = {"count": 3, "dropout": 0.4}
    mine = play(Session(peft_bert(), "fedsa-lora", clients, seed=SEED), 4).result
    assert_same_run(mine, own_run("fedsa-lora", 4, clients=clients))
    assert any("absent" in record for record in mine.records)


@pytest.mark.parametrize("clip", ["int8", "robust", "privacy", "server"])
def test_sections_are_those_of_run(clip):
    sections = {
        "int8": {"compression": {"up": "int8", "down": "int8"}},
        "robust": {"robust": {"name": "trimmed"}},
        "privacy": {"privacy": {"level": "client", "clip": 0.5, "noise_multiplier": 0.8}},
        "server": {"server": {"optimizer": "adam", "learning_rate": 0.1}},
    }[clip]
    method = {"name": "fedit", "weighting": "uniform"}
    mine = play(Session(peft_bert(), method, 3, rounds=2, seed=SEED, **sections), 2).result
    assert same(mine.shared, own_run(method, 2, **sections).shared)


def test_a_leaf_that_the_method_freezes_is_checked():
    session = Session(peft_bert(), "ffa-lora", 2, seed=SEED)
    with pytest.raises(ValueError, match="FFA-LoRA freezes it in this round"), session.client(0) as model:
        model.get_submodule(f"base_model.model.{QUERY}").lora_A["default"].requires_grad_(True)
        own_turn(model, words(0)[0], 0, 0)
    for change in (lambda model: model.requires_grad_(True), lambda model: None):
        session = Session(peft_bert(), "fedit", 2, seed=SEED)
        with pytest.raises(ValueError, match="belongs to the base and is not sent"), session.client(0) as model:
            change(model)
            own_turn(model, words(0)[0], 0, 0)
            with torch.no_grad():
                model.get_submodule(f"base_model.model.{QUERY}").base_layer.weight.mul_(1.1)
        with pytest.raises(ValueError, match="the session has ended: training changed"), session.client(1):
            pass
    session = Session(peft_bert(), "fedit", 2, seed=SEED)
    with pytest.warns(UserWarning, match="changed no adapter in round 1"), session.client(0):
        pass
    with pytest.raises(FloatingPointError, match="client 1's weights are no longer finite"), session.client(1) as model:
        next(x for x in model.parameters() if x.requires_grad).data.fill_(float("nan"))


# ---------------------------------------------------------------------------------------------------- the model
def test_models_of_the_federation_and_of_clients():
    session = play(Session(peft_bert(), "flora", 3, seed=SEED), 1)
    network = session.model()
    assert not network.training
    ids = words(0)[1].ids
    with torch.no_grad():
        shared, own = network(input_ids=ids).logits, session.model(1)(input_ids=ids).logits
    assert torch.equal(shared, own), "FLoRA's clients have the global model"
    session = play(Session(peft_bert(), "fedsa-lora", 3, seed=SEED), 1)
    with pytest.raises(ValueError, match="has a model for each client and none for all; give a client's number"):
        session.model()
    with torch.no_grad():
        logits = [session.model(k)(input_ids=ids).logits.clone() for k in range(3)]
    assert not torch.equal(logits[0], logits[1])


def test_a_function_evaluates_every_clients_model():
    seen = []

    def evaluate(network, client):
        assert not network.training
        seen.append(client.number)
        return {"loss": float(network(**torch.utils.data.default_collate([words(client.number)[1][0]])).loss)}

    session = play(Session(peft_bert(), "fedsa-lora", 3, seed=SEED, evaluate=evaluate), 1)
    assert seen == [0, 1, 2] and len(session.records[0]["clients"]["each"]) == 3
    with pytest.raises(ValueError, match="the metric is 'accuracy', and the scores of client 0 are loss"):
        play(Session(peft_bert(), "fedit", 3, seed=SEED, evaluate=evaluate, metric="accuracy"), 1)


# ------------------------------------------------------------------------------------------------------ to disk
@pytest.mark.parametrize("method", ["fedsa-lora", "flora", "fedex-lora"])
def test_a_saved_session_goes_on_with_the_same_bits(method, tmp_path):
    whole = play(Session(peft_bert(), method, 3, seed=SEED), 3)
    part = play(Session(peft_bert(), method, 3, seed=SEED), 1)
    assert part.save(tmp_path / "s") == tmp_path / "s"
    play(part, 1)
    part.save(tmp_path / "s")
    del part
    gc.collect()
    more = play(Session.load(tmp_path / "s", peft_bert()), 1)
    assert_same_run_json(more.result, whole.result)
    more.save(tmp_path / "s")
    run = fedlora.open(tmp_path / "s")
    assert len(run.records) == 3 and same(run.shared, whole.result.shared)
    assert run.report(tmp_path / "r.html").exists() and len(run.frame()) == 3


def assert_same_run_json(mine, other):
    """As ``assert_same_run``, for records that were read from a file."""
    assert same(mine.shared, other.shared) and all(same(mine.kept[k], other.kept[k]) for k in other.kept)
    assert [{int(k): x for k, x in r["loss"].items()} for r in mine.records] == [r["loss"] for r in other.records]


def test_a_session_that_was_killed_goes_on_from_its_last_save(tmp_path):
    session = play(Session(peft_bert(), "fedsa-lora", 3, seed=SEED), 1)
    session.save(tmp_path / "s")
    with session.client(session.cohort()[0]) as model:
        own_turn(model, words(0)[0], 1, 0)
    with pytest.raises(ValueError, match=r"round 2 is open; call aggregate\(\) before save\(\)"):
        session.save(tmp_path / "s")
    del session, model
    more = play(Session.load(tmp_path / "s", peft_bert()), 1)
    assert_same_run_json(more.result, play(Session(peft_bert(), "fedsa-lora", 3, seed=SEED), 2).result)


def test_folders_that_are_no_place_for_a_session(tmp_path):
    session = play(Session(peft_bert(), "fedit", 3, seed=SEED), 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds nothing of this session"):
        session.save(tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ConfigError, match="is a file"):
        session.save(tmp_path / "file")
    other = play(Session(peft_bert(), "fedit", 3, seed=SEED), 1)
    other.save(tmp_path / "other")
    with pytest.raises(ConfigError, match="is not empty and holds nothing of this session"):
        session.save(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds no session: it has no config.toml"):
        Session.load(tmp_path / "full", peft_bert())
    fedlora.federate(loops(), 3, "fedit", 1, out=tmp_path / "run", seed=SEED)
    with pytest.raises(ConfigError, match="holds a run and no session"):
        Session.load(tmp_path / "run", peft_bert())
    with pytest.raises(ValueError, match="other weights|another model"):
        Session.load(tmp_path / "other", peft.get_peft_model(bert(1), lora()))
    with pytest.raises(ValueError, match="adapter|another configuration"):
        Session.load(tmp_path / "other", peft_bert(r=3))
    with pytest.raises(ConfigError, match=r"fedlora.Session.load"):
        fedlora.resume(tmp_path / "other", rounds=4)


def test_a_saved_session_before_its_first_round(tmp_path):
    session = Session(peft_bert(), "fedit", 3, seed=SEED)
    result = session.result
    assert result.records == [] and result.summary["rounds"] == 0
    session.save(tmp_path / "s")
    more = play(Session.load(tmp_path / "s", peft_bert()), 1)
    assert_same_run_json(more.result, play(Session(peft_bert(), "fedit", 3, seed=SEED), 1).result)


def test_a_result_may_be_read_between_rounds():
    session = play(Session(peft_bert(), "fedsa-lora", 3, seed=SEED), 1)
    assert len(session.result.records) == 1 and session.summary["rounds"] == 1
    play(session, 1)
    assert len(session.result.records) == 2 and session.summary["rounds"] == 2
    assert len(session.frame()) == 2 and "FedSA-LoRA" in session._repr_html_()
    assert_same_run(session.result, play(Session(peft_bert(), "fedsa-lora", 3, seed=SEED), 2).result)


def test_a_second_session_on_a_network_begins_at_its_own_base():
    network = peft_bert()
    weight = network.get_submodule(f"base_model.model.{QUERY}").base_layer.weight
    before = weight.clone()
    session = play(Session(network, "flora", 3, seed=SEED), 1)
    assert not torch.equal(weight, before), "the base update is in the base"
    Session(network, "fedit", 3, seed=SEED)
    assert torch.equal(weight, before)
    assert session.round == 2


# ----------------------------------------------------------------------------------------------------- refusals
def test_wrong_settings_are_sentences():
    network = peft_bert()
    for settings, text in (
        ({"method": "fedti"}, "did you mean 'fedit'"),
        ({"method": "fedit", "privacy": {"level": "example", "noise_multiplier": 1.0}}, "inside fedlora's own training loop"),
        ({"method": {"name": "hetlora", "decay": 0.9, "tail_penalty": 0.1}}, "adds a penalty to the loss"),
        ({"method": "fedit", "compresion": {}}, "did you mean 'compression'"),
        ({"method": "fed-sb"}, "Fed-SB trains fedlora.LoRASB, and the model has a LoRA"),
        ({"method": {"name": "fedit", "weighting": "uniform"}, "privacy": {"level": "client", "clip": 1.0, "target_epsilon": 5.0}}, "give the session their number, rounds="),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            Session(network, clients=3, **settings)
    with pytest.raises(ValueError, match="the model is a Linear; give what PEFT's get_peft_model returns"):
        Session(nn.Linear(2, 2), "fedit", 2)
    with pytest.raises(ValueError, match="has an adapter of fedlora already"):
        twice = fedlora.attach(bert(), fedlora.LoRA(2), list(TARGETS))
        fedlora.attach(twice, fedlora.LoRA(2), list(TARGETS))
    with pytest.raises(ValueError, match="matches no|match"):
        fedlora.attach(bert(), fedlora.LoRA(2), ["querry"])
