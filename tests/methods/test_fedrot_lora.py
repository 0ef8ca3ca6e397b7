"""FedRot-LoRA: its rotation, plane by plane, and when it must not turn."""

import math

import pytest
import torch

from fedlora.adapters import LoRA
from fedlora.methods.fedit import FedIT
from fedlora.methods.fedrot_lora import FedRotLoRA
from fedlora.types import Turn, Work
from tests.fixtures.cohort import Cohort, lora


def plane(*angles: float) -> torch.Tensor:
    """Rotations in planes of their own."""
    blocks = [[[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]] for a in angles]
    return torch.block_diag(*(torch.tensor(b, dtype=torch.float64) for b in blocks))


def work(start, end):
    return Work(start, end, frozenset("AB"))


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("round", [1, 2])
def test_each_plane_turns_by_the_soft_angle(strength, round):
    angles = (0.4, -1.9)
    start = {"A": torch.randn(4, 9, dtype=torch.float64), "B": torch.randn(12, 4, dtype=torch.float64)}
    # Orthonormal references, so that the aligning rotation of a client turned by R is exactly R.
    start = {"A": torch.linalg.qr(start["A"].T)[0].T, "B": torch.linalg.qr(start["B"])[0]}
    turned = {"A": plane(*angles) @ start["A"], "B": start["B"] @ plane(*angles).T}
    R = FedRotLoRA(LoRA(4), strength=strength).rotation(start, turned, round)
    soft = [math.atan2(strength * math.sin(a), 1 - strength + strength * math.cos(a)) for a in angles]
    torch.testing.assert_close(R, plane(*soft))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("align", ["alternate", "A", "B"])
def test_the_product_never_changes(strength, align):
    c = Cohort.drawn(0)
    method = FedRotLoRA(lora(c), strength=strength, align=align)
    for round in range(4):
        end = {"A": c.A[0], "B": c.B[0]}
        sent = method.send(work(c.start, end), Turn(round, 0, 3))
        torch.testing.assert_close(sent["B"] @ sent["A"], c.B[0] @ c.A[0])
        if round == 0 or strength == 0:
            assert torch.equal(sent["A"], c.A[0]), "nothing to align with, or asked not to"


@pytest.mark.parametrize("side,round", [("A", 1), ("B", 2)])
def test_it_moves_the_factor_to_the_reference_as_far_as_a_rotation_can(side, round):
    c = Cohort.drawn(1)
    sent = FedRotLoRA(lora(c), strength=1.0).send(work(c.start, {"A": c.A[0], "B": c.B[0]}), Turn(round, 0, 3))
    best = float((sent[side] - c.start[side]).norm())
    own = {"A": c.A, "B": c.B}[side][0]
    assert best < float((own - c.start[side]).norm())
    g = torch.Generator().manual_seed(0)
    for _ in range(200):  # no random rotation does better
        Q = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
        Q = Q * torch.linalg.det(Q)  # det is ±1 and r is odd
        turned = Q.T @ own if side == "A" else own @ Q
        assert best <= float((turned - c.start[side]).norm()) + 1e-9


def test_lambda_zero_is_fedit():
    c = Cohort.drawn(2)
    method = FedRotLoRA(lora(c), strength=0.0)
    sent = [method.send(work(c.start, {"A": A, "B": B}), Turn(3, 0, 3)) for A, B in zip(c.A, c.B)]
    turned = Cohort([s["A"] for s in sent], [s["B"] for s in sent], c.examples, c.start)
    for leaf in "AB":
        assert torch.equal(turned.served(method)[leaf], c.served(FedIT(lora(c)))[leaf])


def test_clients_equal_up_to_rotation_are_exact_at_full_strength():
    c = Cohort.drawn(3)
    g = torch.Generator().manual_seed(1)
    turns = [torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0] for _ in range(4)]
    turns = [Q * torch.linalg.det(Q) for Q in turns]
    clients = [{"A": Q.T @ c.A[0], "B": c.B[0] @ Q} for Q in turns]
    method = FedRotLoRA(lora(c), strength=1.0)
    sent = [method.send(work(c.start, end), Turn(1, 0, 3)) for end in clients]
    turned = Cohort([s["A"] for s in sent], [s["B"] for s in sent], c.examples, c.start)
    assert turned.error(method) < 1e-9
    plain = Cohort([e["A"] for e in clients], [e["B"] for e in clients], c.examples, c.start)
    assert plain.error(FedIT(lora(c))) > 0.1


def test_it_stays_where_the_alignment_is_not_determined():
    c = Cohort.drawn(4)
    eye = torch.eye(3, dtype=torch.float64)
    method = FedRotLoRA(lora(c))
    flat = {"A": c.A[0], "B": torch.zeros_like(c.B[0])}
    assert torch.equal(method.rotation(c.start, flat, 2), eye), "M = 0"
    lower = {"A": torch.cat([c.A[0][:2], c.A[0][:1]]), "B": c.B[0]}
    assert torch.equal(method.rotation(c.start, lower, 1), eye), "M of rank 2"
    start = {"A": torch.linalg.qr(torch.randn(9, 2, dtype=torch.float64))[0].T, "B": c.B[0]}
    half = {"A": plane(math.pi) @ start["A"], "B": c.B[0]}
    assert torch.equal(method.rotation(start, half, 1), torch.eye(2, dtype=torch.float64)), (
        "half of a half turn is nowhere"
    )


def test_a_reflection_is_not_taken_for_a_rotation():
    c = Cohort.drawn(5)
    mirrored = {"A": torch.diag(torch.tensor([1.0, 1, -1], dtype=torch.float64)) @ c.start["A"], "B": c.B[0]}
    R = FedRotLoRA(lora(c), strength=1.0).rotation(c.start, mirrored, 1)
    assert float(torch.linalg.det(R)) == pytest.approx(1.0)


def test_strength_outside_the_range_is_refused():
    with pytest.raises(ValueError, match=r"strength is 1\.5.*between 0 and 1"):
        FedRotLoRA(strength=1.5)
