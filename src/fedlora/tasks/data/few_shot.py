"""Prompts for answers that are generated and graded: with solved examples before them, within the model's context."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.seeds import derive_seed
from fedlora.tasks.data import rows as source
from fedlora.tasks.data.templates import Segment
from fedlora.tasks.data.tokens import tokens
from fedlora.tasks.metrics.answers import Kind, number

BETWEEN = "\n\n"  # between a solved example and the next


@dataclass(frozen=True)
class Asked:
    """What is asked in every test row, as tokens, and the answer that is right."""

    prompts: list[list[int]]
    texts: tuple[Mapping[str, str], ...]  # "prompt" and "gold"
    note: str = ""

    def features(self) -> dict[str, Tensor]:
        """Flat, as features of ``Examples``."""
        lengths = torch.tensor([len(ids) for ids in self.prompts])
        return {
            "prompts": torch.tensor([i for ids in self.prompts for i in ids], dtype=torch.int32),
            "prompt_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        }


def asked(
    rows: Sequence[Sequence[Segment]],
    golds: Sequence[str],
    before: Sequence[str],
    tokenizer: Any,
    room: int,
    chat: bool,
) -> Asked:
    """The last learnt stretch of each row is what is asked for; ``before`` are each row's solved examples.

    Prompts of more than ``room`` tokens lose their beginning; how many did is said.
    """
    texts = [shots + "".join(text for text, _ in row[:-1]) for shots, row in zip(before, rows)]
    found = tokens(texts, tokenizer, not chat)
    longer = sum(len(ids) > room for ids in found)
    note = f"{longer} of {len(found)} prompts were longer than {room} tokens and lost their beginning" if longer else ""
    both = tuple({"prompt": text, "gold": gold} for text, gold in zip(texts, golds))
    return Asked([_within(ids, room, tokenizer.bos_token_id) for ids in found], both, note)


def _within(ids: list[int], room: int, start: int | None) -> list[int]:
    if len(ids) <= room:
        return ids
    return [start, *ids[len(ids) - room + 1 :]] if ids[0] == start and start is not None else ids[len(ids) - room :]


def prompts_of(features: Mapping[str, Tensor], rows: Tensor) -> list[list[int]]:
    """The prompts of some rows, from the flat storage."""
    offsets = features["prompt_offsets"]
    return [features["prompts"][offsets[i] : offsets[i + 1]].tolist() for i in rows.tolist()]


def shots(
    train: Sequence[Sequence[Segment]], kinds: Sequence[int], wanted: Sequence[int], count: int, seed: int
) -> list[str]:
    """For each test row, ``count`` solved examples: training rows of its kind, drawn from the seed, one draw a kind.

    ``ValueError`` where a kind has fewer training rows.
    """
    by_kind = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in set(wanted)}
    made = {}
    for kind, rows in by_kind.items():
        if len(rows) < count:
            among, instead = " of the same task.label as some test rows", ", or leave task.label out"
            among, instead = (among, instead) if len(rows) < len(kinds) else ("", "")
            raise ValueError(
                f"task.shots is {count}, but there are only {len(rows)} training rows{among}; "
                f"lower task.shots{instead}."
            )
        draws = torch.Generator().manual_seed(derive_seed(seed, "shots", kind))
        some = [rows[i] for i in torch.randperm(len(rows), generator=draws)[:count].tolist()]
        made[kind] = "".join("".join(text for text, _ in train[i]) + BETWEEN for i in some)
    return [made[kind] for kind in wanted]


def golds(split: Any, rows: Sequence[Sequence[Segment]], name: str | None, kind: Kind) -> list[str]:
    """The right answers: a column's, or the responses themselves. ``ValueError`` names a row without a number."""
    if name is None:
        found = [row[-1][0] for row in rows]
    else:
        found = [
            f"{v:.12g}" if isinstance(v, float) else str(v) for v in source.column(split, name, "task.answer_column")
        ]
    lacking = [i for i, text in enumerate(found) if kind == "number" and number(text) is None]
    if lacking:
        where = "the response" if name is None else f"column {name!r} (task.answer_column)"
        raise ValueError(
            f"{where} has no number in {len(lacking)} of {len(found)} test rows, first in row {lacking[0]}: "
            f"{found[lacking[0]].strip()[:60]!r}; correct the rows, or set task.answer to 'text'."
        )
    return found
