"""ε against closed forms, numerical integration, published figures, and itself."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq
from scipy.special import logsumexp

pytest.importorskip("opacus", reason="needs the dp extra")

from fedlora.security.privacy.accounting import compute_epsilon, find_noise_multiplier

# TensorFlow Privacy's tutorials/README.md: noise, epochs of 60,000 rows in batches of 256, ε at δ = 1e-5 as published,
# with Mironov's first conversion from Rényi's divergence, which later ones improve.
PUBLISHED = [(1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20)]
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))


def renyi(order, q, noise):
    """Rényi divergence of one sampled Gaussian step by numerical integration, nothing of an accountant's."""
    z = np.linspace(-12 * noise, order + 12 * noise, 20001)
    ratio = np.logaddexp(math.log(1 - q), math.log(q) + (2 * z - 1) / (2 * noise**2))  # of the two densities at z
    terms = order * ratio - z**2 / (2 * noise**2)
    return (logsumexp(terms) + math.log((z[1] - z[0]) / (noise * math.sqrt(2 * math.pi)))) / (order - 1)


@pytest.mark.parametrize("noise,epochs,published", PUBLISHED)
def test_published_figures(noise, epochs, published):
    q, steps = 256 / 60000, epochs * 60000 // 256
    first = min(renyi(a, q, noise) * steps + math.log(1e5) / (a - 1) for a in ORDERS)
    assert first == pytest.approx(published, abs=0.02)
    rdp, prv = (compute_epsilon(name, noise, q, steps, 1e-5) for name in ("rdp", "prv"))
    assert prv < rdp < published, "the better conversion, and the tighter accountant"
    assert prv > 0.6 * published


@pytest.mark.parametrize("q,noise", [(0.1, 0.8), (0.5, 1.3), (0.01, 0.5)])
def test_one_step_is_the_closed_form(q, noise):
    """δ(ε) of one sampled Gaussian sum, taken from the two densities: rows removed and rows added."""

    def delta(e):
        grid = np.linspace(-12 * noise, 1 + 12 * noise, 40001)
        base = stats.norm.pdf(grid, 0, noise)
        mixed = (1 - q) * base + q * stats.norm.pdf(grid, 1, noise)
        step = grid[1] - grid[0]
        sides = (np.maximum(mixed - math.exp(e) * base, 0), np.maximum(base - math.exp(e) * mixed, 0))
        return max(side.sum() * step for side in sides)

    exact = brentq(lambda e: delta(e) - 1e-5, 0, 60)
    assert exact <= compute_epsilon("prv", noise, q, 1, 1e-5) <= exact + 0.02
    assert exact <= compute_epsilon("rdp", noise, q, 1, 1e-5) <= 4 * exact + 1


@pytest.mark.parametrize("noise,steps", [(1.0, 1), (2.0, 10), (20.0, 1000), (0.5, 3)])
def test_without_sampling_it_is_the_gaussian_mechanism(noise, steps):
    """Balle and Wang 2018, theorem 8: the exact δ of a Gaussian of sensitivity μ."""
    mu = math.sqrt(steps) / noise
    found = compute_epsilon("prv", noise, 1.0, steps, 1e-5)
    exact = stats.norm.cdf(mu / 2 - found / mu) - math.exp(found) * stats.norm.cdf(-mu / 2 - found / mu)
    assert exact == pytest.approx(1e-5, rel=1e-5)
    assert found <= compute_epsilon("rdp", noise, 1.0, steps, 1e-5)
    assert found == pytest.approx(compute_epsilon("prv", noise, 1 - 1e-9, steps, 1e-5), abs=0.02), (
        "the limit of sampling"
    )


def test_no_noise_is_no_guarantee_and_nothing_spent_is_nothing():
    assert compute_epsilon("prv", 0.0, 0.1, 5, 1e-5) == math.inf
    assert compute_epsilon("prv", 1.0, 0.1, 0, 1e-5) == 0.0
    assert compute_epsilon("prv", 1e5, 1.0, 1, 1e-5) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("accountant,rate,steps", [("prv", 0.05, 200), ("rdp", 0.05, 200), ("prv", 1.0, 20), ("rdp", 1.0, 20)])  # fmt: skip
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_the_noise_that_is_found_keeps_to_the_target_and_hardly_more(accountant, rate, steps, target):
    noise = find_noise_multiplier(accountant, target, rate, steps, 1e-5)
    assert compute_epsilon(accountant, noise, rate, steps, 1e-5) <= target
    assert compute_epsilon(accountant, noise / 1.01, rate, steps, 1e-5) > target


def test_a_target_that_no_noise_reaches_is_refused():
    with pytest.raises(ValueError, match=r"target_epsilon is 1e-12; no noise reaches it"):
        find_noise_multiplier("rdp", 1e-12, 1.0, 10, 1e-5)
