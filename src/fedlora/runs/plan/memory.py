"""How many bytes are alive while something runs, storage by storage; fake tensors count like real ones."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Live(TorchDispatchMode):
    """``now`` and ``peak``: bytes of the tensors made within, views counted once."""

    def __init__(self, known: Iterable[Tensor] = ()):
        """``known`` were there before and do not count."""
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        for x in known:
            self._seen.add(x.untyped_storage())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports torch._dynamo, more than a second, at the first operation

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
            weakref.finalize(storage, self._gone, size)
        return x

    def _gone(self, size: int) -> None:
        self.now -= size


def tree_leaves(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among an operation's arguments."""
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, (args, kwargs or {}))
    return found


def _storage(x: Tensor) -> torch.UntypedStorage | None:
    return None if x.layout != torch.strided else x.untyped_storage()
