"""Programs that a run's model writes for the problems of a benchmark, as a file for ``grade_file``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedlora.code_eval.problems import STOPS, Problem
from fedlora.files import check_output_file
from fedlora.runs.chat import Chat
from fedlora.seeds import derive_seed
from fedlora.tasks.data.tokens import tokenize
from fedlora.tasks.networks.generation import GenerationSettings, generate


def write_answers(
    talk: Chat,
    problems: Sequence[Problem],
    out: str | Path,
    writing: GenerationSettings,
    samples: int = 1,
    batch_size: int = 16,
    worded: bool = False,
    done: Callable[[int], None] = lambda more: None,
) -> dict[str, Any]:
    """Write ``samples`` answers to every problem to ``out``, a line each, and continue a file that exists.

    ``worded`` asks with the run's prompt template; otherwise the model continues the problem's text. A problem whose
    prompt leaves no room for an answer gets none and counts in ``too_long``. ``done`` is called with the number of
    further answers written. Raises ``ValueError`` for several samples at temperature 0, which would be equal.
    """
    if samples > 1 and writing.temperature == 0:
        raise ValueError(f"--samples is {samples}, but at --temperature 0 all are alike; raise it, e.g. to 0.8.")
    path = check_output_file(out)
    counts = _count_answers(path)
    prompts = {}
    for problem in problems:
        text = talk.prompt([{"role": "user", "content": problem.prompt}]) if worded else problem.prompt
        prompts[problem.task_id] = tokenize([text], talk.tokenizer, not worded or talk.template is not None)[0]
    fits = [p for p in problems if len(prompts[p.task_id]) + writing.max_new_tokens <= talk.max_tokens]
    if not fits:
        raise ValueError(
            f"no problem fits: the shortest prompt has {min(map(len, prompts.values()))} tokens and an answer may have "
            f"{writing.max_new_tokens}, but the model reads at most {talk.max_tokens}; lower --max-new-tokens."
        )
    jobs = [(p, sample) for p in fits for sample in range(counts.get(p.task_id, 0), samples)]
    jobs.sort(key=lambda job: (job[1], len(prompts[job[0].task_id])))
    done(samples * len(fits) - len(jobs))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for i in range(0, len(jobs), batch_size):
            batch = jobs[i : i + batch_size]
            texts = _generate_answers(talk, batch, prompts, writing, worded)
            for (problem, _), text in zip(batch, texts, strict=True):
                file.write(json.dumps({"task_id": problem.task_id, "completion": text}) + "\n")
            file.flush()
            done(len(batch))
    return {"problems": len(problems), "answers": samples * len(fits), "too_long": len(problems) - len(fits)}


def _count_answers(path: Path) -> dict[str, int]:
    """Count each task's answers in the file, and remove a last line that was cut off."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    try:
        tasks = [str(json.loads(line)["task_id"]) for line in whole if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} exists and holds no answers; choose another --out.") from error
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    return {task: tasks.count(task) for task in dict.fromkeys(tasks)}


def _generate_answers(talk: Chat, batch, prompts, writing: GenerationSettings, worded: bool) -> list[str]:
    """Generate the answers of one batch, with a seed derived from its first task and sample."""
    first, sample = batch[0]
    stops = () if worded else STOPS["humaneval" if first.context else "mbpp"]
    options = GenerationSettings(writing.max_new_tokens, writing.temperature, writing.top_p, writing.stop or stops)
    seed = derive_seed(talk.seed, "solve", first.task_id, sample)
    with talk.model.running():
        return generate(talk.model.network, talk.tokenizer, [prompts[p.task_id] for p, _ in batch], options, seed)
