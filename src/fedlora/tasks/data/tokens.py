"""Token sequences for language models: encoded once, kept flat, padded or packed when a batch is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.tasks._base import Batch, Examples
from fedlora.tasks.data.templates import Segment

IGNORED = -100  # cross_entropy's ignore_index
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Tokens:
    """One row's tokens, and which of them are learnt."""

    ids: list[int]
    learnt: list[bool]


def encoded(rows: Sequence[Sequence[Segment]], tokenizer: Any, special: bool) -> list[Tokens]:
    """Tokens of each row; the end token is learnt after a last stretch that is.

    A prompt has the tokens that it has by itself, as when an answer to it is generated; what follows has those that
    it has in the whole text, where they go on from the prompt's. ``special`` adds the tokenizer's start token.
    """
    found = [Tokens([], []) for _ in rows]
    for k in range(max(map(len, rows))):
        there = [i for i, row in enumerate(rows) if k < len(row)]
        whole = tokens(["".join(text for text, _ in rows[i][: k + 1]) for i in there], tokenizer, special)
        apart = None
        for place, i in enumerate(there):
            row, before = found[i], len(found[i].ids)
            if whole[place][:before] == row.ids:
                more = whole[place][before:]
            else:  # the last token before and the first after would have become one
                apart = apart or tokens([rows[j][k][0] for j in there], tokenizer, False)
                more = apart[place]
            row.ids.extend(more)
            row.learnt.extend([rows[i][k][1]] * len(more))
    for row, one in zip(found, rows):
        _finish(row, one, tokenizer)
    return found


def tokens(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    """Token numbers of each text, without an end token."""
    found = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id if special else None
    return [ids[:-1] if ids and ids[-1] == end and len(ids) > 1 else ids for ids in found]


def _finish(row: Tokens, one: Sequence[Segment], tokenizer: Any) -> None:
    last = row.ids[max((i + 1 for i, learnt in enumerate(row.learnt) if not learnt), default=0) :]
    end = tokenizer.eos_token_id
    if one[-1][1] and end is not None and end not in last:  # a chat template may have ended the turn itself
        row.ids.append(end)
        row.learnt.append(True)
    if row.learnt:
        row.learnt[0] = False  # nothing stands before it that it could be told from


def cut(
    rows: Sequence[Tokens], limit: int, side: Side, start: int | None, what: str = "training", blank: bool = False
) -> tuple[list[Tokens], str]:
    """Rows of at most ``limit`` tokens, and a sentence that says what was cut, or nothing.

    ``side`` is where tokens are taken away; on the left the start token stays. ``ValueError`` says how many rows have
    nothing left to learn, unless ``blank`` lets them.
    """
    found, prompts, responses = [], 0, 0
    for row in rows:
        over = len(row.ids) - limit
        if over > 0:
            first = int(side == "left" and row.ids[0] == start)
            gone = slice(first, first + over) if side == "left" else slice(limit, None)
            responses += any(row.learnt[gone])
            prompts += not all(row.learnt[gone])
            row = Tokens(list(row.ids), list(row.learnt))
            del row.ids[gone], row.learnt[gone]
            row.learnt[0] = False
        found.append(row)
    lost = sum(not any(row.learnt) for row in found)
    if lost and not blank:
        other = "left" if side == "right" else "right"
        raise ValueError(
            f"nothing is left to learn in {lost} of {len(rows)} {what} rows within task.max_length = {limit} tokens: "
            f"the response was cut away on the {side}; raise task.max_length, set "
            f"task.truncation_side to {other!r}, or leave these rows out with task.drop_unlearnable = true."
        )
    several = sum(len(row.ids) > limit for row in rows)
    text = cut_note(several, len(rows), limit, side, what)
    return found, f"{text}: the prompt in {prompts}, the response in {responses}." if several else ""


def cut_note(several: int, rows: int, limit: int, side: str, what: str) -> str:
    """The words of a note on rows that were cut, without an end."""
    return f"{several} of {rows} {what} rows were cut to {limit} tokens on the {side}"


def flat(rows: Sequence[Tokens], pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """Features of ``Examples``, without padding, and each row's length. 32 bits: long texts in little memory."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    features = {
        "input_ids": torch.tensor(list(chain.from_iterable(row.ids for row in rows)), dtype=torch.int32),
        "learnt": torch.tensor(list(chain.from_iterable(row.learnt for row in rows))),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "pad": torch.tensor(pad),
    }
    return features, lengths


def padded(examples: Examples, rows: Tensor) -> Batch:
    """A row a sequence, padded on the right to the longest; what is not learnt is labelled -100."""
    places = torch.arange(int(examples.lengths[rows].max()))
    mask = places < examples.lengths[rows, None]
    return {"attention_mask": mask.long(), **_laid(examples, examples.features["offsets"][rows, None] + places, mask)}


def packed(examples: Examples, rows: Tensor, width: int) -> Batch:
    """Several rows in each sequence of at most ``width`` tokens, told apart by positions that begin anew.

    There is no attention mask: transformers makes one from the positions, so that no row sees another.
    """
    bins = _bins(examples.lengths[rows].tolist(), width)
    longest = max(sum(int(examples.lengths[rows[i]]) for i in one) for one in bins)
    at, mask, positions = (
        torch.zeros(len(bins), longest, dtype=kind) for kind in (torch.int64, torch.bool, torch.int64)
    )
    for number, one in enumerate(bins):
        lengths = [int(examples.lengths[rows[i]]) for i in one]
        for i, length, end in zip(one, lengths, accumulate(lengths)):
            place = slice(end - length, end)
            at[number, place] = examples.features["offsets"][rows[i]] + torch.arange(length)
            positions[number, place] = torch.arange(length)
            mask[number, place] = True
        left = longest - sum(lengths)
        positions[number, longest - left :] = torch.arange(left)  # padding is a row of its own
    return {"position_ids": positions, **_laid(examples, at, mask)}


def _laid(examples: Examples, at: Tensor, mask: Tensor) -> Batch:
    """Tokens and labels from the flat storage: token ``at`` where ``mask`` holds, else padding."""
    at = torch.where(mask, at, 0)
    ids = torch.where(mask, examples.features["input_ids"][at].long(), examples.features["pad"])
    return {"input_ids": ids, "labels": torch.where(mask & examples.features["learnt"][at], ids, IGNORED)}


def _bins(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Numbers of rows that go into one sequence: the longest first, each where it fits."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, left in enumerate(room) if left >= lengths[i]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(width)
        bins[place].append(i)
        room[place] -= lengths[i]
    return bins
