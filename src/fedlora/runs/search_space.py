"""The search space of a sweep: settings with several values, and their combinations or draws."""

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from fedlora.schema import ConfigError, apply_overrides
from fedlora.seeds import derive_seed

Values = dict[str, Any]  # dotted key -> the value in a trial
OPTIONS = {"seed": "--seeds", "method.name": "--methods", "task.test_split": "--holdout"}  # settings of options
RANGE = re.compile(r"([-+.\deE]+):([-+.\deE]+)(:log)?")
ATTEMPTS = 100  # draws for one new trial


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, integers if both ends are; ``log`` draws their logarithm uniformly."""

    low: float
    high: float
    log: bool = False

    def draw(self, draws: random.Random) -> float:
        """Draw a number, with four digits."""
        x = draws.uniform(*(math.log(end) if self.log else end for end in (self.low, self.high)))
        x = math.exp(x) if self.log else x
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(self.high, max(self.low, round(x)))
        return float(f"{x:.4g}")


@dataclass(frozen=True)
class Grid:
    """The swept settings: each key with its values, or with the range that they are drawn from."""

    settings: Mapping[str, Sequence[Any] | Range]
    fixed: Values = field(default_factory=dict)  # settings with one value

    @classmethod
    def read(cls, space: Sequence[str] | Mapping[str, Any]) -> "Grid":
        """Read ``key=a,b,c`` and ``key=low:high[:log]``, or a mapping from keys to lists of values, ranges or values.

        Raises ``ConfigError`` without a swept setting.
        """
        if isinstance(space, str):
            raise ConfigError(f"the values to try are {space!r}; write them as a list, e.g. [{space!r}], or a dict.")
        settings: dict[str, Sequence[Any] | Range] = {}
        fixed: Values = {}
        for key, values in space.items() if isinstance(space, Mapping) else map(_parse_item, space):
            swept = _read_values(key, values)
            if isinstance(swept, Range) or len(swept) > 1:
                settings[key] = swept
            else:
                fixed[key] = swept[0]
        for key in settings:
            if (option := OPTIONS.get(_split_key(key)[1])) is not None:
                raise ConfigError(f"{key} cannot be swept; set it with {option}.")
        if not settings:
            raise ConfigError(
                "the sweep has no values to try; write them with commas: -o training.learning_rate=1e-4,1e-3."
            )
        return cls(settings, fixed)

    def points_by_label(self, labels: Sequence[str], trials: int | None, seed: int) -> dict[str, list[Values]]:
        """Return each method's trials: all combinations, or ``trials`` draws. Raises ``ConfigError`` if unequal."""
        others = (label for key in self.settings if (label := _split_key(key)[0]) not in (None, *labels))
        if (other := next(others, None)) is not None:
            raise ConfigError(f"the sweep sets values of {other!r}, which is none of its methods; add it to --methods.")
        points = {label: self._points(label, trials, seed) for label in labels}
        most, least = (pick(points, key=lambda label: len(points[label])) for pick in (max, min))
        if len(points[most]) != len(points[least]):
            raise ConfigError(
                f"{most!r} would get {len(points[most])} trials and {least!r} {len(points[least])}; "
                "give every method as many values, or the comparison is not fair."
            )
        return points

    def _of_label(self, label: str) -> dict[str, Sequence[Any] | Range]:
        return {_split_key(k)[1]: values for k, values in self.settings.items() if _split_key(k)[0] in (None, label)}

    def _points(self, label: str, trials: int | None, seed: int) -> list[Values]:
        settings = self._of_label(label)
        if trials is not None:
            return _draw(settings, trials, seed)
        ranges = [key for key, values in settings.items() if isinstance(values, Range)]
        if ranges:
            raise ConfigError(f"{ranges[0]} is a range; say how many values to draw from it, e.g. --trials 8.")
        return [dict(zip(settings, point)) for point in product(*settings.values())]  # type: ignore[arg-type]

    def edges(self, label: str, chosen: Values) -> list[str]:
        """Return the keys whose chosen value is the smallest or largest of a list of numbers."""
        settings, edges = self._of_label(label), []
        for key, value in chosen.items():
            values = settings[key]
            if not isinstance(values, Range) and all(type(v) in (int, float) for v in values):
                edges += [key] * (value in (min(values), max(values)))
        return edges


def _parse_item(item: str) -> tuple[str, Any]:
    key, _, text = (part.strip() for part in item.partition("="))
    return key, _parse_range(key, text) or _parse_values(key, text)


def _read_values(key: str, values: Any) -> list[Any] | Range:
    """Return the values of a setting: a range, several values in any form but a text or a table, or a single one."""
    if isinstance(values, str):
        values = _parse_range(key, values) or values
    if isinstance(values, Range):
        return values
    several = values.tolist() if hasattr(values, "tolist") else values  # of numpy and torch
    listed = list(several) if isinstance(several, Iterable) and not isinstance(several, str | Mapping) else [several]
    if not listed:
        raise ConfigError(f"the values of {key} are {values!r}; name at least one.")
    if len({repr(value) for value in listed}) < len(listed):
        raise ConfigError(f"the values of {key} are {listed!r}; one of them stands there twice.")
    return listed


def _parse_values(key: str, text: str) -> list[Any]:
    """Parse values between commas. Commas inside brackets and quotes do not separate values."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter in "\"'" and quote in ("", letter):
            quote = "" if quote else letter
        depth += 0 if quote else (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    if not all(part.strip() for part in parts):
        raise ConfigError(f"the values of {key} are {text!r}; one of them is empty.")
    return [apply_overrides({}, [f"x={part.strip()}"])["x"] for part in parts]


def _parse_range(key: str, text: str) -> Range | None:
    match = RANGE.fullmatch(text)
    if match is None:
        return None
    low, high = (apply_overrides({}, [f"x={end}"])["x"] for end in match.groups()[:2])
    log = bool(match[3])
    if not all(isinstance(end, int | float) for end in (low, high)) or not low < high or (log and low <= 0):
        raise ConfigError(f"{key} is {text!r}; a range goes from a smaller to a larger number, with :log from above 0.")
    return Range(low, high, log)


def _draw(settings: Mapping[str, Sequence[Any] | Range], trials: int, seed: int) -> list[Values]:
    draws, points = random.Random(derive_seed(seed, "sweep")), list[Values]()
    for _ in range(trials):
        for _ in range(ATTEMPTS):
            point = {k: v.draw(draws) if isinstance(v, Range) else draws.choice(list(v)) for k, v in settings.items()}
            if point not in points:
                break
        else:
            raise ConfigError(
                f"the sweep has fewer than {trials} different trials; lower --trials, or give more values."
            )
        points.append(point)
    return points


def _split_key(key: str) -> tuple[str | None, str]:
    """Return the method and the setting of ``compare.METHOD.KEY``, or None and a key that is for all methods."""
    first, *rest = key.split(".", 2)
    return (rest[0], rest[1]) if first == "compare" and len(rest) == 2 else (None, key)
