"""Mathematical answers: what is equal, what is not, and texts that would take for ever."""

import threading
import time

import pytest

from fedlora.tasks.metrics import math_answers
from fedlora.tasks.metrics.answers import grade_answers
from fedlora.tasks.metrics.math_answers import MathGrader

pytest.importorskip("math_verify")

EQUAL = [
    (r"So it is \boxed{\frac12}.", r"\frac{1}{2}"),
    ("so $0.5$", r"\frac{1}{2}"),
    (r"The answer is \boxed{(1, 2)}", "(1,2)"),
    ("$x = 3$", "3"),
    (r"\boxed{\sqrt{8}}", r"2\sqrt2"),
    (r"\boxed{\{1, 2\}}", r"\{2,1\}"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    (r"\boxed{\text{(C)}}", r"\text{(C)}"),
    (r"\boxed{[0,1)}", "[0,1)"),
    (r"\boxed{10\%}", r"10\%"),
    (r"\boxed{1{,}000}", "1000"),
    (r"First 7, but then \boxed{3}", r"The sum is 3, so \boxed{3}."),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"The final answer is $\frac{\pi}{4}$. I hope it is correct.", r"\pi/4"),
]
UNEQUAL = [
    (r"\boxed{\frac13}", r"\frac{1}{2}"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{(0,1)}", "[0,1)"),
    (r"\boxed{\{1,2\}}", r"\{1,2,3\}"),
    (r"\boxed{x^2+1}", "(x+1)^2"),
    (r"\boxed{\text{Evelyn}}", r"\text{Carla}"),
    (r"\boxed{\text{(B)}}", r"\text{(C)}"),
    (r"\boxed{-3}", "3"),
    (r"\boxed{2\sqrt3}", r"2\sqrt2"),
    (r"\boxed{1000.5}", "1000"),
    ("none", "3"),
    ("", "3"),
]  # fmt: skip


def test_equivalences():
    texts, golds = zip(*EQUAL, *UNEQUAL)
    graded = grade_answers(texts, golds, "math")
    assert [pair for pair, is_right in zip(EQUAL, graded) if not is_right] == []
    assert [pair for pair, is_right in zip(UNEQUAL, graded[len(EQUAL) :]) if is_right] == []


def test_a_text_that_would_take_for_ever_is_wrong_and_the_next_is_graded_in_any_thread():
    results = []

    def grade():
        with MathGrader(seconds=1.5) as grader:
            began = time.monotonic()
            results.append(grader.is_equal(r"\boxed{9^{9^{9^{9}}}}", "5"))
            results.append(time.monotonic() - began < 60)
            results.append(grader.is_equal(r"\boxed{7}", "7"))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert results == [False, True, True]


def test_golds_without_an_answer():
    with MathGrader() as grader:
        assert [grader.is_answer(text) for text in ("", "  ", r"\frac12", "5", r"so \boxed{x}")] == [
            False,
            False,
            True,
            True,
            True,
        ]


def test_advice_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(math_answers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs math-verify, which is not installed: pip install 'fedlora\[llm\]'"):
        MathGrader()


@pytest.mark.shared
def test_a_row_without_an_answer_is_named(tmp_path, shared):
    import json

    from fedlora.tasks.causal_lm import CausalLM

    rows = [
        {"question": "What is half of one?", "answer": r"It is \boxed{\frac12}.", "final": x} for x in (r"\frac12", " ")
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(shared / "models" / "stories260k-llama")
    task = CausalLM(str(tmp_path), metric="exact_match", answer="math")
    assert [text["gold"] for text in task.load(model, 0).test.texts] == [" " + rows[0]["answer"]] * 2
    with pytest.raises(
        ValueError,
        match=r"column 'final' \(task.answer_column\) has no mathematical answer in 1 of 2 test rows, first in row 1",
    ):
        CausalLM(str(tmp_path), metric="exact_match", answer="math", answer_column="final").load(model, 0)
