"""Answers graded on the real benchmarks: what is right counts, what is wrong does not."""

import gzip
import json

import pytest

from fedlora.tasks.metrics.answers import extract_number, extract_option, is_correct, normalize_text

NUMBERS = {
    "so it is 1,234.5 in all": "1234.5",
    "She pays $1,234.50.": "1234.50",
    "a loss of -$5.": "-5",
    "a loss of $-5": "-5",
    "−7 degrees": "-7",
    "7-3": "3",
    "9 - 4": "4",
    "50%": "50",
    "1, 2": "2",
    "12,34": "34",
    "it is 24.0": "24",
    ".5": "0.5",
    "3/4": "4",
    "first 8, then\n#### 10\nQuestion: 99 more": "10",
    "#### -3": "-3",
    "5 ####": "5",
}


@pytest.mark.parametrize("text,value", NUMBERS.items())
def test_the_number_that_a_text_comes_to(text, value):
    assert is_correct(text, value, "number")
    assert not is_correct(text, f"1{value}" if value[0] != "-" else value[1:], "number")


@pytest.mark.parametrize("text", ["", "none", "####", "#### x", "one hundred"])
def test_no_number_is_never_right(text):
    assert extract_number(text) is None and not is_correct(text, "0", "number")


@pytest.mark.parametrize(
    "text,gold,is_right",
    [
        (" true", "True", True),
        ("True.", "True", True),
        ("Let us see. So the answer is Yes.", "yes", True),
        ("The answer is: not  valid\nQ: next", "not valid", True),
        ("invalid", "valid", False),
        ("valid argument", "valid", False),
        ("(B)", "(B)", True),
        ("B", "(B)", True),
        ("b. the second", "(B)", True),
        ("(b) the second", "(B)", True),
        ("Not (A). So the answer is (B).", "(B)", True),
        ("(A)", "(B)", False),
        ("Because of it", "(B)", False),
        ("", "(B)", False),
        ("", "yes", False),
        ("> ) ]", "> ) ]", True),
        ("> ) ]", "> )", False),
    ],
)
def test_words_and_options(text, gold, is_right):
    assert is_correct(text, gold, "text") is is_right


def test_forms():
    assert normalize_text("  The answer is  Two   Words. ") == "two words"
    assert extract_option("no option here") is None


def rows(shared, name, split):
    with gzip.open(shared / "data" / name / f"{split}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.shared
def test_gsm8k(shared):
    found = rows(shared, "gsm8k", "test")
    assert len(found) == 1319
    assert all(is_correct(row["answer"], row["final"], "number") for row in found)
    assert all(is_correct(f"That comes to ${row['final']}.", row["answer"], "number") for row in found)
    wrong = [row["answer"].rpartition("####")[0] + f"#### {int(row['final']) + 1}" for row in found]
    assert not any(is_correct(text, row["final"], "number") for text, row in zip(wrong, found))
    assert not any(is_correct(f"#### {row['final']}0", row["answer"], "number") for row in found if row["final"] != "0")


@pytest.mark.shared
def test_svamp(shared):
    found = [row for split in ("train", "validation", "test") for row in rows(shared, "svamp", split)]
    assert len(found) == 1000
    for row in found:
        gold = str(row["answer"])
        assert is_correct(f"{row['answer']:.0f}", gold, "number"), row
        assert is_correct(f"The answer is {row['answer']:,}.", gold, "number"), row
        assert not is_correct(f"{row['answer'] + 1:.0f} and nothing else", gold, "number")


@pytest.mark.shared
def test_big_bench_hard(shared):
    found = rows(shared, "bbh", "test")
    targets = {}
    for row in found:
        targets.setdefault(row["task"], set()).add(row["target"])
    for row in found:
        gold = row["target"]
        for text in (gold, f" {gold.upper()}", f"Step by step. So the answer is {gold}.", f"{gold}\n\nQ: more"):
            assert is_correct(text, gold, "text"), (row["task"], text, gold)
        for other in targets[row["task"]] - {gold}:
            assert not is_correct(other, gold, "text"), (row["task"], other, gold)
