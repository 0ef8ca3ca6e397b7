"""Tuning: what is tried, by which rows it is chosen, and what is left behind."""

import gzip
import json
import math
import shutil

import pytest

from fedlora.reporting.tables import sweep as tuning
from fedlora.reporting.terminal import show
from fedlora.runs import sweep as sweeping
from fedlora.runs.compare import for_label
from fedlora.runs.comparison import Cell
from fedlora.runs.config import build
from fedlora.runs.search_space import Grid
from fedlora.runs.sweep import Sweep
from fedlora.schema import ConfigError, read_table
from fedlora.tasks.data import rows as source
from tests.fixtures.federation import TINY_VIT

TABLE = {
    "rounds": 1,
    "model": {"name": str(TINY_VIT)},
    "task": {"name": "image-classification", "data": "digits", "train_rows": 100, "test_rows": 40},
    "clients": {"count": 2},
    "adapter": {"name": "lora", "rank": 2},
    "training": {"local_steps": 1, "batch_size": 8},
}
RATES = "training.learning_rate=1e-4,1e-2,5e-2"


def figures(values, higher=True, name="accuracy"):
    """Stands in for runs: a figure for each learning rate."""

    def executed(cells, jobs, watch):
        for cell in cells:
            value = values[cell.table["training"]["learning_rate"]]
            if value is None:
                yield Cell(cell.label, cell.seed, cell.table, cell.folder, failure="diverged")
                continue
            summary = {
                "metric": {"name": name, "higher": higher}, "final": {"clients": {"mean": value}},
                "seconds": {"whole": 1.0},
            }  # fmt: skip
            yield Cell(cell.label, cell.seed, cell.table, cell.folder, summary)

    return executed


def chosen_of(monkeypatch, tmp_path, values, **metric):
    monkeypatch.setattr(sweeping, "execute_all", figures(values, **metric))
    return Sweep.plan(TABLE, [RATES]).run(tmp_path / "s")["methods"][0]


def test_all_combinations_for_every_method():
    planned = Sweep.plan(TABLE, [RATES, "adapter.rank=2,4", "rounds=3"], ["fedit", "ravan", "centralised"])
    assert len(planned.trials) == 3 * 6 and planned.table["rounds"] == 3
    for label in ("fedit", "ravan", "centralised"):
        own = [t for t in planned.trials if t.label == label]
        assert len({(t.values["training.learning_rate"], t.values["adapter.rank"]) for t in own}) == 6
    # another kind of adapter has as many numbers as the rank asks for
    assert {t.table["adapter"]["lora_rank"] for t in planned.trials if t.label == "ravan"} == {2, 4}


def test_the_sweeps_values_win_over_tuned_ones():
    table = {**TABLE, "compare": {"fedit": {"training": {"learning_rate": 7.0, "batch_size": 4}}}}
    found = Sweep.plan(table, [RATES]).trials
    assert [t.table["training"]["learning_rate"] for t in found] == [1e-4, 1e-2, 5e-2]
    assert all(t.table["training"]["batch_size"] == 4 for t in found), "what is not swept stays as it was tuned"


@pytest.mark.parametrize(
    "overrides,labels,sentence",
    [
        (["rounds=3"], [], "no values to try"),
        ([], [], "no values to try"),
        (["training.learning_rat=1e-3,1e-2"], [], "learning_rate"),
        (["training.learning_rate=1e-3,fast"], [], "training.learning_rate is 'fast'"),
        (["training.learning_rate=1e-3,,1e-2"], [], "one of them is empty"),
        (["training.learning_rate=1e-3,1e-3"], [], "stands there twice"),
        (["method.strength=0.1,0.2"], ["fedrot-lora", "fedit"], "method.strength"),
        (["adapter.alpha=4.0,8.0"], ["ravan"], "make no difference"),
        (["seed=0,1"], [], "--seeds"),
        (["method.name=fedit,ravan"], [], "--methods"),
        (["compare.fedit.training.learning_rate=1e-3,1e-2"], ["fedit", "svd"], "would get 2 trials and 'svd' 1"),
        (["compare.ravan.training.learning_rate=1e-3,1e-2"], ["fedit"], "none of its methods"),
        (["training.learning_rate=1e-4:1e-2:log"], [], "--trials"),
        (["training.learning_rate=1e-3,1e-2"], ["fedit", "svvd"], "no method 'svvd'; did you mean 'svd'"),
        (["training.learning_rate=1e-2:1e-4"], [], "from a smaller to a larger"),
    ],
)
def test_mistakes_are_said_before_the_first_run(overrides, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sweep.plan(TABLE, overrides, labels)


def test_a_grid_of_ones_own_is_as_large_as_the_others():
    own = ["compare.fedit.training.learning_rate=1e-3,1e-2", "compare.svd.training.learning_rate=1e-2,1e-1"]
    found = Sweep.plan(TABLE, own, ["fedit", "svd"]).trials
    assert [t.table["training"]["learning_rate"] for t in found] == [1e-3, 1e-2, 1e-2, 1e-1]


def test_values_may_hold_commas():
    found = Grid.read(["clients.ranks=[1,2],[2,2]", 'model.head=["a,b"],["c"]'])
    assert found.settings == {"clients.ranks": [[1, 2], [2, 2]], "model.head": [["a,b"], ["c"]]}


def test_draws_are_the_same_for_every_method():
    ranges = ["training.learning_rate=1e-4:1e-1:log", "training.batch_size=4:64"]
    found = Sweep.plan(TABLE, ranges, ["fedit", "ravan"], trials=5).trials
    values = [t.values for t in found]
    assert values[:5] == values[5:] and len({v["training.learning_rate"] for v in values}) == 5
    assert all(1e-4 <= v["training.learning_rate"] <= 1e-1 and 4 <= v["training.batch_size"] <= 64 for v in values)
    assert all(isinstance(v["training.batch_size"], int) for v in values)
    assert [t.values for t in Sweep.plan({**TABLE, "seed": 1}, ranges, trials=5).trials] != values[:5]
    with pytest.raises(ConfigError, match="fewer than 4 different"):
        Sweep.plan(TABLE, ["training.batch_size=4,8"], trials=4)


def test_the_best_is_chosen_by_the_metrics_direction(monkeypatch, tmp_path):
    values = {1e-4: 0.2, 1e-2: 0.9, 5e-2: 0.4}
    row = chosen_of(monkeypatch, tmp_path / "a", values)
    assert (row["chosen"], row["value"], row["edge"]) == (2, 0.9, [])
    row = chosen_of(monkeypatch, tmp_path / "b", values, higher=False, name="perplexity")
    assert (row["chosen"], row["value"], row["edge"]) == (1, 0.2, ["training.learning_rate"])


def test_a_diverged_trial_counts_and_loses(monkeypatch, tmp_path):
    for n, odd in enumerate((None, math.nan)):
        row = chosen_of(monkeypatch, tmp_path / str(n), {1e-4: 0.1, 1e-2: 0.3, 5e-2: odd}, higher=False, name="nll")
        assert row["chosen"] == 1 and [t["diverged"] for t in row["trials"]] == [0, 0, 1]
    row = chosen_of(monkeypatch, tmp_path / "none", {1e-4: None, 1e-2: None, 5e-2: None})
    assert row["chosen"] is None and "compare" not in build_chosen(tmp_path / "none" / "s")


def test_a_trial_whose_figure_is_not_over_all_clients_says_so(monkeypatch, tmp_path, capsys):
    """A party that could not score, in the simulation: the trials' means are over different clients."""
    executed = figures({1e-4: 0.2, 1e-2: 0.9, 5e-2: 0.4})

    def one_short(cells, jobs, watch):
        for cell in executed(cells, jobs, watch):
            few = cell.table["training"]["learning_rate"] == 1e-2
            cell.summary["scored"] = {"clients": 1 if few else 2, "of": 2}
            yield cell

    monkeypatch.setattr(sweeping, "execute_all", one_short)
    found = Sweep.plan(TABLE, [RATES]).run(tmp_path / "s")
    assert [trial["over"] for trial in found["methods"][0]["trials"]] == [None, "1 of 2 clients", None]
    show(*tuning.tabulate_sweep(found))
    assert "chosen, mean over 1 of 2 clients" in " ".join(capsys.readouterr().out.split())


def build_chosen(folder):
    found = read_table(folder / "chosen.toml")
    return {key: value for key, value in found.items() if key != "compare" or value}


def test_chosen_toml_is_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(sweeping, "execute_all", figures({1e-4: 0.2, 1e-2: 0.9, 5e-2: 0.4}))
    labels = ["fedit", "ravan", "fedrot-lora", "centralised"]
    table = {**TABLE, "compare": {"ravan": {"method": {"score": "weight"}, "training": {"learning_rate": 3.0}}}}
    planned = Sweep.plan(table, [RATES, "adapter.rank=2,4"], labels)
    found = planned.run(tmp_path / "s")
    again = read_table(tmp_path / "s" / "chosen.toml")
    for row in found["methods"]:
        trial = next(t for t in planned.trials if (t.label, t.number) == (row["method"], row["chosen"]))
        assert row["values"]["training.learning_rate"] == 1e-2
        assert for_label(again, row["method"]) == trial.table
        assert build(for_label(again, row["method"])).table["task"]["test_split"] == "test"
    assert again["compare"]["fedit"]["adapter"] == {"rank": 2}, "also where it is what the table says"
    assert again["compare"]["ravan"]["method"]["score"] == "weight"


def test_an_interrupted_sweep_goes_on(monkeypatch, tmp_path):
    ran = []
    whole = figures({1e-4: 0.2, 1e-2: 0.9, 5e-2: 0.4})

    def broken(cells, jobs, watch):
        for cell in whole(cells, jobs, watch):
            if len(ran) == 2:
                raise KeyboardInterrupt
            ran.append(cell.folder)
            yield cell

    planned = Sweep.plan(TABLE, [RATES])
    monkeypatch.setattr(sweeping, "execute_all", broken)
    with pytest.raises(KeyboardInterrupt):
        planned.run(tmp_path / "s")
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["finished"] is False
    left = tmp_path / "s" / "trials" / "fedit-3-seed0"
    left.mkdir(parents=True)
    (left / "config.toml").write_text("cut off")
    monkeypatch.setattr(
        sweeping, "execute_all", lambda cells, *rest: whole(ran.extend(c.folder for c in cells) or cells, *rest)
    )
    found = planned.run(tmp_path / "s")
    assert len(ran) == len(set(ran)) == 3 and found["finished"] and not left.exists()
    with pytest.raises(ConfigError, match="holds another sweep"):
        Sweep.plan(TABLE, ["training.learning_rate=1e-4,1e-2"]).run(tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        planned.run(tmp_path / "other")


def test_real_trials_leave_a_comparison_to_run(tmp_path):
    planned = Sweep.plan(TABLE, ["training.learning_rate=1e-3,1e-2"], ["fedit", "fedsa-lora"])
    found = planned.run(tmp_path / "s")
    assert found["finished"] and {row["by"] for row in found["methods"]} == {"global", "clients"}
    for row in found["methods"]:
        assert row["chosen"] in (1, 2) and len(row["trials"]) == 2 and row["edge"] == ["training.learning_rate"]
    used = read_table(tmp_path / "s" / "trials" / "fedit-1-seed0" / "config.toml")
    assert used["task"]["test_split"] == "train * 0.1"
    again = planned.run(tmp_path / "s")
    assert again == found, "nothing is run twice"


# ------------------------------------------------------------------------------------- which rows
def rows_of(task):
    config = build({**TABLE, "task": task})
    return config.task.load(config.model.name, 0)


def test_held_out_rows_are_training_rows_and_no_others():
    task = {"name": "image-classification", "data": "digits"}
    whole, tuned = rows_of(task), rows_of({**task, "test_split": source.held_out_split("train", 0.25)})
    assert len(tuned.test) == 337 and len(tuned.train) + len(tuned.test) == len(whole.train)
    both = [*tuned.train.features["pixels"], *tuned.test.features["pixels"]]
    assert sorted(hash(x.numpy().tobytes()) for x in both) == sorted(
        hash(x.numpy().tobytes()) for x in whole.train.features["pixels"]
    )
    again = rows_of({**task, "test_split": source.held_out_split("train", 0.25)})
    assert (again.test.features["pixels"] == tuned.test.features["pixels"]).all()
    for share in ("half", "1.5", "0.0001"):
        with pytest.raises(ValueError, match="share"):
            rows_of({**task, "test_split": f"train * {share}"})


def test_validation_rows_are_the_datas_own_unless_asked_otherwise(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "a,0\nb,1\n" * 10)
    task = {"name": "text-classification", "data": str(tmp_path)}
    table = {**TABLE, "task": task}
    assert sweeping.find_validation_split(table, None) == "validation"
    assert sweeping.find_validation_split(table, 0.2) == "train * 0.2"
    assert (
        sweeping.find_validation_split({**table, "task": {**task, "test_split": "validation"}}, None) == "train * 0.1"
    )
    with pytest.raises(ConfigError, match="--holdout is 1.5"):
        sweeping.find_validation_split(table, 1.5)
    own = {**table, "task": {**task, "label_names": ["0", "1"]}, "clients": {"count": 2, "partition": {"name": "own"}}}
    with pytest.raises(ConfigError, match="no validation data"):
        sweeping.find_validation_split(own, None)


@pytest.mark.shared
def test_the_test_rows_are_never_read(shared, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(shared / "data" / "banking77", folder)
    folder.chmod(0o755)
    for test in (folder / "test.jsonl.gz",):
        test.unlink()
        test.write_bytes(gzip.compress(b'{"text": "poisoned'))
    table = {
        **TABLE,
        "model": {"name": str(shared / "models" / "minilm-l3-h384-v8k")},
        "task": {
            "name": "text-classification",
            "data": str(folder),
            "train_rows": 80,
            "test_rows": 40,
            "max_length": 16,
        },
    }
    for holdout, split in ((None, "validation"), (0.1, "train * 0.1")):
        found = Sweep.plan(table, ["training.learning_rate=1e-3,1e-2"], holdout=holdout).run(tmp_path / split)
        assert found["validation"] == split and found["methods"][0]["chosen"] is not None
    with pytest.raises(ValueError, match="could not be read"):
        build(table).federation()
