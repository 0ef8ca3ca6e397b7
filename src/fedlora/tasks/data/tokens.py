"""Token sequences: encoded once, stored without padding, padded or packed in each batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.tasks._base import Batch, Examples
from fedlora.tasks.data.templates import Segment
from fedlora.tasks.data.token_budget import batch_sizes

IGNORED = -100  # cross_entropy's ignore_index
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Tokens:
    """One row's tokens, and which of them are learnt."""

    ids: list[int]
    learnt: list[bool]


def encode(rows: Sequence[Sequence[Segment]], tokenizer: Any, special: bool, end: bool = True) -> list[Tokens]:
    """Return the tokens of each row. With ``end``, an end token is added and learnt if the last segment is learnt.

    A prompt has the same tokens as alone, as in generation. The next segment has its tokens of the whole text, if the
    whole text's tokens begin with the prompt's. ``special`` adds the tokenizer's start token.
    """
    encoded = [Tokens([], []) for _ in rows]
    for k in range(max(map(len, rows))):
        longer = [i for i, row in enumerate(rows) if k < len(row)]
        whole = tokenize(["".join(text for text, _ in rows[i][: k + 1]) for i in longer], tokenizer, special)
        alone = None
        for place, i in enumerate(longer):
            row, before = encoded[i], len(encoded[i].ids)
            if whole[place][:before] == row.ids:
                more = whole[place][before:]
            else:  # the last token before and the first after would be merged
                alone = alone or tokenize([rows[j][k][0] for j in longer], tokenizer, False)
                more = alone[place]
            row.ids.extend(more)
            row.learnt.extend([rows[i][k][1]] * len(more))
    end_id = tokenizer.eos_token_id if end else None
    for row, segments in zip(encoded, rows):
        last = row.ids[max((i + 1 for i, learnt in enumerate(row.learnt) if not learnt), default=0) :]
        if segments[-1][1] and end_id is not None and end_id not in last:  # a chat template may have added it
            row.ids.append(end_id)
            row.learnt.append(True)
        if row.learnt:
            row.learnt[0] = False  # there is no token before it to predict it from
    return encoded


def tokenize(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    """Return the token ids of each text, without an end token."""
    rows = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id if special else None
    return [ids[:-1] if ids and ids[-1] == end and len(ids) > 1 else ids for ids in rows]


def truncate_rows(
    rows: Sequence[Tokens], limit: int, side: Side, start: int | None, role: str = "training", allow_empty: bool = False
) -> tuple[list[Tokens], str]:
    """Return rows of at most ``limit`` tokens, and a note about the cuts, or an empty string.

    Tokens are removed on ``side``; on the left the start token stays. Unless ``allow_empty``, rows with nothing to
    learn are a ``ValueError``.
    """
    truncated, prompts, responses = [], 0, 0
    for row in rows:
        over = len(row.ids) - limit
        if over > 0:
            first = int(side == "left" and row.ids[0] == start)
            removed = slice(first, first + over) if side == "left" else slice(limit, None)
            responses += any(row.learnt[removed])
            prompts += not all(row.learnt[removed])
            row = Tokens(list(row.ids), list(row.learnt))
            del row.ids[removed], row.learnt[removed]
            row.learnt[0] = False
        truncated.append(row)
    empty = sum(not any(row.learnt) for row in truncated)
    if empty and not allow_empty:
        other = "left" if side == "right" else "right"
        raise ValueError(
            f"nothing is left to learn in {empty} of {len(rows)} {role} rows within task.max_length = {limit} tokens: "
            f"the response was cut away on the {side}; raise task.max_length, set "
            f"task.truncation_side to {other!r}, or leave these rows out with task.drop_unlearnable = true."
        )
    several = sum(len(row.ids) > limit for row in rows)
    note = truncation_note(several, len(rows), limit, side, role)
    return truncated, f"{note}: the prompt in {prompts}, the response in {responses}." if several else ""


def truncation_note(several: int, rows: int, limit: int, side: str, role: str) -> str:
    """Return the beginning of a note about rows that were cut."""
    return f"{several} of {rows} {role} rows were cut to {limit} tokens on the {side}"


def flatten_tokens(rows: Sequence[Tokens], pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the features of ``Examples``, without padding, and each row's length."""
    ids, offsets = flatten_rows([row.ids for row in rows])
    learnt = torch.tensor(list(chain.from_iterable(row.learnt for row in rows)))
    return {"input_ids": ids, "learnt": learnt, "offsets": offsets, "pad": torch.tensor(pad)}, offsets.diff()


def flatten_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return all token ids in one tensor, in 32 bits to save memory, and the offsets of the rows (N + 1,)."""
    lengths = torch.tensor([len(ids) for ids in rows])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32), offsets


def locate_rows(offsets: Tensor, rows: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the indices (b, width) of some rows' tokens in a flat tensor, padded with 0 on the right, and the mask."""
    starts, lengths = offsets[rows, None], (offsets[rows + 1] - offsets[rows])[:, None]
    places = torch.arange(int(lengths.max()) if width is None else width)
    mask = places < lengths
    return torch.where(mask, starts + places, 0), mask


def random_batch(words: int) -> Batch:
    """Return a small fixed batch of tokens, to compare two networks."""
    ids = torch.randint(words, (4, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pad_batch(examples: Examples, rows: Tensor) -> Batch:
    """Return one row in each sequence, padded on the right; tokens that are not learnt have the label -100."""
    places, mask = locate_rows(examples.features["offsets"], rows)
    return {"attention_mask": mask.long(), **_tokens_and_labels(examples, places, mask)}


def pack_batch(examples: Examples, rows: Tensor, width: int) -> Batch:
    """Return several rows in each sequence of at most ``width`` tokens; the positions begin again at each row.

    There is no attention mask: transformers builds one from the positions, so that no row attends to another.
    """
    lengths = examples.lengths[rows].tolist()
    bins = _assign_bins(lengths, width)
    longest = max(sum(lengths[i] for i in members) for members in bins)
    shape = (len(bins), longest)
    places, positions, mask = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.zeros(shape).bool()
    for number, members in enumerate(bins):
        ends = list(accumulate(lengths[i] for i in members))
        for i, end in zip(members, ends):
            tokens = slice(end - lengths[i], end)
            places[number, tokens] = examples.features["offsets"][rows[i]] + torch.arange(lengths[i])
            positions[number, tokens] = torch.arange(lengths[i])
            mask[number, tokens] = True
        positions[number, ends[-1] :] = torch.arange(longest - ends[-1])  # padding is a row of its own
    return {"position_ids": positions, **_tokens_and_labels(examples, places, mask)}


def split_sequences(lengths: Sequence[int], width: int, max_tokens: int) -> list[list[int]]:
    """Return the places of rows in batches whose ``pack_batch`` has at most ``max_tokens`` tokens, padding included.

    Each batch has whole sequences of all rows' ``pack_batch``, and packing it gives the same sequences again: a row
    goes to the first sequence with room, whatever the others hold. A longer sequence is a batch of its own.
    """
    bins = _assign_bins(lengths, width)
    filled = torch.tensor([[sum(lengths[i] for i in members)] for members in bins])
    if len(bins) * int(filled.max()) <= max_tokens:
        return [list(range(len(lengths)))]
    order = filled[:, 0].argsort(stable=True)
    parts = order.split(batch_sizes(filled[order], max_tokens))
    return [sorted(i for number in part.tolist() for i in bins[number]) for part in parts]


def _tokens_and_labels(examples: Examples, places: Tensor, mask: Tensor) -> Batch:
    """Return the tokens at ``places`` of the flat tensors, or padding if ``mask`` is false, and their labels."""
    ids = torch.where(mask, examples.features["input_ids"][places].long(), examples.features["pad"])
    return {"input_ids": ids, "labels": torch.where(mask & examples.features["learnt"][places], ids, IGNORED)}


def _assign_bins(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Return the rows of each sequence: the longest first, each in the first sequence with room."""
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
