"""One copy of a pretrained base in memory for all clients of a process."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

LOAD = "from_pretrained"  # the method of transformers that loads a network


class SharedBases:
    """The pretrained networks of a process by class, name and loading options.

    ``share_loads()`` makes ``from_pretrained`` of transformers return a new network on the same tensors if it has
    loaded the same one before, so that each client's network has its own modules and no weight is in memory twice.
    """

    def __init__(self) -> None:
        self._networks: dict[tuple[str, ...], nn.Module] = {}

    @contextmanager
    def share_loads(self) -> Iterator[None]:
        """Share the networks that are loaded inside the block."""
        from transformers import PreTrainedModel

        original = PreTrainedModel.__dict__[LOAD]

        def load_or_clone(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
            key = (f"{cls.__module__}.{cls.__qualname__}", str(name), repr(args), repr(sorted(options.items())))
            if key not in self._networks:
                network = original.__func__(cls, name, *args, **options)
                if options.get("output_loading_info"):
                    return network
                self._networks[key] = clone_network(network)
                return network
            return clone_network(self._networks[key])

        setattr(PreTrainedModel, LOAD, classmethod(load_or_clone))
        try:
            yield
        finally:
            setattr(PreTrainedModel, LOAD, original)


def clone_network(network: nn.Module) -> nn.Module:
    """Return a copy of a network's modules on the same parameters and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(x): x for x in tensors})
