"""Rows without a value for a prompt, and rows in which nothing is left to learn."""

import csv
import json

import pytest
import torch

from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.data.tokens import IGNORED, pad_batch

pytestmark = pytest.mark.shared
ALPACA = [
    {"instruction": "Name a colour.", "input": "the sky", "output": "Blue."},
    {"instruction": "Say hello.", "input": "", "output": "Hello."},
]
PLAIN = "### Instruction:\nSay hello.\n\n### Response:\n"


@pytest.fixture(scope="module")
def model(shared):
    return str(shared / "models" / "stories260k-llama")


def lines(folder, rows, name="train"):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(folder, rows, name="train"):
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def decoded(task, model, split="train"):
    """Each row's whole text, and what of it is learnt."""
    own, found = task.preprocessor(model), getattr(task.load(model, 0), split)
    batch = pad_batch(found, torch.arange(len(found)))
    pairs = zip(batch["input_ids"], batch["labels"], found.lengths)
    return [(own.decode(ids[1:n]), own.decode(x[x != IGNORED])) for ids, x, n in pairs]


def gone(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


EMPTY = {
    "an empty text": (lines, ALPACA),
    "null": (lines, [ALPACA[0], {**ALPACA[1], "input": None}]),
    "NaN": (lines, [ALPACA[0], {**ALPACA[1], "input": float("nan")}]),
    "no key": (lines, [ALPACA[0], gone(ALPACA[1], "input")]),
    "an empty cell": (table, ALPACA),
    "no column": (lines, [gone(row, "input") for row in ALPACA]),
}


@pytest.mark.parametrize("write,rows", EMPTY.values(), ids=EMPTY)
def test_a_missing_value_is_an_empty_text_in_a_prompt(tmp_path, model, write, rows):
    write(tmp_path, rows)
    write(tmp_path, rows, "test")
    for named in (
        {},
        {"prompt": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n", "response": "output"},
    ):
        if "input" in rows[0] or not named:
            found = decoded(CausalLM(str(tmp_path), **named), model)[1]
            assert found == (f"{PLAIN}Hello.</s>", "Hello.</s>")


def test_a_column_that_one_split_lacks_is_empty_there(tmp_path, model):
    lines(tmp_path, ALPACA)
    lines(tmp_path, [gone(ALPACA[1], "input")], "test")
    own = {"prompt": "{instruction} {input}\n\n", "response": "output"}
    assert decoded(CausalLM(str(tmp_path), **own), model, "test") == [("Say hello. \n\nHello.</s>", "Hello.</s>")]
    with pytest.raises(ValueError, match=r"no column 'inptu' \(task.prompt\); did you mean 'input'"):
        CausalLM(str(tmp_path), prompt="{instruction} {inptu}", response="output").load(model, 0)


def test_a_row_that_asks_nothing_is_refused(tmp_path, model):
    lines(tmp_path, [*ALPACA, {"output": "Hm."}])
    lines(tmp_path, ALPACA, "test")
    with pytest.raises(
        ValueError, match=r"columns 'instruction', 'input' \(task.prompt\) are all missing in 1 of 3 rows"
    ):
        CausalLM(str(tmp_path)).load(model, 0)
    with pytest.raises(ValueError, match=r"column 'input' \(task.prompt\) has 1 missing values in 3 rows"):
        CausalLM(str(tmp_path), prompt="input", response="output").load(model, 0)


LONG = {"prompt": "tell " * 60, "response": "lost", "kind": "b"}


def test_rows_with_nothing_left_to_learn_are_dropped_and_counted(tmp_path, model):
    """An empty response, none at all, and one that is cut away."""
    rows = [{"prompt": f"Say {i}.\n", "response": f"It is {i}.", "kind": "ab"[i % 2]} for i in range(4)]
    odd = [{**rows[0], "response": " "}, {**rows[1], "response": None}, LONG]
    mixed = [odd[0], rows[0], odd[1], rows[1], rows[2], odd[2], rows[3]]
    lines(tmp_path, mixed)
    lines(tmp_path, [rows[1], odd[0]], "test")
    settings = {"max_length": 48, "label": "kind"}
    with pytest.raises(ValueError, match="task.response is empty in 2 of 7 rows; .*set task.drop_unlearnable = true"):
        CausalLM(str(tmp_path), **settings).load(model, 0)
    task = CausalLM(str(tmp_path), drop_unlearnable=True, **settings)
    found = task.load(model, 0, "kind")
    assert [learnt for _, learnt in decoded(task, model)] == [f"It is {i}.</s>" for i in range(4)]
    assert found.train.groups == ("a", "b", "a", "b") and found.train.strata.tolist() == [0, 1, 0, 1]
    assert found.notes == ("3 of 7 training rows were left out: nothing is left to learn in them.",
                           "1 of 2 test rows were left out: nothing is left to learn in them.")  # fmt: skip
    graded = CausalLM(str(tmp_path), drop_unlearnable=True, metric="exact_match", max_new_tokens=4, **settings)
    assert [row["gold"] for row in graded.load(model, 0).test.texts] == ["It is 1."]


def test_a_cut_away_response_names_the_setting(tmp_path, model):
    lines(tmp_path, [LONG] * 3)
    with pytest.raises(ValueError, match="nothing is left to learn in 2 of 2 training rows.*task.drop_unlearnable"):
        CausalLM(str(tmp_path / "train.jsonl"), max_length=48).load(model, 0)
    with pytest.raises(
        ValueError, match="nothing is left to learn in any of the 2 training rows; raise task.max_length"
    ):
        CausalLM(str(tmp_path / "train.jsonl"), max_length=48, drop_unlearnable=True).load(model, 0)


def test_nothing_is_dropped_where_all_can_be_learnt(tmp_path, model):
    lines(tmp_path, ALPACA * 3)
    a, b = (CausalLM(str(tmp_path / "train.jsonl"), drop_unlearnable=drop).load(model, 0) for drop in (False, True))
    assert all(torch.equal(x, b.train.features[name]) for name, x in a.train.features.items())
    assert a.notes == b.notes == ()


CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def test_conversations_that_nobody_answers(tmp_path, model):
    def talk(*texts):
        return {"messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]}

    lines(tmp_path, [talk("Hi."), talk("Hi.", "Hello."), talk("Ho.")])
    lines(tmp_path, [talk("Hi.", "Hello.")], "test")
    with pytest.raises(ValueError, match="row 0 of .* nothing to learn; drop it, or set task.drop_unlearnable = true"):
        CausalLM(str(tmp_path), chat_template=CHAT, drop_unlearnable=False).load(model, 0)
    found, same = (
        CausalLM(str(tmp_path), chat_template=CHAT, **drop).load(model, 0) for drop in ({}, {"drop_unlearnable": True})
    )
    assert len(found.train) == len(same.train) == 1
    assert found.notes == same.notes == ("2 of 3 training rows were left out: nothing is left to learn in them.",)
