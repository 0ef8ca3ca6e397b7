"""Batches within a budget of tokens."""

from dataclasses import replace

import pytest
import torch

from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.data.token_budget import batch_sizes
from fedlora.tasks.data.tokens import pack_batch
from tests.fixtures.token_rows import LONGEST, TASKS, token_rows


@pytest.mark.parametrize("limit", [1, 7, 30, 100, 10_000])
@pytest.mark.parametrize("most", [None, 1, 3])
def test_batches_are_as_large_as_fits(limit, most):
    lengths = torch.randint(1, 20, (50, 2), generator=torch.Generator().manual_seed(0))
    sizes = batch_sizes(lengths, limit, most)
    assert sum(sizes) == 50 and all(sizes)

    def tokens(rows):
        return len(rows) * int(rows.max(0).values.sum())

    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for start, size in zip(starts, sizes):
        assert size == 1 or tokens(lengths[start : start + size]) <= limit
        assert most is None or size <= most
        if start + size < 50 and size != most:
            assert tokens(lengths[start : start + size + 1]) > limit, "one more would have fitted"


def test_no_rows_are_no_batches():
    assert batch_sizes(torch.zeros(0, 1), 5) == []


@pytest.mark.parametrize("limit", [1, 40, 100, 10_000])
@pytest.mark.parametrize("name", TASKS)
def test_parts_of_a_batch_are_its_rows_within_the_budget(name, limit):
    task = TASKS[name]
    examples, rows = token_rows(task), torch.tensor([5, 3, 17, 0, 23, 8, 11])
    parts = task.split_by_tokens(examples, rows, limit)
    assert sorted(torch.cat(parts).tolist()) == sorted(rows.tolist())
    for part in parts:
        batch = task.collate(examples, part)
        names = ("input_ids", "labels") if name == "seq2seq" else ("input_ids",)
        sequences, tokens = len(batch["input_ids"]), sum(batch[key].numel() for key in names)
        assert tokens <= limit or sequences == 1
    if limit == 10_000:
        assert len(parts) == 1 and parts[0].tolist() == rows.tolist(), "a batch that fits is left as it is"


def test_packed_parts_have_the_sequences_of_the_whole_batch():
    task = TASKS["packed causal-lm"]
    assert isinstance(task, CausalLM)
    examples, rows = token_rows(task, 40), torch.arange(40)

    def sequences(rows):
        batch = pack_batch(examples, rows, LONGEST)
        texts = zip(batch["input_ids"].tolist(), batch["labels"].tolist())
        return sorted(tuple(zip(ids, labels))[: len(ids) - ids[::-1].index(next(filter(None, ids[::-1])))] for ids, labels in texts)  # fmt: skip

    parts = task.split_by_tokens(examples, rows, 3 * LONGEST)
    assert len(parts) > 3
    assert sorted(row for part in parts for row in sequences(part)) == sequences(rows)


def test_a_row_counts_with_its_prompt_and_answer():
    task = CausalLM("x", metric="exact_match", max_new_tokens=10)
    examples = token_rows(task, 3)
    prompts = {"prompt_offsets": torch.tensor([0, 2, 32, 34])}
    lengths = task.padded_lengths(replace(examples, features={**examples.features, **prompts}), torch.tensor([1, 0, 2]))
    own = examples.lengths
    assert lengths.tolist() == [[max(int(own[1]), 40)], [max(int(own[0]), 12)], [max(int(own[2]), 12)]]
    assert task.padded_lengths(examples, torch.tensor([1])).tolist() == [[int(own[1])]], "training rows have no prompts"
