"""Programs that a run's model writes for a benchmark's problems, a JSON line each, for ``grading`` to run."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlora.code_eval.problems import STOPS, Problem
from fedlora.files import check_output_file
from fedlora.runs.chat import Chat
from fedlora.seeds import derive_seed
from fedlora.tasks.data.tokens import tokens
from fedlora.tasks.networks.generation import Writing, generate

Done = Callable[[int], None]  # told how many more are written


def solve(
    talk: Chat,
    known: Sequence[Problem],
    out: str | Path,
    writing: Writing,
    samples: int = 1,
    batch_size: int = 16,
    worded: bool = False,
    done: Done = lambda more: None,
) -> dict[str, Any]:
    """Writes ``samples`` answers to every problem to ``out``, a line each as it comes; what is there already stays.

    ``worded`` asks in the words that the run was trained with; else the model goes on from the problem as it stands.
    A problem whose prompt leaves no room for an answer gets none, and ``too_long`` counts it. ``ValueError`` where
    several samples are wanted of a model that would write the same one each time.
    """
    if samples > 1 and writing.temperature == 0:
        raise ValueError(f"--samples is {samples}, but at --temperature 0 all are alike; raise it, e.g. to 0.8.")
    place = check_output_file(out)
    there = _there(place)
    asked = {problem.task_id: _encode_prompt(talk, problem, worded) for problem in known}
    fits = [p for p in known if len(asked[p.task_id]) + writing.max_new_tokens <= talk.room]
    if not fits:
        raise ValueError(
            f"no problem fits: the shortest prompt has {min(map(len, asked.values()))} tokens and an answer may have "
            f"{writing.max_new_tokens}, but the model reads at most {talk.room}; lower --max-new-tokens."
        )
    jobs = [(p, sample) for p in fits for sample in range(there.get(p.task_id, 0), samples)]
    done(samples * len(fits) - len(jobs))
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place, "a", encoding="utf-8") as file:
        for some in _batches(sorted(jobs, key=lambda job: (job[1], len(asked[job[0].task_id]))), batch_size):
            for (problem, _), text in zip(some, _generate_answers(talk, some, asked, writing, worded), strict=True):
                file.write(json.dumps({"task_id": problem.task_id, "completion": text}) + "\n")
            file.flush()
            done(len(some))
    return {"problems": len(known), "answers": samples * len(fits), "too_long": len(known) - len(fits)}


def _there(place: Path) -> dict[str, int]:
    """How many answers each task has in the file so far; a last line that was cut off is taken away."""
    if not place.exists():
        return {}
    lines = place.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    try:
        tasks = [str(json.loads(line)["task_id"]) for line in whole if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(place)!r} is there and holds no answers; choose another --out.") from error
    if len(whole) < len(lines):
        place.write_text("".join(whole), encoding="utf-8")
    return {task: tasks.count(task) for task in dict.fromkeys(tasks)}


def _encode_prompt(talk: Chat, problem: Problem, worded: bool) -> list[int]:
    if not worded:
        return tokens([problem.prompt], talk.tokenizer, True)[0]
    text = talk.prompt([{"role": "user", "content": problem.prompt}])
    return tokens([text], talk.tokenizer, talk.template is not None)[0]


def _generate_answers(talk: Chat, some, asked, writing: Writing, worded: bool) -> list[str]:
    """The answers of one batch, each from a seed that its task and sample settle."""
    stops = () if worded else STOPS["humaneval" if some[0][0].context else "mbpp"]
    how = Writing(writing.max_new_tokens, writing.temperature, writing.top_p, writing.stop or stops)
    first, sample = some[0]
    with talk.model.running():
        return generate(
            talk.model.network, talk.tokenizer, [asked[p.task_id] for p, _ in some], how,
            derive_seed(talk.seed, "solve", first.task_id, sample),
        )  # fmt: skip


def _batches(jobs: Sequence, size: int) -> Iterator[Sequence]:
    yield from (jobs[i : i + size] for i in range(0, len(jobs), size))
