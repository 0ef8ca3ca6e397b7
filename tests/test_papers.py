"""The papers' experiments: every configuration is whole, and its own command names what there is."""

import re
import shlex
from pathlib import Path

import pytest
from benchmarks import attacks, study_tables
from benchmarks.studies import ROOT, STUDIES, TUNING_SEED, Book, best_rate, missing

from fedlora.runs.compare import for_label
from fedlora.runs.config import build
from fedlora.schema import read_table

PLACE = Path(__file__).parents[1] / "examples" / "papers"
FILES = sorted(PLACE.rglob("*.toml"))


def commands(path: Path) -> list[list[str]]:
    lines = re.findall(r"^# (fedlora .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_label_of_its_command_builds(path):
    found, table = commands(path), read_table(path)
    assert found and any(str(Path(word)).endswith(f"{path.parent.name}/{path.name}") for word in found[0])
    labels = {label for words in found for label in words[words.index("--methods") + 1].split(",")}
    for label in labels:
        config = build(for_label(table, label))
        assert config.rounds == table["rounds"] and config.model.name == table["model"]["name"]
    strange = set(table.get("compare", {})) - labels
    assert not strange, f"{strange} is set and never asked for"


def test_each_paper_has_both_sizes():
    for folder in (p for p in PLACE.iterdir() if p.is_dir()):
        names = [path.stem for path in folder.glob("*.toml")]
        assert any(name.endswith("-full") for name in names) and any(name.endswith("-small") for name in names)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_tries_every_rate_for_every_label_before_any_run(name, tmp_path):
    study, book = STUDIES[name], Book(tmp_path / "book.jsonl")
    tried = []
    for key, overrides in missing(study, book):
        if key["phase"] == "run":
            break
        assert "task.test_split=validation" in overrides and key["seed"] == TUNING_SEED
        tried.append((key["label"], key["rate"]))
        book.add({**key, "value": None if key["rate"] == study.rates[0] else 1 - key["rate"], "higher": True})
    assert sorted(tried) == sorted((label, rate) for label in study.labels for rate in study.rates)
    assert best_rate(study, book, study.labels[0]) == study.rates[1], "one that diverged is never the best"
    assert key["rate"] == study.rates[1]
    assert len(Book(book.path, []).rows) == 0 and len((tmp_path / "book.jsonl").read_text().splitlines()) == len(tried)


def test_tables_of_a_study_are_its_lines(tmp_path, monkeypatch):
    name = "ravan-capability"
    study, path = STUDIES[name], tmp_path / f"{name}.jsonl"
    monkeypatch.setattr(study_tables.Book, "of", classmethod(lambda kind, name: kind(path, list(book.rows))))
    book = Book(path)
    for key, _ in missing(study, book):
        best = key["rate"] == study.rates[1]
        place = study.labels.index(key["label"])
        value = 0.5 + 0.1 * place + 0.001 * key["seed"] if best else 0.1  # the first label is the worst
        groups = [
            {"capability": 0.25, "clients": 2, "mean": value / 2},
            {"capability": 1.0, "clients": 1, "mean": value},
        ]
        figures = {"value": value, "metric": "accuracy", "higher": True, "errors": {"served": 0.3 - 0.1 * place}}
        book.add(
            {
                **key,
                **figures,
                "bytes": {"up": 10**6, "down": 0},
                "clients": {"capability": groups, "each": [value, None]},
            }
        )
    stale = {**book.rows[-1], "rate": study.rates[0], "value": 9.0}  # of a rate that was the best before
    book.add(stale)
    rows = study_tables.table(name).splitlines()
    assert len(rows) == 2 + len(study.labels) and f"| {study.rates[1]:g} |" in rows[2]
    assert "0.501 ± 0.001" in rows[2] and "+0.100, p =" in rows[3] and "9.0" not in "".join(rows)
    assert "-1.00 ± 0.00 over 9 federations" in study_tables.explained(name)
    assert "| uniform | flexlora | 0.251 ± 0.001 | 0.501 ± 0.001 |" in study_tables.groups(name)
    lines = study_tables.each(name).splitlines()
    assert lines[2].startswith("| 0 | 0.501 ± 0.001 |") and lines[3].startswith("| 1 | – |")
    assert study_tables.trials(name).count("| 0.100 |") >= len(study.labels)


def test_the_attacks_table_counts_what_diverged_and_says_what_defences_cost(tmp_path):
    book = Book(tmp_path / "book.jsonl")
    for seed in range(3):
        own = {"method": "fedit", "attack": "none", "share": 0.0, "defence": "krum", "seed": seed}
        book.rows.append({**own, "accuracy": 0.5 + seed / 10, "quarantined": {"3": 2}, "server_seconds": 1.0 + seed})
        told = {"accuracy": 0.25, "success": 0.5} if seed else {"accuracy": None, "failure": "loss is nan"}
        book.rows.append({**own, "attack": "backdoor", "share": 0.3, "defence": "clip", **told})
    accuracy, success, cost = attacks.tables(book, "fedit").split("\n\n")
    assert "| none | – | – | 0.60 ± 0.10 | – |" in accuracy
    assert "| 0.25 ± 0.00 1 of 3 diverged |" in accuracy and "none" not in success
    assert cost.splitlines()[2:] == ["| krum | 0.60 ± 0.10 | 2.00 ± 1.00 | 2.0 |"]


def test_the_page_has_the_tables_of_the_runs():
    page = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    for table in attacks.tables(Book.of("attacks"), "fedit").split("\n\n"):
        assert table in page, "run `python -m benchmarks.attacks --table` and put its tables there"
