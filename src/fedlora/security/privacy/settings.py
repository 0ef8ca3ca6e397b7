"""The ``[privacy]`` table."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.security.privacy import accounting

LARGEST_DELTA = 1e-5  # if none is set: 1/n of a small federation would be no protection
NO_NOISE = "none: no noise was added"
OWN_NOISE = "each party knows its own (see its log)"


@dataclass(frozen=True)
class Privacy:
    """The ``[privacy]`` table: the protected unit, clipping and noise. One of the two noise settings is needed."""

    level: Literal["none", "client", "example"] = "none"  # protected unit: all rows of a client, or a row
    clip: float = 1.0  # largest L2 norm of a client's change over its upload, or of a row's gradient
    noise_multiplier: float | None = None  # standard deviation of the noise on a sum, as a multiple of clip
    target_epsilon: float | None = None  # or the ε of the whole run, from which the noise is computed
    delta: float | None = None  # None: n^-1.1 of n clients or rows, and at most 1e-5
    accountant: Literal["prv", "rdp"] = "prv"
    noise_on: Literal["sum", "upload"] = "sum"  # client level: once a round, or on every upload before it leaves
    secret: bool = False  # draws from the operating system, so that no run can be repeated
    figures: bool = False  # keep figures that the guarantee does not cover: losses, errors of the aggregation, cohorts

    def __post_init__(self):
        if not self.on:
            if self.noise_multiplier is not None or self.target_epsilon is not None:
                raise ValueError("privacy.level is 'none', but noise is set; set level to 'client' or 'example'.")
            return
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError(f"privacy.level is {self.level!r}; set one of privacy.noise_multiplier, target_epsilon.")
        for key in ("clip", "target_epsilon"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"privacy.{key} is {value}; it must be a positive number.")
        if self.noise_multiplier is not None and not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"privacy.noise_multiplier is {self.noise_multiplier}; it cannot be negative.")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"privacy.delta is {self.delta}; it lies between 0 and 1.")

    @property
    def on(self) -> bool:
        """Whether anything is protected."""
        return self.level != "none"

    @property
    def by_client(self) -> bool:
        """Whether a client's whole contribution is protected."""
        return self.level == "client"

    @property
    def sums_clients(self) -> bool:
        """Whether noise is added to a round's sum; then no client may change another's part of it."""
        return self.by_client and self.noise_on == "sum"

    @property
    def by_example(self) -> bool:
        """Whether single rows are protected."""
        return self.level == "example"

    @property
    def hides_figures(self) -> bool:
        """Whether records leave out figures that the guarantee does not cover."""
        return self.on and not self.figures

    def delta_of(self, n: int) -> float:
        """Return δ for ``n`` clients or rows. ``ValueError`` if publishing one of them would satisfy it."""
        delta = min(LARGEST_DELTA, n**-1.1) if self.delta is None else self.delta
        if n > 1 and delta >= 1 / n:
            unit = "clients" if self.by_client else "rows"
            raise ValueError(
                f"privacy.delta is {delta:g}, but there are {n} {unit}: publishing one of them outright would satisfy "
                f"it; set a delta well below 1/{n}."
            )
        return delta

    def noise(self, rate: float, steps: int, delta: float) -> float:
        """Return the least noise multiplier that meets the target after ``steps``."""
        assert self.target_epsilon is not None, "one of the two is set"
        return accounting.find_noise_multiplier(self.accountant, self.target_epsilon, rate, steps, delta)

    def epsilon(self, noise: float, rate: float, steps: int, delta: float) -> float:
        """Return ε after ``steps`` steps; infinite without noise."""
        return accounting.compute_epsilon(self.accountant, noise, rate, steps, delta)

    def largest_epsilon(self, noise: float, pairs: Iterable[tuple[float, int]], delta: float) -> float:
        """Return the largest ε of several pairs of rate and steps."""
        return accounting.largest_epsilon(self.accountant, noise, pairs, delta)

    @staticmethod
    def describe(guarantee: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Describe the ``privacy`` entry of a run's summary, for tables, plans and model cards: names and texts."""
        epsilon = guarantee["epsilon"]
        if epsilon is None:
            text = NO_NOISE if guarantee["noise_multiplier"] == 0 else OWN_NOISE
        else:
            text = f"ε = {epsilon:.3g} at δ = {guarantee['delta']:.2g} ({guarantee['accountant']})"
        noise = "" if guarantee["noise_multiplier"] is None else f"{guarantee['noise_multiplier']:.4g} x "
        rows = [
            ("privacy", text),
            ("of", guarantee["covers"]),
            ("clipped to, noise", f"{guarantee['clip']:g}, {noise}that"),
        ]
        if guarantee.get("clients") and epsilon is not None:
            least = min(x for x in guarantee["clients"].values() if x is not None)
            rows.append(("ε of the clients", f"{least:.3g} to {epsilon:.3g}"))
        if not guarantee["secret"]:
            rows.append(("noise drawn from", "config.seed: who knows it can take the noise away (privacy.secret)"))
        return rows
