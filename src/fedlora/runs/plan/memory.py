"""Track the memory of tensors by their storages; fake tensors count like real ones."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only


class MemoryTracker(TorchDispatchMode):
    """``now`` and ``peak``: bytes of the tensors that are allocated within the block. A view counts once."""

    def __init__(self, known: Iterable[Tensor] = ()):
        """``known`` are tensors from before the block; they do not count."""
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(x.untyped_storage() for x in known)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports torch._dynamo, more than a second, at the first operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the tensors that it allocates."""
        result = func(*args, **(kwargs or {}))
        given = {id(_storage(x)) for x in tree_iter((args, kwargs or {})) if isinstance(x, Tensor)}
        tree_map_only(Tensor, lambda x: self._count(x, given), result)
        return result

    def _count(self, x: Tensor, given: set[int]) -> Tensor:
        storage = _storage(x)
        if storage is None or storage in self._seen:
            return x
        self._seen.add(storage)
        if id(storage) not in given:  # else it is a view of a tensor from outside
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, storage.nbytes())
        return x

    def _release(self, size: int) -> None:
        self.now -= size


def _storage(x: Tensor) -> torch.UntypedStorage | None:
    return None if x.layout != torch.strided else x.untyped_storage()
