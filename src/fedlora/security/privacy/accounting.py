"""ε of Gaussian noise, composed over steps: Opacus' accountants, and nothing of our own but the search for the noise.

Sampling counts only where it is Poisson's: each client or row by itself with the same probability. Without sampling
(rate 1) ``prv`` is the exact figure of composed Gaussians.
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
CLOSE = 1e-3  # how near the noise that is found lies to the least one, relative
LEAST, MOST = 1e-2, 1e6  # noise multipliers between which it is looked for


def check() -> None:
    """``ValueError`` where the accountants are not installed."""
    if find_spec("opacus") is None:
        raise ValueError("privacy needs Opacus' accountants, which are not installed: pip install 'fedlora[dp]'.")


@lru_cache(maxsize=4096)
def epsilon(accountant: str, noise: float, rate: float, steps: int, delta: float) -> float:
    """ε at δ of ``steps`` sums with noise of ``noise`` times the sensitivity, each over a sample of rate ``rate``.

    Adjacency is adding or removing one unit. An upper bound; ``prv`` is at most 0.01 above the exact figure.
    """
    if steps == 0 or rate == 0:
        return 0.0
    if noise == 0:
        return math.inf
    if accountant == "rdp":
        return _renyi(noise, rate, steps, delta)
    if rate >= 1:
        return _gaussian(noise, steps, delta)
    book = _account()()
    book.history = [(noise, rate, steps)]
    return float(book.get_epsilon(delta=delta))


def largest(accountant: str, noise: float, pairs: Iterable[tuple[float, int]], delta: float) -> float:
    """The largest ε of several pairs of rate and steps; 0 of none.

    Where ``prv`` would need seconds for each, those are not taken whose Rényi bound, which is above their own exact ε,
    is below what another pair comes to.
    """
    bounds = {pair: epsilon("rdp", noise, *pair, delta) for pair in pairs}
    if accountant == "rdp" or not bounds:
        return max(bounds.values(), default=0.0)
    found = 0.0
    for pair, bound in sorted(bounds.items(), key=lambda one: one[1], reverse=True):
        if bound + NEAR >= found:
            found = max(found, epsilon(accountant, noise, *pair, delta))
    return found


@lru_cache(maxsize=256)
def _divergences(noise: float, rate: float) -> "np.ndarray":
    """Rényi divergences of one sampled sum at Opacus' orders: composition multiplies them, so they are taken once."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis import rdp

    return rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS)


def _renyi(noise: float, rate: float, steps: int, delta: float) -> float:
    """What ``RDPAccountant.get_epsilon`` gives, to the bit."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis import rdp

    with warnings.catch_warnings():
        # "Optimal order is the largest alpha": the bound holds, and could be tighter.
        warnings.filterwarnings("ignore", "Optimal order", UserWarning)
        several = _divergences(noise, rate) * steps
        found, _ = rdp.get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=several, delta=delta)
    return float(found)


@lru_cache(maxsize=1)
def _account() -> Any:
    """Opacus' ``prv`` for one mechanism, with the divergences that its domain goes by taken once."""
    import numpy as np
    from opacus.accountants.analysis.prv import Domain
    from opacus.accountants.prv import PRVAccountant

    class Once(PRVAccountant):  # type: ignore[misc]
        def _get_domain(self, prvs: Any, num_self_compositions: Any, eps_error: float, delta_error: float) -> Any:
            """Remark 5.6 of Gopi et al., as Opacus has it."""
            (prv,), (steps,) = prvs, num_self_compositions
            z, q = prv.noise_multiplier, prv.sample_rate
            most = max(_renyi(z, q, steps, delta_error / 4), _renyi(z, q, 1, delta_error / (8 * steps)))
            far, mesh = max(most, eps_error) + 3, eps_error / np.sqrt(steps * np.log(12 / delta_error) / 2)
            return Domain.create_aligned(-far, far, mesh)

    return Once


def _gaussian(noise: float, steps: int, delta: float) -> float:
    """Of composed Gaussian sums without sampling: one Gaussian of ``μ = √steps / noise``."""
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
def noise_for(accountant: str, target: float, rate: float, steps: int, delta: float) -> float:
    """The least noise multiplier with which ε stays at or below ``target``, within a thousandth.

    ``ValueError`` where no noise does that.
    """
    if steps == 0:
        return LEAST
    first = _search("rdp", target, rate, steps, delta, 1.0)
    return first if accountant == "rdp" else _search(accountant, target, rate, steps, delta, first)


def _search(accountant: str, target: float, rate: float, steps: int, delta: float, guess: float) -> float:
    """Bisection from a guess: the upper end always keeps to the target."""

    def fits(noise: float) -> bool:
        return epsilon(accountant, noise, rate, steps, delta) <= target

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
