"""Folders become tables: what is read, how it is averaged, and what is said where something is missing."""

import json
from statistics import mean, stdev

import pytest

from fedlora.reporting import html as words
from fedlora.reporting.figures import thin_out
from fedlora.reporting.load import load_runs
from fedlora.reporting.tables import by_round as by_round
from fedlora.reporting.tables import comparison as standing
from fedlora.reporting.tables import totals
from fedlora.reporting.tables.comparison import compare_pairs, correct_holm, summarise_comparison
from tests.fixtures.run_folders import HOSTILE, METHODS, value, write_comparison, write_run


def test_curves_are_means_over_seeds_with_a_deviation(tmp_path):
    table = by_round.tabulate_curves(load_runs([write_comparison(tmp_path / "c")]))
    rows = [r for r in table.rows if r["label"] == "svd" and r["model"] == "global" and r["round"] == 2]
    (row,) = rows
    values = [value(1, seed, 2) for seed in (0, 1, 2)]
    assert row["value"] == pytest.approx(mean(values)) and row["seeds"] == 3
    assert row["high"] - row["value"] == pytest.approx(stdev(values)) == pytest.approx(row["value"] - row["low"])
    assert row["mb"] == pytest.approx(2 * 1.5) and row["seconds"] == pytest.approx(4.0)
    assert {r["label"] for r in table.rows} == set(METHODS) and len(table.rows) == 3 * 3 * 2


def test_bytes_time_and_errors_add_up(tmp_path):
    found = load_runs([write_run(tmp_path / "r", rounds=4)])
    assert {(r["direction"], r["part"]): r["mb"] for r in totals.tabulate_bytes(found).rows} == {
        ("up", "adapter"): 3.0, ("up", "head"): 1.0, ("down", "adapter"): 2.0,
    }  # fmt: skip
    seconds = {r["phase"]: r["seconds"] for r in totals.tabulate_phases(found).rows}
    assert seconds == {"train": 4.0, "combine": 1.0, "measure": 1.0, "evaluate": 1.0, "rest": 1.0}
    served = [r["error"] for r in by_round.tabulate_errors(found).rows if r["measure"] == by_round.MEASURES["served"]]
    assert served == pytest.approx([0.15, 0.075, 0.05, 0.0375])
    layers = {(r["part"], r["round"]): r["error"] for r in by_round.tabulate_layers(found).rows}
    assert layers["vit.layers.1.q", 2] == pytest.approx(0.1) and len(layers) == 8
    assert {r["factor"]: r["cosine"] for r in by_round.tabulate_cosines(found).rows} == pytest.approx(
        {"A": 0.9, "B": 0.3}
    )


def test_a_map_of_many_rounds_has_few_columns_that_are_means(tmp_path):
    table = by_round.tabulate_layers(load_runs([write_run(tmp_path / "r", rounds=90, parts=1)]))
    assert len(table.rows) == 30 and [table.rows[0]["round"], table.rows[0]["until"]] == [1, 3]
    assert table.rows[0]["error"] == pytest.approx(mean([0.1, 0.1 / 2, 0.1 / 3]))
    assert table.rows[-1]["until"] == 90


def test_clients_and_the_worst_of_them(tmp_path):
    folder = write_comparison(tmp_path / "c")
    personal = {"columns": {"local": {"each": [0.25, None, 0.75]}, "global": None}}
    (folder / "fedit-seed0" / "personal.json").write_text(json.dumps(personal))
    table = totals.tabulate_clients(load_runs([folder]))
    assert totals.find_worst(table, True, 1)["svd"] == [
        ("2", pytest.approx(mean(value(1, s, 3) for s in (0, 1, 2)) - 0.002))
    ]
    assert totals.find_worst(table, False, 1)["svd"][0][0] == "0", "where less is better, the worst has most"
    alone = [(r["client"], r["value"], r["model"]) for r in table.rows if r["label"] == "fedit: local-only"]
    assert alone == [("0", 0.25, "local-only"), ("2", 0.75, "local-only")]
    assert {r["model"] for r in table.rows if r["label"] == "local"} == {"own"}


def test_labels_of_clients(tmp_path):
    table = totals.tabulate_labels(load_runs([write_run(tmp_path / "r")]))
    assert [(r["client"], r["target"], r["rows"]) for r in table.rows][2:4] == [("1", "cat", 10), ("1", "dog", 1)]
    assert "seed 0" in table.note


def test_what_is_under_way_is_read_up_to_its_last_whole_line(tmp_path):
    (run,) = load_runs([write_run(tmp_path / "r", ended=False)])
    assert (run.state, len(run.digest.rounds), run.metric, run.higher) == ("under way", 3, "accuracy", True)
    assert "is not finished" in words.summarise_runs([run])
    assert ("versions and hardware", "written when the run ends") in words.describe_run(run)


def test_a_comparison_that_was_broken_off_is_read_by_its_folders(tmp_path):
    found = load_runs([write_comparison(tmp_path / "c", ended=False)])
    assert [(run.label, run.seed) for run in found][:4] == [("fedit", 0), ("fedit", 1), ("fedit", 2), ("local", 0)]


def test_faults_are_counted_and_named(tmp_path):
    more = {"quarantined": {"1": "its norm is odd"}, "absent": {"2": "late"}, "stragglers": [0]}
    found = load_runs([write_run(tmp_path / "r", more=more)])
    assert totals.count_faults(found) == {"quarantined": 3, "absent": 3, "straggler": 3}
    first = totals.tabulate_faults(found).rows[0]
    assert (first["round"], first["client"], first["kind"], first["reason"]) == (
        1,
        "1",
        "quarantined",
        "its norm is odd",
    )


def test_figures_that_are_no_numbers_are_left_out(tmp_path):
    more = {"global": {"accuracy": float("nan")}, "privacy": {"epsilon": float("inf"), "delta": 1e-5}}
    found = load_runs([write_run(tmp_path / "r", more=more)])
    assert not [r for r in by_round.tabulate_curves(found).rows if r["model"] == "global"]
    assert by_round.tabulate_epsilon(found).rows == []


def test_seeds_share_a_label_and_nothing_else_does(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("again", 1)):
        write_run(tmp_path / name, "fedit", seed)
    other = write_run(tmp_path / "other", "fedit", 0)
    (other / "config.toml").write_text((other / "config.toml").read_text().replace("rank = 4", "rank = 8"))
    labels = [run.label for run in load_runs([tmp_path / name for name in ("a", "b", "again", "other")])]
    assert labels[0] == labels[1] and len(set(labels)) == 3, "a run that was repeated is no further seed"
    assert labels == ["fedit (a)", "fedit (a)", "fedit (again)", "fedit (other)"]


@pytest.mark.parametrize(
    "spoil,sentence",
    [
        (lambda p: (p / "metrics.jsonl").write_text("{nonsense\n"), "line 1 .* is not readable JSON"),
        (lambda p: (p / "metrics.jsonl").write_text("[1]\n"), "line 1 .* is no round's record"),
        (lambda p: (p / "summary.json").write_text("{"), "is not readable JSON"),
        (lambda p: (p / "config.toml").unlink(), "has no config.toml"),
        (lambda p: [f.unlink() for f in p.iterdir()], "holds no run"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, spoil, sentence):
    spoil(folder := write_run(tmp_path / "r"))
    with pytest.raises(ValueError, match=sentence):
        load_runs([folder])


def test_runs_of_two_metrics_do_not_compare(tmp_path):
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    text = (other / "summary.json").read_text().replace('"accuracy"', '"perplexity"')
    (other / "summary.json").write_text(text)
    with pytest.raises(ValueError, match="accuracy and by perplexity"):
        load_runs([one, other])


def test_methods_and_paired_tests(tmp_path):
    found = load_runs([write_comparison(tmp_path / "c")])
    rows = {row["label"]: row for row in standing.tabulate_by_method(found).rows}
    values = [value(1, seed, 3) for seed in (0, 1, 2)]
    assert rows["svd"]["global"] == pytest.approx(mean(values)) and rows["svd"]["global_std"] == pytest.approx(
        stdev(values)
    )
    assert rows["svd"]["mb_up"] == 3.0 and rows["svd"]["seeds"] == 3
    tests = [row for row in standing.tabulate_tests(found).rows if row["model"].startswith("shared")]
    assert [(row["label"], row["against"], row["pairs"]) for row in tests] == [
        ("svd", "fedit", 3),
        ("local", "fedit", 3),
    ]
    assert tests[0]["difference"] == pytest.approx(0.1)
    assert standing.tabulate_tests(load_runs([write_comparison(tmp_path / "d", seeds=(0,))])).rows == [], (
        "one seed is no test"
    )


def test_the_paired_test_is_scipys_and_holms_correction():
    from scipy.stats import ttest_rel

    one, other = {0: 0.5, 1: 0.7, 2: 0.9, 3: 0.1}, {2: 0.6, 1: 0.65, 0: 0.45, 9: 0.0}
    found = compare_pairs(one, other)
    assert (found.pairs, found.difference) == (3, pytest.approx(0.4 / 3))
    assert found.p == pytest.approx(ttest_rel([0.5, 0.7, 0.9], [0.45, 0.65, 0.6]).pvalue)
    assert compare_pairs({0: 1.0}, {0: 2.0}) is None
    assert correct_holm([0.01, 0.04, 0.03, float("nan")])[:3] == pytest.approx([0.03, 0.06, 0.06])


def test_a_winner_is_named_only_where_the_paired_test_says_so():
    def rows(values, higher):
        return [
            {"method": name, "metric": {"name": "perplexity", "higher": higher}, "seeds": [0, 1, 2],
             "by_seed": {"global": {str(k): x for k, x in enumerate(own)}},
             "global": {"mean": mean(own), "std": 1.0}, "clients": None, "mb_up": None, "mb_down": None}
            for name, own in values.items()
        ]  # fmt: skip

    clear = {"svd": [0.90, 0.80, 0.85], "fedit": [0.80, 0.70, 0.751], "local": [0.70, 0.601, 0.65]}
    text = summarise_comparison(rows(clear, True))
    assert "shared model: best with svd" in text and "level" not in text
    noisy = {"svd": [47.2, 49.1, 48.1], "fedit": [48.9, 47.3, 48.3], "local": [70.0, 71.0, 70.4]}
    text = summarise_comparison(rows(noisy, False))  # 48.133 beside 48.167, and a spread of one
    assert "best with" not in text and "no winner" in text and "level with fedit" in text and "local" not in text
    (one,) = [summarise_comparison(rows({"svd": [0.9], "fedit": [0.1]}, True))]
    assert "best with" not in one and "no test" in one
    same = summarise_comparison(rows({"svd": [0.5, 0.6], "fedit": [0.5, 0.6]}, True))
    assert "level with fedit" in same


def test_a_sweeps_choice_says_what_it_is_level_with():
    from fedlora.reporting.tables import sweep as tuning

    def row(*each):
        trials = [{"trial": k, "each": own, "value": mean(own)} for k, own in enumerate(each)]
        return {"method": "fedit", "chosen": 0, "values": {}, "value": trials[0]["value"], "edge": [], "trials": trials}

    found = {"seeds": [0, 1, 2], "metric": {"higher": True}}
    assert "level with trial 1" in tuning._describe_choice(row([0.9, 0.7, 0.8], [0.7, 0.9, 0.79]), "accuracy", found)
    assert "best of 2" in tuning._describe_choice(row([0.9, 0.8, 0.7], [0.8, 0.7, 0.601]), "accuracy", found)


def test_thinning_keeps_every_lines_end():
    rows = [{"label": name, "round": i, "value": float(i)} for name in "ab" for i in range(1, 101)]
    few = thin_out(rows, ("label",), 20)
    assert len(few) <= 24 and [r["value"] for r in few if r["label"] == "a"][-1] == 100.0
    assert few[0]["value"] == pytest.approx(mean(range(1, 11))), "neighbours become their mean"
    assert thin_out(rows, ("label",), 1000) == rows


def test_the_opening_says_what_was_run(tmp_path):
    text = words.summarise_runs(load_runs([write_comparison(tmp_path / "c")]))
    for part in ("3 clients trained lora (rank 4) adapters of demo-vit", "image-classification (digits)", "dirichlet (alpha 0.3)",
                 "3 rounds of 10 steps", "fedit, svd and local: 9 runs, 3 seeds (0, 1 and 2)", "did best with local: accuracy"):  # fmt: skip
        assert part in text, text


def test_commands_are_fit_for_a_shell(tmp_path):
    folder = write_run(tmp_path / "a b; rm")
    (line,) = words.list_commands(load_runs([folder]))
    assert line == f"fedlora run '{folder}/config.toml' --out 'again/a b; rm'"


def test_names_of_other_parties_lose_what_acts_on_a_terminal(tmp_path):
    more = {"absent": {"\x1b[31m": f"{HOSTILE}\x07"}}
    (row, *_) = totals.tabulate_faults(load_runs([write_run(tmp_path / "r", more=more)])).rows
    assert row["client"] == "\\x1b[31m" and "\x07" not in row["reason"]
