"""Batches within a budget of tokens, padding included."""

from collections.abc import Sequence

from torch import Tensor


def batch_sizes(lengths: Tensor, max_tokens: int, max_rows: int | None = None) -> list[int]:
    """Return the numbers of rows of consecutive batches, each as many rows as fit.

    ``lengths`` (n, s) are the tokens of each row's s sequences, each of which a batch pads to its longest. A row with
    more than ``max_tokens`` is a batch of its own. Sorted rows need the least padding.
    """
    sizes: list[int] = []
    widths: Sequence[int] = ()
    for row in lengths.tolist():
        wider = row if not sizes else list(map(max, widths, row))
        if sizes and sizes[-1] != max_rows and (sizes[-1] + 1) * sum(wider) <= max_tokens:
            sizes[-1] += 1
            widths = wider
        else:
            sizes.append(1)
            widths = row
    return sizes
