"""Nine bugs of published code, planted one by one: a law must fail, and must hold for the unbroken method."""

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest

from fedlora.adapters import LoRA, MultiHead
from fedlora.linalg.factors import total, truncate
from fedlora.methods._base import Method, mean
from fedlora.methods.fedex_lora import FedExLoRA
from fedlora.methods.fedit import FedIT
from fedlora.methods.fedrot_lora import FedRotLoRA
from fedlora.methods.fedsa_lora import FedSALoRA
from fedlora.methods.ffa_lora import FFALoRA
from fedlora.methods.flexlora import FlexLoRA
from fedlora.methods.flora import FLoRA
from fedlora.methods.ravan import Ravan
from fedlora.methods.rolora import RoLoRA
from fedlora.types import Factors, Outcome
from tests.laws.laws import LAWS


@dataclass(frozen=True)
class FlexWithoutRootOnA(FlexLoRA):
    def combine(self, shared, uploads):
        U, V = truncate(total([self._weighted(u) for u in uploads]), shared["A"].shape[-2])
        roots = V.norm(dim=-1, keepdim=True)
        return Outcome(self.adapter.split(Factors(U, V / roots)))

    def _weighted(self, upload):
        U, V = self.adapter.delta(upload.layer)
        return Factors(upload.weight * U, V)


@dataclass(frozen=True)
class FedExUnscaled(FedExLoRA):
    def combine(self, shared, uploads):
        averaged = mean(uploads)
        parts = [Factors(u.weight * u.layer["B"], u.layer["A"]) for u in uploads]
        return Outcome({**shared, **averaged}, base_update=(total([*parts, Factors(-averaged["B"], averaged["A"])]),))


@dataclass(frozen=True)
class FLoRAUnscaled(FLoRA):
    def combine(self, shared, uploads):
        return Outcome(shared, base_update=(total([Factors(u.weight * u.layer["B"], u.layer["A"]) for u in uploads]),))


@dataclass(frozen=True)
class FedSAWithoutOwnB(FedSALoRA):
    def keep(self, work, sent, turn):
        return {}


@dataclass(frozen=True)
class MeanThatKeepsClient0(FFALoRA):
    def combine(self, shared, uploads):
        return Outcome({**shared, **uploads[0].layer})


@dataclass(frozen=True)
class FedRotLostTranspose(FedRotLoRA):
    def send(self, work, turn):
        if turn.round == 0:
            return Method.send(self, work, turn)
        R = self.rotation(work.start, work.end, turn.round)
        return {"A": R @ work.end["A"], "B": work.end["B"] @ R}


@dataclass(frozen=True)
class RavanLostScale(Ravan):
    def send(self, work, turn):
        return {core: work.end[core] for core in work.trained if core.startswith("H")}


@dataclass(frozen=True)
class ServerOverwritesKept(FedSALoRA):
    def receive(self, shared, kept, turn):
        return {**kept, **shared}


@dataclass(frozen=True)
class RoLoRAByClient(RoLoRA):
    def trains(self, start, turn, gradient):
        return self.adapter.outputs if (turn.round + turn.client) % 2 == 0 else self.adapter.inputs


PLANTED = [
    FlexWithoutRootOnA, FedExUnscaled, FLoRAUnscaled, FedSAWithoutOwnB, MeanThatKeepsClient0,
    FedRotLostTranspose, RavanLostScale, ServerOverwritesKept, RoLoRAByClient,
]  # fmt: skip


def broken_laws(kind: type[Method]) -> list[str]:
    adapter = MultiHead(2, 2) if MultiHead in kind.adapters else LoRA(2, 3.0)
    broken = []
    for law in LAWS:
        try:
            law(kind(adapter=adapter))
        except AssertionError:
            broken.append(law.__name__)
    return broken


@pytest.mark.parametrize("kind", PLANTED, ids=lambda kind: kind.__name__)
def test_planted_bug_breaks_a_law(kind):
    assert broken_laws(kind), f"{kind.__name__} passes all laws"
    assert broken_laws(kind.__mro__[1]) == [], "the unbroken method must pass the same checks"


def test_a_harmless_rewrite_passes():
    @dataclass(frozen=True)
    class Rewritten(FedIT):
        def combine(self, shared, uploads):
            sums = {leaf: sum(u.weight * u.layer[leaf] for u in uploads) for leaf in ("A", "B")}
            return Outcome({**shared, **sums})

    assert [f.name for f in fields(Rewritten)] == [f.name for f in fields(FedIT)]
    assert broken_laws(Rewritten) == []


@dataclass(frozen=True)
class FedDecay(FedIT):
    """The example of docs/adding-a-method.md: the server shrinks the mean of the factors."""

    decay: float = 0.1

    lossy: ClassVar[bool] = True

    def combine(self, shared, uploads):
        return Outcome({**shared, **{leaf: (1 - self.decay) * x for leaf, x in mean(uploads).items()}})


@dataclass(frozen=True)
class FedDecayUnclaimed(FedDecay):
    lossy: ClassVar[bool] = False


@dataclass(frozen=True)
class FedITClaimsLoss(FedIT):
    lossy: ClassVar[bool] = True


def test_a_method_that_is_lossy_on_purpose_says_so():
    assert broken_laws(FedDecay) == []
    assert {"federation_of_one", "nothing_in_nothing_out"} <= set(broken_laws(FedDecayUnclaimed))
    assert broken_laws(FedITClaimsLoss) == ["federation_of_one"], "a claim that is not needed is found"
