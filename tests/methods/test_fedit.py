"""FedIT against its formula, and the identity that says what it misses."""

import pytest
import torch

from fedlora.methods.fedit import FedIT
from tests.fixtures.cohort import Cohort, lora


@pytest.mark.parametrize("seed", range(20))
def test_means_and_what_they_miss(seed):
    c = Cohort.drawn(seed, K=1 + seed % 5)
    layer = c.served(FedIT(lora(c)))
    A, B = (sum(w * x for w, x in zip(c.w, side)) for side in (c.A, c.B))
    torch.testing.assert_close(layer["A"], A)
    torch.testing.assert_close(layer["B"], B)
    missed = sum(w * (Bk - B) @ (Ak - A) for w, Ak, Bk in zip(c.w, c.A, c.B))
    torch.testing.assert_close(c.exact - B @ A, missed)
    variances = [sum(w * (x - mean).square().sum() for w, x in zip(c.w, side)) for side, mean in ((c.A, A), (c.B, B))]
    assert c.error(FedIT(lora(c))) <= float((variances[0] * variances[1]).sqrt()) + 1e-9


def test_a_common_factor_makes_it_exact():
    c = Cohort.drawn(0)
    for same in (Cohort([c.A[0]] * 4, c.B, c.examples, c.start), Cohort(c.A, [c.B[0]] * 4, c.examples, c.start)):
        assert same.error(FedIT(lora(c))) < 1e-10


def test_no_client_is_dropped():
    """A misspelt variable in published code kept the first client only."""
    c = Cohort.drawn(1)
    changed = Cohort([*c.A[:3], c.A[3] + 1], c.B, c.examples, c.start)
    assert not torch.allclose(c.served(FedIT(lora(c)))["A"], changed.served(FedIT(lora(c)))["A"])


def test_splitting_a_client_in_two_changes_nothing():
    c = Cohort.drawn(2)
    half = Cohort(
        [*c.A, c.A[0]], [*c.B, c.B[0]], [c.examples[0], *(2 * n for n in c.examples[1:]), c.examples[0]], c.start
    )
    torch.testing.assert_close(c.served(FedIT(lora(c)))["B"], half.served(FedIT(lora(c)))["B"])


def test_rotating_or_rescaling_one_client_changes_it():
    c = Cohort.drawn(3)
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    turned = Cohort([Q.T @ c.A[0], *c.A[1:]], [c.B[0] @ Q, *c.B[1:]], c.examples, c.start)
    doubled = Cohort([c.A[0] / 2, *c.A[1:]], [c.B[0] * 2, *c.B[1:]], c.examples, c.start)
    for other in (turned, doubled):
        torch.testing.assert_close(other.exact, c.exact)
        assert abs(other.error(FedIT(lora(c))) - c.error(FedIT(lora(c)))) > 1e-3
