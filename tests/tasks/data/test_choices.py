"""Multiple choice: which choice a row's answer is, and its likelihood against a loop over choices."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.data.choices import RIGHT, TEXTS, cover_choices, write_choices
from fedlora.tasks.metrics.scores import compute_metrics

COLOURS = ["red", "light blue", "green"]
ARC = {"text": COLOURS, "label": ["1", "2", "3"]}
FORMAT = "Is it? Answer format: true/false"


def read(rows, choices="choices", style="text"):
    split = Dataset.from_list(rows)
    return write_choices(split, choices, "answer", style, "test")


@pytest.mark.parametrize(
    "rows,choices,right,shown",
    [
        ([{"choices": COLOURS, "answer": 2}, {"choices": COLOURS, "answer": 0}], "choices", [2, 0], "A. red\nB. light blue\nC. green"),  # MMLU
        ([{"choices": COLOURS, "answer": "B"}], "choices", [1], "A. red\nB. light blue\nC. green"),
        ([{"choices": COLOURS, "answer": "1"}], "choices", [1], "A. red\nB. light blue\nC. green"),  # a cell of a CSV file
        ([{"choices": COLOURS, "answer": "green"}], "choices", [2], "A. red\nB. light blue\nC. green"),
        ([{"choices": ARC, "answer": "1"}, {"choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "B"}], "choices", [0, 1], "1. red\n2. light blue\n3. green"),
        ([{"choices": [2, 3, 4], "answer": 4}], "choices", [2], "A. 2\nB. 3\nC. 4"),
        ([{"choices": FORMAT, "answer": "false"}, {"choices": "Answer format: a/b/c", "answer": "a"}], "choices", [1, 0], FORMAT),  # Commonsense-170k
        ([{"answer": "maybe"}, {"answer": "yes"}], ["yes", "no", "maybe"], [2, 0], None),  # PubMedQA
        ([{"answer": True}, {"answer": False}], ["False", "True"], [1, 0], None),
    ],
)  # fmt: skip
def test_the_right_choice(rows, choices, right, shown):
    split = read(rows, choices)
    assert split[RIGHT] == right
    assert split["answer"] == [texts[i] for texts, i in zip(split[TEXTS], right)]
    assert shown is None or split["choices"][0] == shown


def test_answers_of_a_class_label_are_names():
    from datasets import ClassLabel

    split = Dataset.from_dict({"answer": [2, 0]}).cast_column("answer", ClassLabel(names=["bad", "so-so", "good"]))
    split = write_choices(split, ["good", "bad", "so-so"], "answer", "text", "test")  # FPB, in another order
    assert split["answer"] == ["good", "bad"] and split[RIGHT] == [0, 1]


@pytest.mark.parametrize(
    "rows,choices,sentence",
    [
        ([{"choices": COLOURS, "answer": "A"}, {"choices": COLOURS, "answer": "pink"}], "choices", "row 1 of the test rows holds 'pink', which is none of the choices 'red', 'light blue', 'green'; correct"),
        ([{"choices": COLOURS, "answer": 3}], "choices", "row 0 of the test rows holds 3, which is none of the choices"),
        ([{"choices": COLOURS, "answer": -1}], "choices", "holds -1, which is none"),
        ([{"choices": COLOURS, "answer": "A"}, {"choices": COLOURS, "answer": "A"}, {"choices": COLOURS, "answer": "green"}], "choices", "row 2 .* holds 'green', which is the text of a choice, while in other rows it is the label of a choice; write all"),
        ([{"choices": COLOURS, "answer": "A"}, {"choices": ["one"], "answer": "A"}], "choices", r"column 'choices' \(task.choices\) in row 1 of the test rows has 1 choice; at least 2"),
        ([{"answer": "yes"}], ["yes"], "task.choices has 1 choice; at least 2"),
        ([{"choices": ["a", " "], "answer": "a"}], "choices", "row 0 .* has an empty choice"),
        ([{"choices": ["1", "2", "0"], "answer": "1"}], "choices", "holds '1', which is the text of a choice and also a position"),
        ([{"choices": {"text": COLOURS, "label": ["A", "A", "B"]}, "answer": "B"}], "choices", "labels A, A, B for 3 choices"),
        ([{"choices": {"text": COLOURS, "label": ["A", "B"]}, "answer": "B"}], "choices", "labels A, B for 3 choices"),
        ([{"choices": "red or blue", "answer": "red"}], "choices", "is a text without 'Answer format: a/b/c'"),
        ([{"choices": [["red"], ["blue"]], "answer": 0}], "choices", "it must be a list of texts"),
        ([{"answer": True}], ["no", "yes"], "holds True, which is none of the choices 'no', 'yes'"),
        ([{"choices": COLOURS, "answer": None}], "choices", r"\(task.answer_column\) has 1 missing values"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(rows, choices, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(rows, choices)


THINGS = ["dog", "cat", "ball", "sun", "tree", "boat", "big red bird"]
ROWS = [
    {"question": f"What is the {thing} like?", "choices": COLOURS if i % 2 else ["big", "small and happy", "very sad", "hot"], "answer": i % 3}
    for i, thing in enumerate(THINGS)
]  # fmt: skip
SHOWN = {"prompt": "{question}\n{choices}\nAnswer:", "response": " {answer}", "choice_style": "label"}
SETTINGS = {
    "the text": {},
    "shots": {"shots": 2},
    "labels": SHOWN,
    "labels, shots": SHOWN | {"shots": 1},
    "words around": {"prompt": "Q: {question}", "response": " The answer is {answer}, Tom."},
}


def write(folder, rows=ROWS, test=None):
    for name, some in (("train", rows), ("test", test or rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(folder)


def task(folder, **settings):
    return CausalLM(write(folder), **{"metric": "choice_accuracy", "choices": "choices", **settings})


@pytest.fixture(scope="module")
def model(shared):
    return str(shared / "models" / "stories260k-llama")


def oracle(network, tokenizer, prompt, choice, written):
    """A choice's log-likelihood by itself, without padding, and per character."""
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + choice)["input_ids"]
    assert ids[:start] == tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        steps = network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    value = float(sum(steps[i - 1, ids[i]] for i in range(start, len(ids))))
    return value, value / len(written)


def before(data, tokenizer, row):
    """A row's prompt, its solved examples included, from the tokens of its first choice."""
    features, k = data.test.features, int(data.test.features["choice_rows"][row])
    ids = features["choice_ids"][features["choice_offsets"][k] : features["choice_offsets"][k + 1]]
    return tokenizer.decode(ids[: len(ids) - int(features["choice_tokens"][k])], skip_special_tokens=True)


@pytest.mark.shared
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_each_choice_by_itself(settings, tmp_path, model):
    made, tokenizer = task(tmp_path, **settings), AutoTokenizer.from_pretrained(model)
    data, network = made.load(model, 0), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows, expected = torch.tensor([3, 0, 6, 2, 1]), []
    response = settings.get("response", " {answer}")
    for i in rows.tolist():
        texts = "ABCD"[: len(ROWS[i]["choices"])] if "choice_style" in settings else ROWS[i]["choices"]
        prompt = before(data, tokenizer, i)
        assert prompt.count("What is the") == 1 + settings.get("shots", 0) and ROWS[i]["question"] in prompt
        several = [oracle(network, tokenizer, prompt, response.format(answer=text), text) for text in texts]
        best = [max(range(len(texts)), key=lambda k: several[k][kind]) for kind in (0, 1)]
        expected.append([float(k == ROWS[i]["answer"]) for k in best])
    with torch.no_grad():
        found = made.evaluate(network, data.test, rows, torch.device("cpu"))
    assert found[:, 3:].tolist() == expected
    scores = compute_metrics(made.scores(found, data.test.labels[rows]))
    assert scores["choice_accuracy"] == sum(a for a, _ in expected) / 5
    assert scores["choice_accuracy_norm"] == sum(b for _, b in expected) / 5
    assert torch.equal(found[:, :3], made.outputs(network, made.collate(data.test, rows))), "and the other figures"


@pytest.mark.shared
@pytest.mark.parametrize("selects", [True, False], ids=["logits of the choices", "all logits"])
def test_likelihoods_are_those_of_a_loop(selects, tmp_path, model, monkeypatch):
    from fedlora.tasks import causal_lm

    made, tokenizer = task(tmp_path), AutoTokenizer.from_pretrained(model)
    data, network = made.load(model, 0), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if not selects:
        forward = network.forward
        network.forward = lambda input_ids, attention_mask, use_cache: forward(
            input_ids, attention_mask, use_cache=use_cache
        )
    kept = []
    grade = causal_lm.grade_choices
    monkeypatch.setattr(causal_lm, "grade_choices", lambda values, *more: kept.append(values) or grade(values, *more))
    rows = torch.tensor([5, 0, 3])
    with torch.no_grad():
        causal_lm._grade_rows(network, data.test, rows, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = [
        oracle(plain, tokenizer, before(data, tokenizer, i), f" {text}", text)[0]
        for i in rows.tolist()
        for text in ROWS[i]["choices"]
    ]
    torch.testing.assert_close(kept[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.shared
def test_choices_of_one_token_share_their_prompt(tmp_path, model):
    data = task(tmp_path, **SHOWN).load(model, 0)
    sequences = cover_choices(data.test.features, torch.arange(len(ROWS)))
    assert len(sequences.ids) == len(ROWS), "one sequence a row, for three or four letters"
    assert sequences.number[:7] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.shared
def test_the_training_rows_learn_the_right_choice(tmp_path, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    for settings, ends in (({}, "A: small and happy"), (SHOWN, "Answer: B")):
        data = CausalLM(write(tmp_path, [ROWS[0] | {"answer": 1}] * 2), choices="choices", **{"prompt": "Q: {question}\nA:", "response": " {answer}", **settings}).load(model, 0)  # fmt: skip
        ids = data.train.features["input_ids"][: data.train.lengths[0]]
        assert tokenizer.decode(ids, skip_special_tokens=True).endswith(ends)


@pytest.mark.shared
def test_prompts_that_do_not_fit_lose_their_beginning(tmp_path, model):
    rows = [ROWS[0] | {"question": "Why? " * 400}, ROWS[1]]
    made = CausalLM(write(tmp_path, ROWS, rows), metric="choice_accuracy", choices="choices", truncation_side="left")
    data = made.load(model, 0)
    assert data.notes[-1] == "1 of 2 prompts and choices were longer than 512 tokens and lost their beginning."
    offsets = data.test.features["choice_offsets"]
    assert int(offsets.diff().max()) == 512 and data.test.features["choice_ids"][offsets[:4]].tolist() == [1] * 4


@pytest.mark.shared
@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({"response": " fine, {question}"}, "does not name the column of the answers, 'answer'; write {answer}"),
        ({"choice_style": "label"}, "task.prompt does not show the choices with their labels"),
        (
            {"response": " {question} {answer}", "answer_column": None},
            "columns question, answer; set task.answer_column",
        ),
        ({"choices": "lost"}, "no column 'lost'"),
    ],
)
def test_settings_that_do_not_fit_the_rows(settings, sentence, tmp_path, model):
    with pytest.raises(ValueError, match=sentence):
        task(tmp_path, **{"prompt": "{question}", "response": " {answer}", "answer_column": "answer", **settings}).load(
            model, 0
        )


@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({"metric": "choice_accuracy"}, "task.metric is 'choice_accuracy', which needs task.choices"),
        ({"choices": "c", "messages": "m"}, "leave it out with messages or text"),
    ],
)
def test_settings_that_contradict(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        CausalLM("x", **settings)
