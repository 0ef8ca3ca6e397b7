"""Batches that are made ahead of their use."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def prefetch(batches: Iterator[T]) -> Iterator[T]:
    """Yield the items of an iterator in order, while a thread makes the next one."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(lambda: list(islice(batches, 1)))
        while item := ahead.result():
            ahead = thread.submit(lambda: list(islice(batches, 1)))
            yield item[0]
