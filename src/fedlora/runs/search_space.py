"""What a sweep tries: settings with several values, and their combinations, as many for every method."""

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from fedlora.schema import ConfigError, apply_overrides
from fedlora.seeds import derive_seed

Values = dict[str, Any]  # dotted key -> the value that a trial gives it
OWN = "compare."  # begins a key that is one method's alone: compare.METHOD.KEY
TAKEN = {"seed": "--seeds", "method.name": "--methods", "task.test_split": "--holdout"}  # said by options instead
RANGE = re.compile(r"([-+.\deE]+):([-+.\deE]+)(:log)?")
ATTEMPTS = 100  # draws for one trial that differs from those before it


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, whole ones where both ends are; ``log`` draws their logarithm evenly."""

    low: float
    high: float
    log: bool = False

    def draw(self, draws: random.Random) -> float:
        """One number; four digits are enough for a setting."""
        ends = [math.log(x) if self.log else x for x in (self.low, self.high)]
        x = draws.uniform(*ends)
        x = math.exp(x) if self.log else x
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(self.high, max(self.low, round(x)))
        return float(f"{x:.4g}")


@dataclass(frozen=True)
class Grid:
    """The swept settings: key -> its values, or the range that they are drawn from."""

    settings: Mapping[str, Sequence[Any] | Range]
    fixed: list[str] = field(default_factory=list)  # overrides with one value, for all trials

    @classmethod
    def read(cls, overrides: Sequence[str]) -> "Grid":
        """From ``key=a,b,c`` and ``key=low:high[:log]``; what has one value is fixed.

        ``ConfigError`` where nothing is to be swept, or a key is what an option says.
        """
        settings: dict[str, Sequence[Any] | Range] = {}
        fixed = []
        for item in overrides:
            key, _, text = (part.strip() for part in item.partition("="))
            found = _range(key, text) or alternatives(key, text)
            if isinstance(found, list) and len(found) == 1:
                fixed.append(item)
            else:
                settings[key] = found
        for key in settings:
            if _short(key) in TAKEN:
                raise ConfigError(f"{key} cannot be swept; set it with {TAKEN[_short(key)]}.")
        if not settings:
            raise ConfigError(
                "the sweep has no values to try; write them with commas: -o training.learning_rate=1e-4,1e-3."
            )
        return cls(settings, fixed)

    def points(self, label: str, trials: int | None, seed: int) -> list[Values]:
        """A method's trials: all combinations, or so many draws of the seed, the same for every method."""
        own = {_short(key): values for key, values in self.settings.items() if _of(key) in (None, label)}
        ranges = [key for key, values in own.items() if isinstance(values, Range)]
        if trials is not None:
            return _drawn(own, trials, seed)
        if ranges:
            raise ConfigError(f"{ranges[0]} is a range; say how many values to draw from it, e.g. --trials 8.")
        return [dict(zip(own, point)) for point in product(*own.values())]  # type: ignore[arg-type]

    def for_all(self, labels: Sequence[str], trials: int | None, seed: int) -> dict[str, list[Values]]:
        """Every method's trials. ``ConfigError`` where one would get more of them than another."""
        strange = next((_of(key) for key in self.settings if _of(key) not in (None, *labels)), None)
        if strange is not None:
            raise ConfigError(
                f"the sweep sets values of {strange!r}, which is not among its methods; add it to --methods."
            )
        found = {label: self.points(label, trials, seed) for label in labels}
        most, least = (pick(found, key=lambda label: len(found[label])) for pick in (max, min))
        if len(found[most]) != len(found[least]):
            raise ConfigError(
                f"{most!r} would get {len(found[most])} trials and {least!r} {len(found[least])}; "
                "give every method as many values, or the comparison is not fair."
            )
        return found

    def edges(self, label: str, chosen: Values) -> list[str]:
        """The keys whose chosen value is the smallest or largest that was tried; draws have no edge."""
        own = {_short(key): values for key, values in self.settings.items() if _of(key) in (None, label)}
        return [key for key, value in chosen.items() if _outermost(value, own[key])]


def alternatives(key: str, text: str) -> list[Any]:
    """The values between commas; commas inside brackets and quotes part nothing. ``ConfigError`` for an empty one."""
    parts = _parted(text)
    if not all(part.strip() for part in parts):
        raise ConfigError(f"the values of {key} are {text!r}; one of them is empty.")
    found = [apply_overrides({}, [f"x={part.strip()}"])["x"] for part in parts]
    if len({repr(value) for value in found}) < len(found):
        raise ConfigError(f"the values of {key} are {text!r}; one of them stands there twice.")
    return found


def _parted(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter in "\"'" and quote in ("", letter):
            quote = "" if quote else letter
        depth += 0 if quote else (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _range(key: str, text: str) -> Range | None:
    found = RANGE.fullmatch(text)
    if found is None:
        return None
    low, high = (apply_overrides({}, [f"x={end}"])["x"] for end in found.groups()[:2])
    log = bool(found[3])
    if not all(isinstance(end, int | float) for end in (low, high)) or not low < high or (log and low <= 0):
        raise ConfigError(f"{key} is {text!r}; a range goes from a smaller to a larger number, with :log from above 0.")
    return Range(low, high, log)


def _drawn(own: Mapping[str, Sequence[Any] | Range], trials: int, seed: int) -> list[Values]:
    draws, found = random.Random(derive_seed(seed, "sweep")), list[Values]()
    for _ in range(trials):
        for _ in range(ATTEMPTS):
            point = {k: v.draw(draws) if isinstance(v, Range) else draws.choice(list(v)) for k, v in own.items()}
            if point not in found:
                break
        else:
            raise ConfigError(
                f"the sweep has fewer than {trials} different trials; lower --trials, or give more values."
            )
        found.append(point)
    return found


def _outermost(value: Any, values: Sequence[Any] | Range) -> bool:
    numeric = not isinstance(values, Range) and all(type(v) in (int, float) for v in values)
    return numeric and value in (min(values), max(values))  # type: ignore[type-var, arg-type]


def _of(key: str) -> str | None:
    """The method that a key is for, where it is one method's alone."""
    return key.split(".")[1] if key.startswith(OWN) and key.count(".") > 1 else None


def _short(key: str) -> str:
    return key.split(".", 2)[2] if _of(key) is not None else key
