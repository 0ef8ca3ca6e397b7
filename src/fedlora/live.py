"""How many bytes are alive while something runs, storage by storage; fake tensors count like real ones."""

import weakref
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ALIGNED = 64  # bytes, as torch asks for


class Heap:
    """An allocator that takes the smallest free block that fits and gives nothing back, as a C library's does.

    Blocks of unlike sizes leave gaps; ``top`` is how far the memory reaches with them.
    """

    def __init__(self) -> None:
        self.top = 0
        self._free: list[tuple[int, int]] = []  # size, address: in order of size
        self._starts: dict[int, int] = {}  # of free blocks: address -> size
        self._ends: dict[int, int] = {}  # end -> address

    def take(self, size: int) -> tuple[int, int]:
        """A block: its address and size."""
        size = max(1, -(-size // ALIGNED)) * ALIGNED
        place = bisect_left(self._free, (size, 0))
        if place < len(self._free):
            found, address = self._free[place]
            self._remove(address, found)
        else:
            address, found = self._last()
        if found > size:
            self._insert(address + size, found - size)
        self.top = max(self.top, address + size)
        return address, size

    def give(self, address: int, size: int) -> None:
        """Frees a block; with free neighbours it becomes one."""
        if address + size in self._starts:
            after = self._starts[address + size]
            self._remove(address + size, after)
            size += after
        if address in self._ends:
            before = self._ends[address]
            self._remove(before, address - before)
            address, size = before, size + address - before
        self._insert(address, size)

    def _last(self) -> tuple[int, int]:
        """The free block at the top, to be made longer; or the top itself."""
        if self.top in self._ends:
            address = self._ends[self.top]
            self._remove(address, self.top - address)
            return address, 0
        return self.top, 0

    def _insert(self, address: int, size: int) -> None:
        insort(self._free, (size, address))
        self._starts[address], self._ends[address + size] = size, address

    def _remove(self, address: int, size: int) -> None:
        self._free.pop(bisect_left(self._free, (size, address)))
        del self._starts[address], self._ends[address + size]


class Live(TorchDispatchMode):
    """``now`` and ``peak``: bytes of the tensors made within, views counted once; ``heap`` has their blocks."""

    def __init__(self, known: Iterable[Tensor] = ()):
        """``known`` were there before and do not count."""
        super().__init__()
        self.now = self.peak = 0
        self.heap = Heap()
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        for x in known:
            self._seen.add(x.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts what it made."""
        found = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in map(_storage, tree_leaves(args, kwargs)) if storage is not None}
        tree_map_only(Tensor, lambda x: self._count(x, given), found)
        return found

    def _count(self, x: Tensor, given: set[int]) -> Tensor:
        storage = _storage(x)
        if storage is None or storage in self._seen:
            return x
        self._seen.add(storage)
        if id(storage) not in given:  # else it is a view of something from outside
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, size, *self.heap.take(size))
        return x

    def _gone(self, size: int, address: int, block: int) -> None:
        self.now -= size
        self.heap.give(address, block)


def tree_leaves(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among an operation's arguments."""
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, (args, kwargs or {}))
    return found


def _storage(x: Tensor) -> torch.UntypedStorage | None:
    return None if x.layout != torch.strided else x.untyped_storage()
