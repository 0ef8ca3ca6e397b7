"""What training must leave as it is: the frozen weights of a network, and the buffers that belong to its checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fedlora.training.parts import Part

SAMPLE = 64  # values of a weight; training changes nearly all of them
SMALL = 2**14  # values of a buffer that is compared as a whole

Sample = tuple[int, Tensor]  # the number of values of a tensor on this process, and some of them


@dataclass(frozen=True)
class Frozen:
    """The values of a network before training, in part: enough to see that training has changed them.

    Values are compared, because a Trainer may move the network to another device, load the same weights again, or send
    them to the processes of a client.
    """

    weights: dict[str, Sample]
    buffers: dict[str, Sample]

    @classmethod
    def read(cls, network: nn.Module, parts: Mapping[str, Part]) -> "Frozen":
        """Read a network, without the leaves of its parts."""
        leaves = {id(x) for part in parts.values() for x in part.leaves.values()}
        weights = {name: _sample(x, SAMPLE) for name, x in network.named_parameters() if id(x) not in leaves}
        return cls(weights, {name: _sample(x, SMALL) for name, x in _buffers(network).items()})

    def check(self, network: nn.Module) -> None:
        """Raise ``ValueError`` if a weight or a buffer has changed, which would go on to the next client unsent."""
        for name, x in network.named_parameters():
            if name in self.weights and not _is_equal(_sample(x, SAMPLE), self.weights[name]):
                raise ValueError(
                    f"training changed {name!r}, which belongs to the base and is not sent; load the network again, "
                    "leave requires_grad as it is, and build the optimizer of the parameters that require gradients."
                )
        for name, buffer in _buffers(network).items():
            if name not in self.buffers or not _is_equal(_sample(buffer, SMALL), self.buffers[name]):
                raise ValueError(
                    f"the model changes its buffer {name!r} when it is trained, and buffers are not sent; make it a "
                    "parameter and name its module in head, or keep it fixed in training."
                )


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a checkpoint. Others, such as the frequencies of an encoding, follow from the input."""
    return {
        f"{path}.{name}".removeprefix("."): x
        for path, module in network.named_modules()
        for name, x in module._buffers.items()
        if x is not None and name not in module._non_persistent_buffers_set
    }


def _sample(x: Tensor, size: int) -> Sample:
    """Return the number of values, and a copy of about ``size`` of them; of a sharded weight, of its local part."""
    values = x.detach()
    values = (values.to_local() if hasattr(values, "to_local") else values).flatten()
    return len(values), values[:: max(1, len(values) // size)].cpu().clone()


def _is_equal(sample: Sample, other: Sample) -> bool:
    """Whether two samples are equal, bit for bit or both nan. Other sizes are those of another division."""
    (count, a), (count_before, b) = sample, other
    if count != count_before or a.dtype != b.dtype:
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())
