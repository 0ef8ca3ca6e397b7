"""A run's models side by side: each column against what makes it elsewhere, and clients that never took part."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import fedlora
from fedlora.engines.in_process import InProcess
from fedlora.rounds import client_start
from fedlora.runs.compare import for_label
from fedlora.runs.config import build
from fedlora.runs.folder import RunFolder
from fedlora.runs.personalization import PersonalModels, evaluate_personalization
from fedlora.schema import ConfigError, dumps
from fedlora.tasks.metrics.scores import compute_metrics
from fedlora.training.local import LocalTrainer
from tests.fixtures.federation import ADAPTERS, config, same
from tests.fixtures.own_files import ROWS, on_files, reset, write

NEW = ["clients.count=4", "clients.new=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by method, each made once."""
    made = {}

    def get(name, *settings):
        key = (name, *settings)
        if key not in made:
            folder = tmp_path_factory.mktemp("run") / "r"
            c = config(f"method.name={name}", *ADAPTERS.get(name, []), *NEW, *settings)
            made[key] = folder, fedlora.run(c, folder)
        return made[key]

    return get


@pytest.mark.parametrize("name", ["fedit", "fedsa-lora", "flora", "hetlora", "feddpa", "ravan"])
def test_global_and_held_are_what_the_run_scored(name, runs):
    unequal = ["clients.ranks=[1, 2]"] if name == "hetlora" else []
    folder, result = runs(name, *unequal)
    sides, final = PersonalModels(RunFolder.open(folder), 1), result.summary["final"]
    found = sides.score(range(3))
    each = [compute_metrics(found["held"][client])["accuracy"] for client in range(3)]
    assert each == final["clients"]["each"][:3] and final["clients"]["each"][3] is None
    assert (found["global"] is None) == result.summary["personal"]
    if name in ("fedit", "ravan", "flora"):
        assert found["global"] == found["held"]


@pytest.mark.parametrize("name", ["fedit", "fedsa-lora"])
def test_fine_tuned_is_a_plain_local_trainer_run(name, runs):
    folder, result = runs(name)
    sides = PersonalModels(RunFolder.open(folder), 4)
    for client in (1, 3):  # one that took part, and a new one
        f = config(f"method.name={name}", *NEW).federation()
        turn = f.turn(2, client)
        start = client_start(f.rules, result.shared, result.kept.get(client, {}), turn)
        training = replace(f.training, local_steps=4)
        trainer = LocalTrainer(f.model, f.task, f.data.train, f.shards[client], training, turn, f.rounds)
        end = trainer.fit(start, {part: rule.adapter.trainable for part, rule in f.rules.items()}, f.rules)
        assert same(sides.fine_tune(client), end)
        assert not same(end, start)
        batch = f.task.collate(f.data.test, f.shards[client].test)
        f.model.load(end)
        with torch.inference_mode():
            right = f.task.outputs(f.model.network.eval(), batch).argmax(-1) == batch["labels"]
        mine = compute_metrics(sides.score_tree(client, sides.fine_tune(client)))["accuracy"]
        assert mine == pytest.approx(float(right.float().mean()))


def test_fine_tuning_has_a_constant_rate_after_a_schedule(runs):
    """A linear schedule has come to zero, and would go on below it."""
    folder, result = runs("fedit", "training.schedule=linear")
    f = config(*NEW).federation()
    training, turn = replace(f.training, local_steps=2), f.turn(2, 0)
    trainer = LocalTrainer(f.model, f.task, f.data.train, f.shards[0], training, turn, f.rounds)
    end = trainer.fit(result.shared, {part: rule.adapter.trainable for part, rule in f.rules.items()}, f.rules)
    assert f.training.schedule == "constant" and same(PersonalModels(RunFolder.open(folder), 2).fine_tune(0), end)


def test_local_only_is_the_method_local_with_the_same_budget(runs):
    unequal = ["clients.capability='uniform'", "clients.capability_scales=['steps']", "clients.stragglers=0.5"]
    folder, _ = runs("fedit", *unequal, "clients.dropout=0.34")
    found = evaluate_personalization(RunFolder.open(folder), 1)["columns"]["local"]
    alone = fedlora.run(config("method.name=local", *NEW, *unequal, "clients.dropout=0.34")).summary["final"]["clients"]
    assert found == {**alone, "capability": found["capability"]}
    assert found["capability"] == alone["capability"]


def test_centralised_is_that_of_a_comparison_where_everybody_takes_part(tmp_path):
    folder = tmp_path / "r"
    fedlora.run(config("clients.count=3"), folder)
    run = RunFolder.open(folder)
    found = evaluate_personalization(run, 1)["columns"]["centralised"]
    one = build({**for_label(run.config.table, "centralised")}).federation()
    *_, last = InProcess().run(one)
    f = config("clients.count=3").federation()
    one.model.load(last.shared)
    for client, shard in enumerate(f.shards):
        batch = f.task.collate(f.data.test, shard.test)
        with torch.inference_mode():
            right = f.task.outputs(one.model.network.eval(), batch).argmax(-1) == batch["labels"]
        assert found["each"][client] == pytest.approx(float(right.float().mean()))


def test_new_clients_rows_are_never_trained_on(runs, monkeypatch):
    seen: set[int] = set()
    fit = LocalTrainer.fit

    def spy(self, *rest):
        seen.update(self.shard.train.tolist())
        return fit(self, *rest)

    monkeypatch.setattr(LocalTrainer, "fit", spy)
    f = config("method.name=fedit", *NEW).federation()
    cohorts = [done.record["cohort"] for done in InProcess().run(f)]
    assert cohorts == [[0, 1, 2]] * 2
    theirs = set(f.shards[3].train.tolist())
    assert theirs and not seen & theirs
    assert seen == {int(row) for shard in f.shards[:3] for row in shard.train}
    sides = PersonalModels(RunFolder.open(runs("fedit")[0]), 1)
    seen.clear()
    sides.score_centralised_model(range(4), lambda event: None)
    assert seen and not seen & theirs, "new to the centralised model, too"
    seen.clear()
    sides.score_alone(lambda event: None)
    assert not seen & theirs


def test_new_clients_begin_with_the_global_model_or_with_nothing_of_their_own(runs):
    for name in ("fedit", "fedsa-lora"):
        folder, result = runs(name)
        found = evaluate_personalization(RunFolder.open(folder), 3)
        assert found["new"]["held"]["each"][:3] == [None] * 3
        f = config(f"method.name={name}", *NEW).federation()
        f.model.load(result.shared)  # FedSA's shared B is zero, and its head the pretrained network's
        batch = f.task.collate(f.data.test, f.shards[3].test)
        with torch.inference_mode():
            right = f.task.outputs(f.model.network.eval(), batch).argmax(-1) == batch["labels"]
        assert found["new"]["held"]["each"][3] == pytest.approx(float(right.float().mean()))
        assert (found["new"]["global"] is None) == (name == "fedsa-lora")
        assert set(found["new"]) == {"global", "held", "tuned", "centralised"}
        again = evaluate_personalization(RunFolder.open(folder), 3)
        assert found == again == json.loads((folder / "personal.json").read_text())


def test_mistakes(runs, tmp_path):
    folder, _ = runs("fedsa-lora")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    summary = json.loads((copy / "summary.json").read_text())
    for change, sentence in (({"rounds": 0}, "has no finished round"), ({"kept": False}, "lies on its own machine")):
        (copy / "summary.json").write_text(json.dumps({**summary, **change}))
        with pytest.raises(ConfigError, match=sentence):
            evaluate_personalization(RunFolder.open(copy))
    (copy / "summary.json").write_text(json.dumps(summary))
    text = (copy / "config.toml").read_text()
    with pytest.raises(ConfigError, match="clients.partition is 'own', so the rows are on the clients' machines"):
        (copy / "config.toml").write_text(dumps(config("clients.partition={name = 'own'}").table))
        evaluate_personalization(RunFolder.open(copy))
    (copy / "config.toml").write_text(text.replace('data = "digits"', 'data = "./gone.csv"'))
    with pytest.raises(ValueError, match="there is no data at './gone.csv'"):
        evaluate_personalization(RunFolder.open(copy))


def begun(tmp_path):
    """A run on files of its own, and its folder with the best round."""
    fedlora.run(on_files(tmp_path, "rounds=2", "checkpoint.best='clients'"), tmp_path / "run")
    return tmp_path


CHANGES = {  # what is done to the data or the model, and what is said
    "rows": (lambda place: write(place / "data", ROWS[1:], ROWS[:30]), "there are 59 training rows, and were 60"),
    "test rows": (lambda place: write(place / "data", ROWS, ROWS[1:31]), "test rows have another content"),
    "the model": (lambda place: reset(place / "model", {"hidden_act": "relu"}), 'hidden_act is "relu", and was'),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_whose_data_or_model_changed_is_refused(what, tmp_path):
    place, (change, sentence) = begun(tmp_path), CHANGES[what]
    change(place)
    for folder in (place / "run", place / "run" / "best"):
        with pytest.raises(ValueError, match="was begun with other data or another model") as found:
            evaluate_personalization(RunFolder.open(folder), 1)
        assert sentence in str(found.value) and not (folder / "personal.json").exists()


def test_the_same_rows_in_new_files_are_scored_and_a_run_without_checkpoints_is_refused(tmp_path):
    place = begun(tmp_path)
    write(place / "data", ROWS, ROWS[:30])
    for folder in (place / "run", place / "run" / "best"):
        assert evaluate_personalization(RunFolder.open(folder), 1)["columns"]["held"]
    shutil.rmtree(place / "run" / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoints with digests of its data and model"):
        evaluate_personalization(RunFolder.open(place / "run"), 1)
