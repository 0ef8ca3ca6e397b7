"""A part that is trained in full, such as a classifier: its leaves are its parameters."""

from dataclasses import dataclass

from torch import Tensor

from fedlora.adapters._base import Adapter
from fedlora.types import Factors, Layer


@dataclass(frozen=True)
class Dense(Adapter):
    """No low-rank form: the leaves ``names`` (``weight``, ``bias``) are the module's parameters themselves."""

    names: frozenset[str] = frozenset({"weight", "bias"})

    inputs = frozenset()

    @property
    def outputs(self) -> frozenset[str]:
        return self.names

    @property
    def budget(self) -> int:
        return 0

    @classmethod
    def like(cls, other: "Adapter") -> "Adapter":
        return other if isinstance(other, cls) else cls()

    def init(self, m: int, n: int, seed: int) -> dict[str, Tensor]:
        raise TypeError("a dense part starts from the network's own parameters, which Model.initial() reads")

    def delta(self, layer: Layer) -> Factors:
        raise TypeError("a dense part has no low-rank form")
