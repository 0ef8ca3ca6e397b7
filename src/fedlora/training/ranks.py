"""The processes that train one client together: one tree on all ranks, and an error of one of them ends all.

Every rank runs the same federation. The first rank's leaves are everyone's, and only it writes the run folder.
"""

import hashlib
import json
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedlora.types import Tree

FAILED = "fedlora/failed"  # of the store that all ranks see: the first error, as a sentence
APART = 0.01  # of a turn's change; rounding alone is far below
CHUNK = 1 << 26  # bytes of a file that are sent at once


class RankError(RuntimeError):
    """Another rank has ended with an error, which is in the message."""


class _Ranks:
    """The group in which trees are sent, by CPU, apart from the caller's own, and the number of barriers so far."""

    def __init__(self) -> None:
        self.world: Any = None
        self.group: Any = None
        self.barriers = 0


_RANKS = _Ranks()


def is_parallel() -> bool:
    """Whether this process is one of several that torch.distributed has joined."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this process writes files and reports progress."""
    return not is_parallel() or dist.get_rank() == 0


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _group() -> Any:
    """Return the group of this module; made anew if the caller has begun another default group."""
    world = dist.group.WORLD
    if _RANKS.world is not world:
        _RANKS.world, _RANKS.group, _RANKS.barriers = world, dist.new_group(backend="gloo"), 0
    return _RANKS.group


def barrier() -> None:
    """Wait until every rank is here. Raises ``RankError`` as soon as one of them has failed."""
    if not is_parallel():
        return
    _group()
    _RANKS.barriers += 1
    key, pause = f"fedlora/barrier/{_RANKS.barriers}", 0.0005
    try:
        store = _store()
        count = store.add(key, 1)
        while count < dist.get_world_size():
            if store.check([FAILED]):
                raise RankError(store.get(FAILED).decode())
            time.sleep(pause)
            pause, count = min(2 * pause, 0.05), store.add(key, 0)
    except dist.DistError as error:  # the store was in a process that has ended
        raise RankError("another rank has ended; see its own error.") from error


@contextmanager
def share_failure() -> Iterator[None]:
    """Tell the other ranks of an error in the block, so that they end with its sentence instead of waiting."""
    try:
        yield
    except RankError:
        raise
    except Exception:
        _end_other_ranks(sys.exc_info()[1])
        raise


def _end_other_ranks(error: BaseException | None) -> None:
    """Publish an error of this rank. Raises ``RankError`` if it follows from that of another rank."""
    if not is_parallel():
        return
    sentence = _other_failure()
    if sentence is not None:  # ours follows from it, such as a connection that was closed
        raise RankError(sentence) from error
    _publish_failure(f"has ended: {type(error).__name__}: {error}")


def end_run(is_interrupted: bool) -> None:
    """Wait for the other ranks at the end of a run, or end them too if this one was interrupted."""
    if not is_interrupted:
        barrier()
    elif is_parallel():
        _publish_failure("was interrupted")


def _publish_failure(event: str) -> None:
    with suppress(dist.DistError):
        _store().set(FAILED, f"rank {dist.get_rank()} {event}"[:4000])


def _other_failure() -> str | None:
    """Return the sentence of a rank that failed before this one."""
    with suppress(dist.DistError):
        store = _store()
        if store.check([FAILED]):
            return str(store.get(FAILED).decode())
    return None


def synchronize(tree: Tree) -> Tree:
    """Set the tensors of a tree, in place, to those of the first rank, and return the tree.

    All ranks compute the same; this keeps differences of rounding, between unlike machines, from growing.
    """
    if not is_parallel():
        return tree
    barrier()
    leaves = _leaves(tree)
    for dtype in sorted({x.dtype for x in leaves}, key=str):
        same = [x for x in leaves if x.dtype == dtype]
        flat = _flatten(same)
        dist.broadcast(flat, 0, group=_group())
        if not is_first_rank():
            with torch.no_grad():
                for x, value in zip(same, flat.split([x.numel() for x in same])):
                    x.copy_(value.reshape(x.shape))
    return tree


def check_trained_together(start: Tree, end: Tree) -> None:
    """Raise ``ValueError`` on every rank if the ranks have trained apart from each other, from ``start`` to ``end``.

    Each would have trained on its own rows only, and the other ranks' training would be lost.
    """
    if not is_parallel() or not _leaves(end):
        return
    barrier()
    mine = _flatten(_leaves(end))
    first = mine.clone()
    dist.broadcast(first, 0, group=_group())
    change = (first - _flatten([start[path][leaf] for path in sorted(end) for leaf in sorted(end[path])])).norm()
    is_apart = torch.tensor([int((mine - first).norm() > APART * change)])
    dist.all_reduce(is_apart, group=_group())
    if is_apart:
        raise ValueError(
            f"{dist.get_world_size()} processes have trained this client, each by itself: their weights differ after "
            "the turn; wrap the model in DistributedDataParallel inside the turn, or divide it by fully_shard."
        )


def _leaves(tree: Tree) -> list[Tensor]:
    return [x for path in sorted(tree) for _, x in sorted(tree[path].items())]


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().reshape(-1).cpu() for x in tensors])


def average(value: float | None) -> float | None:
    """Return the mean of a number over the ranks that have one; None if none has."""
    if not is_parallel():
        return value
    barrier()
    sums = torch.tensor([0.0, 0.0] if value is None else [value, 1.0], dtype=torch.float64)
    dist.all_reduce(sums, group=_group())
    return float(sums[0] / sums[1]) if sums[1] else None


def average_tree(tree: Tree) -> Tree:
    """Return the mean of a tree over all ranks."""
    if not is_parallel():
        return tree
    barrier()
    means: dict[str, dict[str, Tensor]] = {path: {} for path in tree}
    for path in sorted(tree):
        for leaf, x in sorted(tree[path].items()):
            total = x.detach().cpu().clone()
            dist.all_reduce(total, group=_group())
            means[path][leaf] = (total / dist.get_world_size()).to(x.device)
    return means


def check_equal(what: str, value: Any) -> None:
    """Raise ``ValueError`` on every rank if a plain value differs from that of the first rank."""
    if not is_parallel():
        return
    barrier()
    digest = hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.int64)
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine, group=_group())
    odd = [rank for rank, other in enumerate(everyone) if not torch.equal(other, everyone[0])]
    if odd:
        raise ValueError(f"{what} is not the same on ranks 0 and {odd[0]}; make the same call with it on every rank.")


@contextmanager
def copy_from_first_rank(folder: Path, names: Collection[str] | None = None) -> Iterator[Path]:
    """Give the first rank ``folder`` itself, and the others a temporary copy of the files and folders of these names.

    None: of all.
    """
    if not is_parallel():
        yield folder
        return
    with TemporaryDirectory(prefix="fedlora-rank-") as place:
        target = Path(place) / "run"
        _send_files(folder, target, names)
        yield folder if is_first_rank() else target


def _send_files(source: Path, target: Path, names: Collection[str] | None) -> None:
    barrier()
    first = is_first_rank()
    places = [place.relative_to(source) for place in source.rglob("*") if place.is_file()] if first else []
    files = sorted(place.as_posix() for place in places if names is None or place.parts[0] in names)
    for name in json.loads(_send(json.dumps(files).encode()).decode()):
        place = (source if first else target) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        content = _send(place.read_bytes() if first else b"")
        if not first:
            place.write_bytes(content)


def _send(content: bytes) -> bytes:
    """Return the first rank's bytes on every rank."""
    size = torch.tensor([len(content)])
    dist.broadcast(size, 0, group=_group())
    buffer = bytearray(content) if is_first_rank() else bytearray(int(size))
    for begin in range(0, len(buffer), CHUNK):
        dist.broadcast(
            torch.frombuffer(memoryview(buffer)[begin : begin + CHUNK], dtype=torch.uint8), 0, group=_group()
        )
    return bytes(buffer)
