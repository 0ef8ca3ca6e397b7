"""A guarantee of privacy in words: for tables, plans and model cards."""

from collections.abc import Mapping
from typing import Any

NONE = "none: no noise was added"
OWN = "each party knows its own (see its log)"


def lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run's ``privacy`` says, a name and a figure each."""
    epsilon = found["epsilon"]
    if epsilon is None:
        said = NONE if found["noise_multiplier"] == 0 else OWN
    else:
        said = f"ε = {epsilon:.3g} at δ = {found['delta']:.2g} ({found['accountant']})"
    noise = "" if found["noise_multiplier"] is None else f"{found['noise_multiplier']:.4g} x "
    rows = [("privacy", said), ("of", found["covers"]), ("clipped to, noise", f"{found['clip']:g}, {noise}that")]
    if found.get("clients") and epsilon is not None:
        least = min(x for x in found["clients"].values() if x is not None)
        rows.append(("ε of the clients", f"{least:.3g} to {epsilon:.3g}"))
    if not found["secret"]:
        rows.append(("noise drawn from", "config.seed: who knows it can take the noise away (privacy.secret)"))
    return rows
