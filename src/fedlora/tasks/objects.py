"""Python objects as a task: the model, the data, the loss and the metrics are the caller's own."""

import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedlora.schema import ConfigError
from fedlora.tasks._base import Data, Examples, Task
from fedlora.tasks._code import Code
from fedlora.tasks.metrics.scores import PARTS, Scores, is_higher_better

NAME = re.compile(r"[A-Za-z0-9@][A-Za-z0-9_@-]*")  # of a metric


@dataclass(frozen=True)
class ObjectTask(Task):
    """The ``[task]`` table of a run on Python objects; the objects themselves are no part of it.

    ``fedlora.run(model=..., train=...)`` makes it. A run folder's ``config.toml`` names the objects, and
    resuming needs the same ones.
    """

    metric: str = "loss"
    higher: bool | None = None  # whether higher values of the metric are better; None: true unless its name is known
    train_rows: int | None = None
    test_rows: int | None = None
    objects: dict[str, str] = field(default_factory=dict)  # names of the caller's objects, for people
    _code: Any = field(default=None, repr=False, compare=False)
    auto: ClassVar[str] = "AutoModel"
    scores_rows: ClassVar[bool] = True
    is_own_code: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.metric) or self.metric in PARTS:
            raise ValueError(
                f"task.metric is {self.metric!r}; a metric's name has letters, digits, '_', '-' and '@', and is none "
                f"of {', '.join(sorted(PARTS))}."
            )
        if self.train_rows is not None or self.test_rows is not None:
            raise ValueError("task.train_rows and task.test_rows cannot be set for Python objects; give fewer rows.")

    @property
    def has_own_loop(self) -> bool:
        """Whether clients train in a loop of the caller, of which fedlora knows the start and the end."""
        return bool({"trainer", "session"} & self.objects.keys())

    @property
    def is_higher_better(self) -> bool:
        return is_higher_better(self.metric) if self.higher is None else self.higher

    @property
    def code(self) -> Code:
        """The caller's objects. Raises ``ConfigError`` if there are none, as for a configuration from a file."""
        if self._code is None:
            names = ", ".join(f"{key} = {name}" for key, name in self.objects.items())
            remedy = "pass them to fedlora.resume(folder, model=..., train=..., ...)"
            remedy = "pass it to fedlora.resume(folder, trainer=...)" if "trainer" in self.objects else remedy
            remedy = "use fedlora.Session.load(folder, model)" if "session" in self.objects else remedy
            what = "training loop of this run was" if self.has_own_loop else "model and data of this run were"
            kind = "the caller's own" if self.has_own_loop else "Python objects"
            raise ConfigError(f"the {what} {kind}{f' ({names})' if names else ''}; to go on, {remedy}.")
        return self._code

    @property
    def has_code(self) -> bool:
        """Whether the caller's objects are here."""
        return self._code is not None

    def with_code(self, code: Any) -> "ObjectTask":
        """Return the task with the caller's objects."""
        return replace(self, _code=code)

    @property
    def losses_obstacle(self) -> str | None:
        return None if self._code is None else self._code.losses_obstacle

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        return self.code.load(seed, client_column)

    def network(self, model: str, labels: int, seed: int) -> nn.Module:
        return self.code.network(seed)

    def known_labels(self) -> tuple[str, ...] | None:
        return None

    def collate(self, examples: Examples, rows: Tensor) -> Any:
        return self.code.collate(examples, rows)

    def relabel(self, batch: Any, order: Tensor) -> Any:
        return self.code.relabel(batch, order)

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        return self.code.loss(network, batch)

    def losses(self, network: nn.Module, batch: Any) -> Tensor:
        return self.code.losses(network, batch)

    def score_rows(
        self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device, batch_size: int,
        order: Tensor | None = None,
    ) -> Scores:  # fmt: skip
        return self.code.score_rows(network, examples, rows, device, batch_size, order)

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        raise AssertionError("own metrics score rows")

    def probe(self, network: nn.Module) -> Any:
        return self.code.probe()

    def preprocessor(self, model: str) -> None:
        return None
