"""A part that is trained in full, such as a classifier: its leaves are its own parameters."""

from dataclasses import dataclass

from fedlora.adapters._base import Adapter


@dataclass(frozen=True)
class Dense(Adapter):
    """No low-rank form: the leaves ``names`` (``weight``, ``bias``) are the module's parameters themselves."""

    names: frozenset[str] = frozenset({"weight", "bias"})

    @property
    def inputs(self):
        return frozenset()

    @property
    def outputs(self):
        return self.names

    @property
    def budget(self):
        return 0

    @classmethod
    def like(cls, other):
        return other if isinstance(other, cls) else cls()

    def init(self, m, n, seed):
        raise TypeError("a dense part starts from the network's own parameters, which Model.initial() reads")

    def delta(self, layer):
        raise TypeError("a dense part has no low-rank form")
