"""federate: somebody else's trainers are an ordinary run, with the bits of fedlora's own loop on the same batches."""

import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch

import fedlora
from fedlora.schema import ConfigError
from tests.fixtures.federation import same
from tests.fixtures.own_trainers import (
    LORA_METHODS,
    QUERY,
    SEED,
    TRAINING,
    Loop,
    QuietTrainer,
    Words,
    arguments,
    bert,
    difference,
    loops,
    lora,
    own_run,
    own_turn,
    peft_bert,
    sampled,
    words,
)


def federate(make, method="fedit", rounds=2, clients=3, **settings):
    """``fedlora.federate`` with the seed of these tests."""
    return fedlora.federate(make, clients, method, rounds, seed=SEED, **settings)


def assert_runs_agree(mine, other, tolerance=1e-6):
    """Shared and kept leaves within a relative tolerance, equal bytes, and close losses and scores."""
    assert difference(mine.shared, other.shared) <= tolerance
    assert mine.kept.keys() == other.kept.keys()
    for client in other.kept:
        assert difference(mine.kept[client], other.kept[client]) <= tolerance
    for a, b in zip(mine.records, other.records, strict=True):
        assert a.keys() == b.keys() and a["cohort"] == b["cohort"] and a["bytes"] == b["bytes"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["clients"]["each"] == pytest.approx(b["clients"]["each"], rel=1e-5)


# ----------------------------------------------------------------------------------------- the same adapter
@pytest.mark.parametrize("method", LORA_METHODS)
def test_a_trainer_with_the_same_batches_ends_at_the_adapter_of_run(method, tmp_path):
    mine, other = federate(sampled(tmp_path), method, 3), own_run(method, 3)
    assert_runs_agree(mine, other)
    assert (mine.summary["base_updates"], bool(mine.kept[0][QUERY])) == (
        other.summary["base_updates"], method == "fedsa-lora",
    )  # fmt: skip
    head = [mine.shared["classifier"], mine.kept[0]["classifier"]]
    assert any("weight" in layer and not torch.equal(layer["weight"], bert().classifier.weight) for layer in head)


@pytest.mark.parametrize("method", ["fedit", "fedsa-lora", "flora"])
def test_anything_with_train_ends_at_the_bits_of_run(method):
    mine, other = federate(loops(), method), own_run(method, 2)
    assert same(mine.shared, other.shared) and all(same(mine.kept[k], other.kept[k]) for k in range(3))
    assert [x["loss"] for x in mine.records] == [x["loss"] for x in other.records]


@pytest.mark.parametrize(
    "clients",
    [
        {"count": 3, "per_round": 2},
        {"count": 3, "dropout": 0.4},
        {"count": 3, "sampling": "poisson", "rate": 0.6},
    ],
)
def test_partial_participation_and_dropout_are_those_of_run(clients, tmp_path):
    mine, other = federate(sampled(tmp_path), "fedsa-lora", 4, clients), own_run("fedsa-lora", 4, clients=clients)
    assert_runs_agree(mine, other)
    assert any(len(record["cohort"]) < 3 for record in mine.records)


@pytest.mark.parametrize("method", ["flora", "flexlora", "hetlora"])
def test_unequal_ranks_are_those_of_run(method, tmp_path):
    ranks = {"count": 3, "ranks": [2, 4, 8]}
    table = {"name": method, **({"decay": 1.0} if method == "hetlora" else {})}
    mine = federate(sampled(tmp_path, lambda: peft_bert(r=8)), table, 2, ranks)
    other = own_run(table, 2, clients=ranks, adapter={"name": "lora", "rank": 8, "alpha": 4.0})
    assert_runs_agree(mine, other)


SETTINGS = {
    "int8": {"compression": {"up": "int8", "down": "int8"}},
    "top_k": {"compression": {"up": "int8", "top_k": 0.25, "error_feedback": True}},
    "robust": {"robust": {"name": "trimmed"}},
    "server": {"server": {"optimizer": "adam", "learning_rate": 0.1}},
    "privacy": {
        "privacy": {"level": "client", "clip": 0.5, "noise_multiplier": 0.8},
        "method": {"weighting": "uniform"},
    },
    "attack": {"attack": {"name": "sign-flip", "clients": [1]}},
    "evaluation": {"evaluation": {"every": 2, "measure": False}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_section_works_as_in_run(name, tmp_path):
    sections = dict(SETTINGS[name])
    method = {"name": "fedit", **sections.pop("method", {})}
    mine, other = federate(sampled(tmp_path), method, 2, **sections), own_run(method, 2, **sections)
    # Rounding, sorting and noise at the wire turn equal bits into equal bits.
    assert same(mine.shared, other.shared)
    assert [x["bytes"] for x in mine.records] == [x["bytes"] for x in other.records]
    assert mine.records[-1].keys() == other.records[-1].keys()


def test_moments_are_kept_as_in_run(tmp_path):
    mine = federate(sampled(tmp_path), "fedsa-lora", 3, keep_optimizer=True)
    kept = own_run("fedsa-lora", 3, training=replace(TRAINING, keep_optimizer=True))
    assert_runs_agree(mine, kept)
    assert difference(mine.shared, federate(sampled(tmp_path), "fedsa-lora", 3).shared) > 1e-3


def test_a_schedule_over_the_run_is_the_linear_one_of_run(tmp_path):
    mine = federate(sampled(tmp_path, lr_scheduler_type="linear"), "fedit", 3)
    assert_runs_agree(mine, own_run("fedit", 3, training=replace(TRAINING, schedule="linear")))
    cosine = federate(sampled(tmp_path, lr_scheduler_type="cosine"), "fedit", 3)
    assert_runs_agree(cosine, own_run("fedit", 3, training=replace(TRAINING, schedule="cosine")))


def test_a_schedule_of_a_turn_begins_anew_in_each(tmp_path):
    rates = []

    class Rates(QuietTrainer):
        def training_step(self, *args, **settings):
            rates.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(*args, **settings)

    def make(client):
        args = arguments(tmp_path, lr_scheduler_type="linear")
        return Rates(client.model or peft_bert(), args, train_dataset=words(0)[0])

    federate(make, "fedit", 2, 1, schedule="turn")
    whole = TRAINING.learning_rate
    assert rates == pytest.approx([whole, whole * 2 / 3, whole / 3] * 2)
    rates.clear()
    federate(make, "fedit", 2, 1)
    assert rates == pytest.approx([whole * (6 - step) / 6 for step in range(6)])


# ---------------------------------------------------------------------------------- the state between the turns
@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_second_run_in_a_process_begins_at_the_pretrained_base(method, tmp_path):
    network = peft_bert()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    runs = [federate(sampled(tmp_path, lambda: network), method, 2) for _ in range(2)]
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
    assert all(x.requires_grad for name, x in network.named_parameters() if "lora_" in name)
    assert_runs_agree(runs[0], own_run(method, 2))
    assert same(runs[0].shared, runs[1].shared) and runs[1].summary["base_updates"] == 2


def test_a_model_that_was_trained_before_begins_with_its_factors(tmp_path):
    network = peft_bert()
    with torch.no_grad():
        for name, x in network.named_parameters():
            if "lora_B" in name:
                x.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    start = {name: x.clone() for name, x in network.named_parameters() if "lora_B" in name}
    seen = []

    class Seeing(QuietTrainer):
        def train(self):
            seen.append([torch.equal(x, start[name]) for name, x in self.model.named_parameters() if name in start])
            return super().train()

    federate(
        lambda client: Seeing(client.model or network, arguments(tmp_path), train_dataset=words(0)[0]), "fedit", 2, 2
    )
    assert [all(turn) for turn in seen] == [True, True, False, False]


def test_turns_and_results_do_not_depend_on_the_callers_generators(tmp_path):
    def run(draw):
        torch.manual_seed(draw)
        return federate(lambda client: QuietTrainer(
            client.model or peft.get_peft_model(bert(dropout=0.3), lora()), arguments(tmp_path), train_dataset=words(client.number)[0]
        ))  # fmt: skip

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = run(5)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's draws are left alone"
    assert same(one.shared, run(6).shared)


def test_a_trainers_own_settings_come_back(tmp_path):
    made = {}

    class Breaking(QuietTrainer):
        def training_step(self, *args, **settings):
            if made.get("break"):
                raise RuntimeError("the disk of site 0 is gone")
            return super().training_step(*args, **settings)

    def make(client):
        args = arguments(tmp_path, seed=11, data_seed=12)
        made["trainer"] = Breaking(client.model or peft_bert(), args, train_dataset=words(0)[0])
        made["callbacks"] = list(made["trainer"].callback_handler.callbacks)
        return made["trainer"]

    def settings():
        trainer, args = made["trainer"], made["trainer"].args
        assert trainer.callback_handler.callbacks == made["callbacks"]
        assert "create_scheduler" not in vars(trainer) and "create_optimizer" not in vars(trainer)
        return args.output_dir, args.seed, args.data_seed

    federate(make, "fedit", 1, 1)
    assert settings() == (str(tmp_path), 11, 12)
    assert made["trainer"].optimizer is None, "the moments are given up between turns"
    assert made["trainer"].callback_handler.optimizer is None
    made["break"] = True
    with pytest.raises(RuntimeError, match="site 0 is gone"):
        federate(make, "fedit", 1, 1)
    assert settings() == (str(tmp_path), 11, 12)


def test_checkpoints_and_logs_of_the_trainers_do_not_write_over_each_other(tmp_path):
    logs = []

    class Logs(QuietTrainer):
        def log(self, values, *args, **settings):
            logs.append((self.args.output_dir, values))
            return super().log(values, *args, **settings)

    def make(client):
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, logging_strategy="steps", logging_steps=1)
        return Logs(client.model or peft_bert(), args, train_dataset=words(client.number)[0])

    federate(make, "fedit", 2, 2)
    found = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("adapter_model.safetensors"))
    assert found == [f"client-{k}/round-{r}/checkpoint-{s}" for k in (0, 1) for r in (1, 2) for s in (2, 3)]
    assert {folder for folder, values in logs if "loss" in values} == {
        str(tmp_path / f"client-{k}" / f"round-{r}") for k in (0, 1) for r in (1, 2)
    }


def test_other_settings_of_a_trainer_work(tmp_path):
    def make(client):
        args = arguments(
            tmp_path, save_strategy="steps", eval_strategy="steps", eval_steps=1, save_steps=1, eval_on_start=True,
            load_best_model_at_end=True, metric_for_best_model="loss", gradient_accumulation_steps=2,
            include_num_input_tokens_seen="all",
        )  # fmt: skip
        train, test = words(client.number)
        return QuietTrainer(client.model or peft_bert(), args, train_dataset=train, eval_dataset=test)

    result = federate(make, "fedsa-lora", 2)
    assert [set(record["loss"]) for record in result.records] == [{0, 1, 2}] * 2
    assert "loss" in result.summary["final"]["clients"]["figures"]


# ---------------------------------------------------------------------------------------------- the run folder
def test_the_folder_is_that_of_a_run(tmp_path, commands):
    out, events, told = tmp_path / "run", [], []

    class Told(fedlora.Callback):
        def on_round(self, record):
            told.append(record["round"])

    result = federate(
        sampled(tmp_path / "o"), "fedsa-lora", 2, out=out, watch=events.append, callbacks=[Told()],
        checkpoint={"best": "clients"},
    )  # fmt: skip
    assert {"step", "turn", "round", "evaluation"} <= {event.kind for event in events}
    assert sum(event.kind == "step" for event in events) == 2 * 3 * TRAINING.local_steps and told == [1, 2]
    run = fedlora.open(out)
    assert (
        len(run.records) == 2
        and same(run.shared, result.shared)
        and torch.equal(run.tree(2)[QUERY]["B"], result.kept[2][QUERY]["B"])
    )
    assert run.table["task"]["objects"]["trainer"].endswith("sampled.<locals>.make")
    assert run.table["training"]["local_steps"] == TRAINING.local_steps
    assert json.loads((out / "progress.json").read_text())["state"] == "finished"
    assert result.summary["best"]["round"] in (1, 2) and (out / "best").is_dir()
    for command in (["show", out], ["report", out, "--out", tmp_path / "r.html"], ["watch", out]):
        done = commands.call(["fedlora", *map(str, command)], tmp_path)
        assert done.returncode == 0, done.stderr
    assert len(result.frame()) == 2 and "fedsa" in (tmp_path / "r.html").read_text().lower()


def lines(records):
    """Records as a folder has them, without what the clock says."""
    return [json.dumps({k: v for k, v in record.items() if k != "seconds"}) for record in records]


def stop(event):
    """Ctrl-C in the second round."""
    if event.kind == "step" and event.round == 1 and event.client == 1:
        raise KeyboardInterrupt


def stop_at_turn(event):
    """Ctrl-C after a turn of the second round, for trainers that report no steps."""
    if event.kind == "turn" and event.round == 1:
        raise KeyboardInterrupt


def test_a_broken_run_goes_on_with_the_same_bits(tmp_path):
    whole = federate(sampled(tmp_path / "a"), "fedex-lora", 3, keep_optimizer=True)
    out = tmp_path / "run"
    part = federate(sampled(tmp_path / "b"), "fedex-lora", 3, out=out, watch=stop, keep_optimizer=True)
    assert part.summary["interrupted"] and len(part.records) == 1
    done = federate(sampled(tmp_path / "c"), "fedex-lora", 3, out=out, again=True, keep_optimizer=True)
    assert same(done.shared, whole.shared) and all(same(done.kept[k], whole.kept[k]) for k in range(3))
    assert lines(done.records) == lines(whole.records)
    with pytest.raises(ConfigError, match="finished"):
        federate(sampled(tmp_path / "c"), "fedex-lora", 3, out=out, again=True, keep_optimizer=True)
    with pytest.raises(
        ConfigError,
        match=r"train in a loop of the caller; go on with it by fedlora.resume\(folder, trainer=...\)",
    ):
        fedlora.resume(out, rounds=5)


def test_another_model_does_not_go_on(tmp_path):
    out = tmp_path / "run"
    federate(loops(), "fedit", 3, out=out, watch=stop_at_turn)
    with pytest.raises(ValueError, match="other weights"):
        federate(loops(lambda: peft.get_peft_model(bert(1), lora())), "fedit", 3, out=out, again=True)
    with pytest.raises(ValueError, match="another configuration|adapter configuration"):
        federate(loops(lambda: peft_bert(r=3)), "fedit", 3, out=out, again=True)


def test_a_trained_start_is_that_of_the_first_process(tmp_path):
    """A model whose factors no seed determines: the folder keeps them."""

    def drawn(seed):
        torch.manual_seed(seed)
        return peft.get_peft_model(bert(), lora())

    whole = federate(loops(lambda: drawn(1)), "fedsa-lora", 3)
    out = tmp_path / "run"
    federate(loops(lambda: drawn(1)), "fedsa-lora", 3, out=out, watch=stop_at_turn)

    def resumed(client):
        loop = loops(lambda: drawn(2))(client)
        loop.turns = 1
        return loop

    done = federate(resumed, "fedsa-lora", 3, out=out, again=True)
    assert same(done.shared, whole.shared) and all(same(done.kept[k], whole.kept[k]) for k in range(3))


# -------------------------------------------------------------------------------------------------- evaluation
def test_a_function_evaluates_and_its_rows_count():
    def evaluate(network, client):
        assert not network.training and client.number in range(3)
        return {"accuracy": (float(client.number), 4), "share": 0.5}

    result = federate(loops(), "fedit", 1, evaluate=evaluate, metric="accuracy")
    assert result.records[0]["clients"]["each"] == [0, 0.25, 0.5] and result.records[0]["global"]["accuracy"] == 0.25
    assert result.records[0]["clients"]["figures"] == {"accuracy": 0.25, "share": 0.5}
    assert (
        result.summary["metric"] == {"name": "accuracy", "higher": True}
        or result.summary["metric"]["name"] == "accuracy"
    )


def test_trainers_without_test_rows_have_no_scores():
    result = federate(loops(), "fedit", 1)
    assert "clients" not in result.records[0] and "global" not in result.records[0]


def test_metrics_that_are_no_numbers_or_are_missing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"evaluate returned nan for 'loss' of client 0; return a finite number"):
        federate(loops(), "fedit", 1, evaluate=lambda network, client: {"loss": float("nan")})
    with pytest.raises(
        ValueError, match=r"the metric is 'accuracy', and the scores of client 0 are loss; set metric to one of these"
    ):
        federate(sampled(tmp_path), "fedit", 1, metric="accuracy")
    with pytest.raises(ValueError, match=r"the metric is 'f1', and the scores of client 0 are exact, rouge"):
        federate(loops(), "fedit", 1, evaluate=lambda network, client: {"rouge": 1.0, "exact": 0.0}, metric="f1")


def test_several_test_sets_of_a_trainer(tmp_path):
    def make(client):
        train, test = words(client.number)
        sets = {"near": test, "far": Words(6, 9)}
        return QuietTrainer(client.model or peft_bert(), arguments(tmp_path), train_dataset=train, eval_dataset=sets)

    result = federate(make, "fedit", 1, metric="near_loss", higher=False)
    assert set(result.records[0]["clients"]["figures"]) == {"near_loss", "far_loss"}


# ----------------------------------------------------------------------------------------------------- refusals
def raising(make=None, **settings):
    """The error of ``federate`` with these settings."""
    with pytest.raises(ValueError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        federate(make or loops(), **{"method": "fedit", "rounds": 1, **settings})
    text = str(error.value)
    assert text.endswith((".", "?")) and "\n" not in text and "Traceback" not in text
    return text


REFUSED = {
    "example-level privacy": ({"privacy": {"level": "example", "noise_multiplier": 1.0}}, "inside fedlora's own training loop; set privacy.level = 'client'"),
    "penalty": ({"method": {"name": "hetlora", "decay": 0.9, "tail_penalty": 0.1}}, "adds a penalty to the loss"),
    "poisoned rows": ({"attack": {"name": "label-flip", "clients": [0]}}, "changes rows inside fedlora's own loop"),
    "labels": ({"clients": {"count": 3, "permute_labels": True}}, "clients.permute_labels"),
    "method": ({"method": "fedti"}, "did you mean 'fedit'"),
    "section": ({"compresion": {"up": "int8"}}, "there is no argument 'compresion'; did you mean 'compression'"),
    "own section": ({"training": {"learning_rate": 1.0}}, "there is no argument 'training'"),
    "setting": ({"compression": {"upp": "int8"}}, "did you mean 'up'"),
    "type of a section": ({"robust": 3}, "robust is 3; it should be an object of its settings, or a dict"),
    "adapter of the method": ({"method": "fed-sb"}, r"trains fedlora.LoRASB, and the model has a LoRA; put that adapter on the network with fedlora.attach"),
    "rounds": ({"rounds": 0}, "rounds is 0"),
    "clients": ({"clients": 0}, "clients.count is 0"),
    "schedule": ({"schedule": "rounds"}, "schedule is 'rounds'; it is 'run' or 'turn'"),
    "ranks": ({"clients": {"count": 3, "ranks": [1, 2, 2]}}, "needs one rank for all"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_a_sentence(name):
    settings, text = REFUSED[name]
    assert text in raising(**settings)


def trainer_with(tmp_path, network=peft_bert, kind=QuietTrainer, settings=None, **more):
    """A function that makes one Trainer with other settings."""
    return lambda client: kind(
        client.model or network(),
        arguments(tmp_path, **(settings or {})),
        train_dataset=words(client.number)[0],
        **more,
    )


def test_trainers_that_cannot_keep_the_rules_are_refused(tmp_path):
    network = peft_bert()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    made = trainer_with(tmp_path, lambda: network, optimizers=(optimizer, None))
    assert "the Trainer was given optimizers=" in raising(made)
    assert "resume_from_checkpoint would replace" in raising(
        trainer_with(tmp_path, settings={"resume_from_checkpoint": "x"})
    )
    made = trainer_with(
        tmp_path,
        settings={"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        eval_dataset=words(0)[1],
    )
    assert 'reduce_lr_on_plateau, which has no schedule over a run; set schedule="turn"' in raising(made)

    def with_init(client):
        return QuietTrainer(args=arguments(tmp_path), model_init=lambda: peft_bert(), train_dataset=words(0)[0])

    assert "the Trainer was given model_init" in raising(with_init)


def test_objects_that_are_no_trainers_are_refused(tmp_path):
    class Silent:
        model = None

    assert "returned a Silent without .train for client 0" in raising(lambda client: Silent())
    assert "returned a NoneType without .model for client 0" in raising(lambda client: None)
    assert "the model is a BertForSequenceClassification; give what PEFT's get_peft_model returns" in raising(
        trainer_with(tmp_path, bert)
    )
    assert "the model is a Linear" in raising(lambda client: Loop(client, torch.nn.Linear(2, 2), words(0)[0]))
    own = raising(lambda client: Loop(client, peft_bert(), words(client.number)[0]))
    assert "client 1's trainer has a model of its own; build it on client.model" in own


def test_clients_with_other_adapters_or_no_rows_are_refused(tmp_path):
    def ranks(client):
        return QuietTrainer(peft_bert(r=2 + client.number // 2), arguments(tmp_path), train_dataset=words(0)[0])

    assert "client 2's model has LoRA(rank=3" in raising(ranks)
    assert "give all clients one adapter, and smaller ranks by clients.ranks" in raising(ranks)

    def empty(client):
        data = words(0)[0] if client.number != 1 else Words(0, 0)
        return Loop(client, client.model or peft_bert(), data)

    assert "client 1 has 0 training rows" in raising(empty)

    class Unknown:
        def __init__(self, client):
            self.model = client.model or peft_bert()

        def train(self):
            return own_turn(self.model, words(0)[0], 0, 0)

    assert "it is unknown how many rows client 0 trains on" in raising(Unknown)


def test_a_trainer_that_trains_another_model_changes_nothing_and_is_told():
    class Stale(Loop):
        def __init__(self, client):
            own = peft_bert()
            super().__init__(client, client.model or own, words(client.number)[0])
            self.optimizer = torch.optim.SGD(peft_bert().parameters(), lr=0.1)  # of a model that nobody trains

        def train(self):
            self.model(**torch.utils.data.default_collate([words(0)[0][0]])).loss.backward()
            self.optimizer.step()

    with pytest.warns(UserWarning, match="client 0's training changed no adapter in round 1; its optimizer may hold"):
        federate(Stale, "fedit", 1, 1)


def test_a_trainer_that_unfreezes_a_leaf_is_refused():
    class Unfreezing(Loop):
        def train(self):
            for name, x in self.model.named_parameters():
                x.requires_grad_(x.requires_grad or "lora_A" in name)
            return super().train()

    def make(client):
        return Unfreezing(client, client.model or peft_bert(), words(client.number)[0])

    assert "FFA-LoRA freezes it in this round" in raising(make, method="ffa-lora")


def test_a_trainer_that_changes_the_base_is_refused():
    class Unfreezing(Loop):
        def train(self):
            self.model.requires_grad_(True)
            return super().train()

    def make(client):
        return Unfreezing(client, client.model or peft_bert(), words(client.number)[0])

    assert "which belongs to the base and is not sent" in raising(make, method="fedit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_end_the_run_with_a_sentence(value):
    class Broken(Loop):
        def train(self):
            with torch.no_grad():
                next(x for x in self.model.parameters() if x.requires_grad).fill_(value)

    def make(client):
        kind = Broken if client.number == 1 else Loop
        return kind(client, client.model or peft_bert(), words(client.number)[0])

    with pytest.raises(FloatingPointError, match="client 1's weights are no longer finite in round 1; lower its"):
        federate(make, "fedit", 1)


def test_an_upload_beyond_the_limits_is_quarantined(tmp_path):
    class Loud(Loop):
        def train(self):
            with torch.no_grad():
                for x in self.model.parameters():
                    if x.requires_grad:
                        x += 1e4

    def make(client):
        kind = Loud if client.number == 1 else Loop
        return kind(client, client.model or peft_bert(), words(client.number)[0])

    result = federate(make, "fedit", 2, out=tmp_path / "run")
    assert [list(record["quarantined"]) for record in result.records] == [[1], [1]]
    assert all(record["cohort"] == [0, 2] for record in result.records)
