"""The papers' experiments: every configuration is whole, and its own command names what there is."""

import re
import shlex
from pathlib import Path

import pytest
from benchmarks.studies import STUDIES, TUNING_SEED, Book, best_rate, missing

from fedlora.comparison import for_label
from fedlora.config import build, read_table

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
