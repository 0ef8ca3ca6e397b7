"""Programs out of answers, pass@k, and both benchmarks' gold solutions: all of them pass, and wrong ones never."""

import itertools
import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from math import comb
from statistics import fmean

import pytest

from fedlora.code_eval import problems
from fedlora.code_eval.grade import grade_file, read_answers, read_benchmark
from fedlora.code_eval.problems import Problem, compute_pass_rates, parse_mbpp, parse_problems, pass_at_k, run_answers
from fedlora.code_eval.sandbox import SandboxError
from tests.fixtures.sandbox import living, on_landlock, sleeping, until

PROMPT = 'from math import floor\n\n\ndef half(x: int) -> int:\n    """ Half of x.\n    >>> half(4)\n    2\n    """\n'
HALF = Problem("T/0", PROMPT, "assert half(4) == 2 and half(5) == 2\n", PROMPT, "half")
TASK = parse_mbpp({"task_id": 7, "text": "Halve.", "test_list": ["assert half(5) == 2"], "test_setup_code": ""})
WHOLE = "def half(x):\n    return x // 2\n"


def value(problem: Problem, answer: str):
    """What the program out of an answer makes of 5."""
    space: dict = {"__name__": "program"}
    exec(problem.program(answer), space)
    return space["half"](5)


CONTINUED = [
    "    return floor(x / 2)\n",
    "    return floor(x / 2)",
    "\n    return floor(x / 2)\n\n\ndef other(",  # cut within a line
    "    return floor(x / 2)\n\nprint(half(input()))\n",
    "    return floor(x / 2)\n\nassert half(1) == 7\n",
    "    return floor(x / 2)\n\nif __name__ == '__main__':\n    half(1 / 0)\n",
    "    return other(x)\n\ndef other(x):\n    return floor(x / 2)\n",
    " return floor(x / 2)".lstrip(),  # a tokenizer took the first blanks away
    "y = x / 2\nreturn floor(y)",
    "    y = x / 2\n    return floor(y)\n# words that are no code: (",
]
COMPLETE = [
    WHOLE,
    PROMPT + "    return floor(x / 2)\n",
    f"Here you are:\n```python\n{WHOLE}```\nIt halves.",
    f"```\n{WHOLE}",  # never closed
    f"```python\nhalf(3)\n```\nbetter:\n```python\n{WHOLE}# and words\n```",
    WHOLE + "\n\nprint(half(input()))\nassert half(2) == 9\n",
    WHOLE + "\nThat is all, I think (",
    WHOLE.replace("\n", "\r\n"),
    "def quarter(x):\n    return half(half(x))\n\n" + WHOLE,
]


@pytest.mark.parametrize("answer", CONTINUED + COMPLETE)
def test_the_program_is_found_in_an_answer_to_humaneval(answer):
    assert value(HALF, answer) == 2


@pytest.mark.parametrize("answer", [*COMPLETE, f"Sure.\n{WHOLE}", f" {WHOLE}[DONE]\nx", f"[BEGIN]\n{WHOLE}[DONE]"])
def test_the_program_is_found_in_an_answer_to_mbpp(answer):
    if "floor" not in answer and not answer.startswith(" "):
        assert value(TASK, answer) == 2


def test_the_whole_function_sees_the_prompts_imports_and_an_empty_answer_is_wrong():
    assert value(HALF, "```python\ndef half(x):\n    return floor(x / 2)\n```") == 2
    assert value(HALF, "") is None
    assert HALF.program("    return floor(x / 2)\n") == PROMPT + "    return floor(x / 2)\n", "nothing is touched"


@pytest.mark.parametrize(
    "answer", ["(" * 5000, "-" * 50000 + "1", "\x00", "a." * 50000, "`" * 999, "```" * 5, "\n" * 9999, "no (\n" * 9999]
)
def test_answers_that_are_no_programs_hurt_nobody(answer):
    assert isinstance(HALF.program(answer), str) and isinstance(TASK.program(answer), str)


@pytest.mark.parametrize("n, c, k", [(5, 0, 1), (5, 2, 1), (5, 2, 3), (6, 4, 3), (4, 4, 4), (7, 1, 7)])
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_right_one(n, c, k):
    samples = [i < c for i in range(n)]
    assert pass_at_k(n, c, k) == pytest.approx(fmean(any(choice) for choice in itertools.combinations(samples, k)))
    assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k))


def test_pass_at_k_of_many_samples_is_no_overflow_and_of_too_few_an_error():
    exact = 1 - Fraction(comb(100_000 - 10, 100), comb(100_000, 100))
    assert pass_at_k(100_000, 10, 100) == pytest.approx(float(exact), rel=1e-9)
    with pytest.raises(ValueError, match="needs at least 5 samples"):
        pass_at_k(4, 1, 5)


def test_a_problem_without_answers_counts_as_wrong():
    both = [HALF, TASK]
    verdicts = [v for n in (0, 1) for v in [_verdict("T/0", n, n == 0)]]
    assert compute_pass_rates(both, verdicts, [1, 2]) == {"pass@1": 0.25, "pass@2": 0.5}
    with pytest.raises(ValueError, match="needs 3 answers"):
        compute_pass_rates(both, verdicts, [1, 3])


def _verdict(task, sample, passed):
    from fedlora.code_eval.problems import Graded

    return Graded(task, sample, passed, "", 0.0)


@pytest.fixture
def folder(tmp_path):
    """A benchmark of two problems, and answers to them."""
    lines = [
        {"task_id": f"T/{i}", "prompt": PROMPT, "entry_point": "half", "test": f"def check(f):\n    assert f({2 * i}) == {i}"}
        for i in range(3)
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [
        ("T/0", "    return x // 2"),
        ("T/0", "    return 7"),
        ("T/1", "    return 1"),
        ("T/1", "    import os; os._exit(0)"),
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"task_id": t, "completion": c}) + "\n" for t, c in given))
    return tmp_path


@on_landlock
@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_is_graded_and_verdicts_are_written(folder, workers):
    found = grade_file(folder / "p.jsonl", str(folder / "data"), ks=(1, 2), workers=workers)
    assert found["figures"] == {"pass@1": pytest.approx(1 / 3), "pass@2": pytest.approx(2 / 3)}
    assert (found["problems"], found["missing"], found["answers"], found["passed"]) == (3, 1, 4, 2)
    lines = [json.loads(line) for line in (folder / "p.verdicts.jsonl").read_text().splitlines()]
    assert [(v["task_id"], v["sample"], v["passed"]) for v in lines] == [
        ("T/0", 0, True), ("T/0", 1, False), ("T/1", 0, True), ("T/1", 1, False),
    ]  # fmt: skip
    assert lines[1]["why"] == "AssertionError in assert f(0) == 0"


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "holds no answers"),
        ("no json\n", "line 1 of .* is no JSON"),
        ('{"task_id": "T/0"}\n', 'line 1 of .* lacks "task_id" or "completion"'),
        ('\n[1]\n', "line 2 of .* lacks"),
        ('{"task_id": "T/9", "completion": ""}\n', "answers task 'T/9', which is not in the data; did you mean 'T/"),
        ('{"task_id": "T/0", "completion": 3}\n', "no text"),
        ("[" * 100000, "is no JSON"),
        (b"\xff\xfe\x00", "no text that can be read"),
    ],
)  # fmt: skip
def test_bad_files_are_one_sentence(folder, content, said):
    path = folder / "bad.jsonl"
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    with pytest.raises(ValueError, match=said):
        read_answers(path, parse_problems(read_benchmark(str(folder / "data"))))


def test_data_of_another_kind_and_odd_ks_are_refused(folder):
    with pytest.raises(ValueError, match="needs task_id, test_list"):
        parse_problems(read_benchmark(str(folder / "data")), "mbpp")
    with pytest.raises(ValueError, match="has no split 'dev'; set --split to one of: test"):
        read_benchmark(str(folder / "data"), "dev")
    with pytest.raises(ValueError, match="'humaneval' or 'mbpp'"):
        parse_problems(read_benchmark(str(folder / "data")), "apps")
    with pytest.raises(ValueError, match="at least 1"):
        grade_file(folder / "p.jsonl", str(folder / "data"), ks=(0,))
    with pytest.raises(ValueError, match="lower k"):
        grade_file(folder / "p.jsonl", str(folder / "data"), ks=(3,))
    with pytest.raises(ValueError, match="there is no file"):
        grade_file(folder / "none.jsonl", str(folder / "data"))


@pytest.mark.parametrize("out, said", [("data", "is a folder; name a file"), ("p.jsonl/v", "is no folder to write in")])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_run(folder, out, said):
    ran = []
    with pytest.raises(ValueError, match=said):
        grade_file(folder / "p.jsonl", str(folder / "data"), out=folder / out, done=ran.append)
    assert not ran


def test_the_command(folder, commands):
    def call(*more):
        return commands.call(["fedlora", "grade", "p.jsonl", "--data", "data", *more], folder)

    wrong = call("--k", "x")
    assert (
        wrong.returncode == 2
        and wrong.stderr == "fedlora: --k is 'x'; it should be whole numbers with commas, e.g. 1,10.\n"
    )
    found = call("--json", "--k", "1,2", "--out", "v.jsonl")
    if "cannot confine" in found.stderr:
        pytest.skip(found.stderr)
    assert json.loads(found.stdout)["figures"]["pass@2"] == pytest.approx(2 / 3)
    assert (folder / "v.jsonl").read_text().count("\n") == 4


@on_landlock
def test_ctrl_c_waits_for_no_program_that_sleeps(folder):
    (folder / "p.jsonl").write_text(
        json.dumps({"task_id": "T/0", "completion": "    import time; time.sleep(600)"}) + "\n"
    )
    grader = subprocess.Popen(
        [sys.executable, "-m", "fedlora", "grade", "p.jsonl", "--data", "data", "--seconds", "100"],
        cwd=folder, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)},
        # Where the tests themselves run in the background, Ctrl-C is ignored, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    until(lambda: sleeping(folder / "fedlora-program-"), 60)
    grader.send_signal(signal.SIGINT)
    _, said = grader.communicate(timeout=30)
    assert grader.returncode == 130 and "Traceback" not in said
    assert not list(folder.glob("fedlora-*")) and living(folder / "fedlora-program-") == []


def test_without_a_sandbox_nothing_is_run(folder, monkeypatch):
    def refuses():
        raise SandboxError("no.")

    monkeypatch.setattr(problems, "check_confinement", refuses)
    with pytest.raises(SandboxError):
        grade_file(folder / "p.jsonl", str(folder / "data"))
    assert not (folder / "p.verdicts.jsonl").exists()


BENCHMARKS = {
    "humaneval": ("canonical_solution", ["    return None\n", "    pass\n"]),
    "mbpp": ("code", ["", "def f(): pass"]),
}
# One of so many problems, from the first to the last; both benchmarks are graded whole in the second tier.
EVERY = [pytest.param(32, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@on_landlock
@pytest.mark.shared
@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("every", EVERY)
def test_gold_solutions_pass_and_wrong_ones_do_not(shared, name, every):
    gold, wrong = BENCHMARKS[name]
    everything = read_benchmark(str(shared / "data" / name))
    assert len(everything) == {"humaneval": 164, "mbpp": 500}[name]
    found = everything[::every]
    asked = parse_problems(found, name)
    verdicts = run_answers(asked, {p.task_id: [row[gold], *wrong] for p, row in zip(asked, found)}, workers=2)
    assert [(v.task_id, v.sample) for v in verdicts] == [(p.task_id, sample) for p in asked for sample in range(3)]
    assert [v for v in verdicts if v.passed != (v.sample == 0)] == []
