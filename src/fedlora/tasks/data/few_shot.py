"""Prompts for answers that are generated and graded, with solved examples before them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora.seeds import derive_seed
from fedlora.tasks.data.rows import read_column
from fedlora.tasks.data.templates import Segment
from fedlora.tasks.data.tokens import flatten_rows, tokenize
from fedlora.tasks.metrics.answers import Kind, extract_number
from fedlora.tasks.metrics.math_answers import MathGrader

BETWEEN = "\n\n"  # between a solved example and the next


def encode_prompts(
    rows: Sequence[Sequence[Segment]], golds: Sequence[str], before: Sequence[str], tokenizer: Any, room: int,
    chat: bool,
) -> tuple[dict[str, Tensor], tuple[Mapping[str, str], ...], str]:  # fmt: skip
    """Return each row's prompt (its solved examples ``before``, and all but its last segment) as features and as text.

    Prompts of more than ``room`` tokens lose their beginning; the third value is a note with their number.
    """
    texts = [shots + "".join(text for text, _ in row[:-1]) for shots, row in zip(before, rows)]
    prompts = tokenize(texts, tokenizer, not chat)
    longer = sum(len(ids) > room for ids in prompts)
    note = f"{longer} of {len(prompts)} prompts were longer than {room} tokens and lost their beginning."
    ids, offsets = flatten_rows([_shorten(ids, room, tokenizer.bos_token_id) for ids in prompts])
    both = tuple({"prompt": text, "gold": gold} for text, gold in zip(texts, golds))
    return {"prompts": ids, "prompt_offsets": offsets}, both, note if longer else ""


def _shorten(ids: list[int], room: int, start: int | None) -> list[int]:
    if len(ids) <= room:
        return ids
    return [start, *ids[len(ids) - room + 1 :]] if ids[0] == start and start is not None else ids[len(ids) - room :]


def select_prompts(features: Mapping[str, Tensor], rows: Tensor) -> list[list[int]]:
    """Return the prompts of some rows from the features of ``encode_prompts``."""
    offsets = features["prompt_offsets"]
    return [features["prompts"][offsets[i] : offsets[i + 1]].tolist() for i in rows.tolist()]


def draw_shots(train: Sequence[list[Segment]], kinds: list[int], wanted: list[int], count: int, seed: int) -> list[str]:
    """Return for each test row ``count`` training rows of its kind, one random draw for each kind."""
    shots = {}
    for kind in set(wanted):
        rows = [i for i, other in enumerate(kinds) if other == kind]
        if len(rows) < count:
            partial = len(rows) < len(kinds)
            among, instead = " of the same task.label as some test rows", ", or leave task.label out"
            raise ValueError(
                f"task.shots is {count}, but there are only {len(rows)} training rows{among * partial}; "
                f"lower task.shots{instead * partial}."
            )
        draws = torch.Generator().manual_seed(derive_seed(seed, "shots", kind))
        chosen = [rows[i] for i in torch.randperm(len(rows), generator=draws)[:count].tolist()]
        shots[kind] = "".join("".join(text for text, _ in train[i]) + BETWEEN for i in chosen)
    return [shots[kind] for kind in wanted]


def read_golds(split: Any, responses: Sequence[str], name: str | None, kind: Kind) -> list[str]:
    """Return the right answers: a column's, or the responses. Raises ``ValueError`` if one has no answer."""
    if name is None:
        golds = list(responses)
        if not all(text.strip() for text in golds):  # the last answer of a chat may be a tool call
            raise ValueError(
                f"test row {[bool(text.strip()) for text in golds].index(False)} ends with an answer without text, "
                "which cannot be compared; drop the row, set task.answer_column, or another task.metric."
            )
    else:
        values = read_column(split, name, "task.answer_column")
        golds = [f"{value:.12g}" if isinstance(value, float) else str(value) for value in values]
    lacking = []
    if kind == "number":
        lacking = [i for i, text in enumerate(golds) if extract_number(text) is None]
    elif kind == "math":
        with MathGrader() as grader:
            lacking = [i for i, text in enumerate(golds) if not grader.is_answer(text)]
    if lacking:
        where = "the response" if name is None else f"column {name!r} (task.answer_column)"
        lacks = "number" if kind == "number" else "mathematical answer"
        raise ValueError(
            f"{where} has no {lacks} in {len(lacking)} of {len(golds)} test rows, first in row {lacking[0]}: "
            f"{golds[lacking[0]].strip()[:60]!r}; correct the rows, or set task.answer to 'text'."
        )
    return golds
