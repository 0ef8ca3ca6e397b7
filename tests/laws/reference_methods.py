"""FLoRA, FlexLoRA and FedEx-LoRA in their shortest right form: the laws must hold for methods that fold, too."""

from dataclasses import dataclass

from fedlora.adapters import LoRA
from fedlora.linalg import scaled, total, truncated
from fedlora.method import Method, mean
from fedlora.types import Factors, Outcome


@dataclass(frozen=True)
class FLoRA(Method):
    adapters = (LoRA,)
    exact = True

    def receive(self, shared, kept, turn):
        m, n = shared["B"].shape[-2], shared["A"].shape[-1]
        return {leaf: x.to(shared["A"].dtype) for leaf, x in self.adapter.init(m, n, turn.seed).items()}

    def combine(self, shared, uploads):
        stack = total([scaled(self.adapter.delta(u.layer), u.weight) for u in uploads])
        return Outcome(shared, fold=(stack,))


@dataclass(frozen=True)
class FlexLoRA(Method):
    adapters = (LoRA,)

    def split(self, f: Factors):
        return {"A": f.V, "B": f.U / self.adapter.scale(f.V.shape[-2])}

    def combine(self, shared, uploads):
        products = total([scaled(self.adapter.delta(u.layer), u.weight) for u in uploads])
        return Outcome(self.split(truncated(products, shared["A"].shape[-2])))


@dataclass(frozen=True)
class FedEx(Method):
    adapters = (LoRA,)
    exact = True

    def combine(self, shared, uploads):
        averaged = mean(uploads)
        parts = [scaled(self.adapter.delta(u.layer), u.weight) for u in uploads]
        return Outcome({**shared, **averaged}, fold=(total([*parts, scaled(self.adapter.delta(averaged), -1.0)]),))


def everything():
    return [kind(adapter=a) for kind in (FLoRA, FlexLoRA, FedEx) for a in (LoRA(2, 3.0), LoRA(3, 5.0, True))]
