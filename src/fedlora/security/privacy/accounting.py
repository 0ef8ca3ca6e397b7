"""ε of Gaussian noise composed over steps, by Opacus' accountants, and the search for the least noise.

Samples are Poisson samples: each client or row independently, with the same probability. Without sampling (rate 1),
``prv`` is the exact value of composed Gaussians.
Mironov, Talwar, Zhang. Rényi Differential Privacy of the Sampled Gaussian Mechanism. 2019 (rdp).
https://arxiv.org/abs/1908.10530
Gopi, Lee, Wutschitz. Numerical Composition of Differential Privacy. NeurIPS 2021 (prv). https://arxiv.org/abs/2106.02848
Dong, Roth, Su. Gaussian Differential Privacy. 2019 (prv at rate 1). https://arxiv.org/abs/1905.02383
"""

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

NEAR = 0.1  # ``prv`` is at most 0.02 above the exact ε, so less than this above any upper bound
CLOSE = 1e-3  # relative precision of the search for the least noise
LEAST, MOST = 1e-2, 1e6  # range of noise multipliers in the search


def require_opacus() -> None:
    """``ValueError`` if Opacus is not installed."""
    if find_spec("opacus") is None:
        raise ValueError("privacy needs Opacus' accountants, which are not installed: pip install 'fedlora[dp]'.")


@lru_cache(maxsize=4096)
def compute_epsilon(accountant: str, noise: float, rate: float, steps: int, delta: float) -> float:
    """Compute ε at δ of ``steps`` sums with noise of ``noise`` times the sensitivity, each over a sample of that rate.

    Adjacency is adding or removing one unit. An upper bound; ``prv`` is at most 0.01 above the exact value.
    """
    if steps == 0 or rate == 0:
        return 0.0
    if noise == 0:
        return math.inf
    if accountant == "rdp":
        return _renyi(noise, rate, steps, delta)
    if rate >= 1:
        return _gaussian(noise, steps, delta)
    prv = _prv_accountant()()
    prv.history = [(noise, rate, steps)]
    return float(prv.get_epsilon(delta=delta))


def largest_epsilon(accountant: str, noise: float, pairs: Iterable[tuple[float, int]], delta: float) -> float:
    """Compute the largest ε of several pairs of rate and steps; 0 without any.

    ``prv`` needs seconds for a pair. A pair with a Rényi bound below another's ε is skipped: the bound is above its own
    exact ε.
    """
    bounds = {pair: compute_epsilon("rdp", noise, *pair, delta) for pair in pairs}
    if accountant == "rdp" or not bounds:
        return max(bounds.values(), default=0.0)
    largest = 0.0
    for pair, bound in sorted(bounds.items(), key=lambda item: item[1], reverse=True):
        if bound + NEAR >= largest:
            largest = max(largest, compute_epsilon(accountant, noise, *pair, delta))
    return largest


@lru_cache(maxsize=256)
def _divergences(noise: float, rate: float) -> "np.ndarray":
    """Compute the Rényi divergences of one sampled sum at Opacus' orders; composition multiplies them."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis import rdp

    return rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS)


def _renyi(noise: float, rate: float, steps: int, delta: float) -> float:
    """Compute the same ε as ``RDPAccountant.get_epsilon``, to the bit."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis import rdp

    with warnings.catch_warnings():
        # "Optimal order is the largest alpha": the bound holds, and could be tighter.
        warnings.filterwarnings("ignore", "Optimal order", UserWarning)
        total = _divergences(noise, rate) * steps
        epsilon, _ = rdp.get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta)
    return float(epsilon)


@lru_cache(maxsize=1)
def _prv_accountant() -> Any:
    """Return Opacus' ``prv`` accountant for one mechanism, with cached divergences for its domain."""
    import numpy as np
    from opacus.accountants.analysis.prv import Domain
    from opacus.accountants.prv import PRVAccountant

    class Once(PRVAccountant):  # type: ignore[misc]
        def _get_domain(self, prvs: Any, num_self_compositions: Any, eps_error: float, delta_error: float) -> Any:
            """Remark 5.6 of Gopi et al., as in Opacus."""
            (prv,), (steps,) = prvs, num_self_compositions
            z, q = prv.noise_multiplier, prv.sample_rate
            most = max(_renyi(z, q, steps, delta_error / 4), _renyi(z, q, 1, delta_error / (8 * steps)))
            far, mesh = max(most, eps_error) + 3, eps_error / np.sqrt(steps * np.log(12 / delta_error) / 2)
            return Domain.create_aligned(-far, far, mesh)

    return Once


def _gaussian(noise: float, steps: int, delta: float) -> float:
    """Compute ε of composed Gaussian sums without sampling, which are one Gaussian with ``μ = √steps / noise``."""
    from opacus.accountants.analysis.gdp import delta_eps_mu

    mu = math.sqrt(steps) / noise
    low, high = 0.0, 1.0
    if delta_eps_mu(eps=0.0, mu=mu) <= delta:
        return 0.0
    while delta_eps_mu(eps=high, mu=mu) > delta:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_eps_mu(eps=middle, mu=mu) > delta else (low, middle)
    return high


@lru_cache(maxsize=1024)
def find_noise_multiplier(accountant: str, target: float, rate: float, steps: int, delta: float) -> float:
    """Find the least noise multiplier with ε at or below ``target``, within a thousandth.

    ``ValueError`` if no noise reaches it.
    """
    if steps == 0:
        return LEAST
    first = _search("rdp", target, rate, steps, delta, 1.0)
    return first if accountant == "rdp" else _search(accountant, target, rate, steps, delta, first)


def _search(accountant: str, target: float, rate: float, steps: int, delta: float, guess: float) -> float:
    """Bisect from a guess; the upper end always meets the target."""

    def fits(noise: float) -> bool:
        return compute_epsilon(accountant, noise, rate, steps, delta) <= target

    low = high = guess
    while not fits(high):
        low, high = high, high * 1.5
        if high > MOST:
            raise ValueError(f"privacy.target_epsilon is {target}; no noise reaches it at delta = {delta:g}, raise it.")
    while low == high or fits(low):
        low, high = low / 1.5, low
        if high < LEAST:
            return LEAST
    while high - low > CLOSE * high:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
