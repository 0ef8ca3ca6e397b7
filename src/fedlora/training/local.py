"""Local training of one client in one round."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.rounds import Rules
from fedlora.seeds import derive_seed
from fedlora.tasks._base import Batch, Examples, Shard, Task, move_batch, pin_batch
from fedlora.training.frozen import Frozen
from fedlora.training.model import Model
from fedlora.training.prefetch import prefetch
from fedlora.training.train_mode import set_train_mode
from fedlora.types import Tree, Turn

ADVICE = "lower training.learning_rate, or set training.max_grad_norm"  # if training diverges


@dataclass(frozen=True)
class Training:
    """The ``[training]`` table: one client's training in a round."""

    local_steps: int | None = None  # optimizer steps a round; 10 if local_epochs is not set either
    local_epochs: int | None = None  # or passes over the client's rows
    batch_size: int = 16
    # Tokens that are computed at once, at most, padding included, if rows have tokens: a larger batch is computed in
    # parts, whose gradients add up to the batch's. A longer row is a part of its own. None: every batch at once.
    max_tokens: int | None = None
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9  # sgd only
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # over the whole run, not one round
    warmup: float = 0.0  # share of the run with a rising learning rate
    max_grad_norm: float | None = 1.0
    accumulation_steps: int = 1  # batches in an optimizer step
    precision: Literal["auto", "float32", "bf16-autocast", "bf16"] = "auto"
    keep_optimizer: bool = False  # each client keeps its moments between rounds
    gradient_checkpointing: bool = False
    group_by_length: bool = True  # put rows of similar length into one batch

    def __post_init__(self) -> None:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("training sets both local_steps and local_epochs; keep one of them.")
        for key in ("local_steps", "local_epochs", "batch_size", "max_tokens", "accumulation_steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"training.{key} is {value}; it must be at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"training.learning_rate is {self.learning_rate}; it must be a positive number.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"training.warmup is {self.warmup}; it is a share of the run, from 0 to below 1.")

    def steps(self, rows: int) -> int:
        """Return the number of optimizer steps of a turn on this number of rows."""
        if self.local_epochs is None:
            return self.local_steps or 10
        return max(1, math.ceil(rows * self.local_epochs / (self.batch_size * self.accumulation_steps)))

    def rate(self, progress: float) -> float:
        """Return the learning rate at ``progress`` (0 to 1) of the run."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        rest = (progress - self.warmup) / (1 - self.warmup)
        decay = {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}[self.schedule]
        return self.learning_rate * decay

    def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return a new optimizer for the leaves of one turn."""
        options: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, momentum=self.momentum, **options)
        return (torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam)(parameters, fused=True, **options)


def sample_batches(examples: Examples, rows: Tensor, training: Training, seed: int) -> Iterator[Tensor]:
    """Yield the row numbers of batches without end: shuffled passes over ``rows``, each row once a pass."""
    draws = torch.Generator().manual_seed(seed)
    size = training.batch_size
    while True:
        order = rows[torch.randperm(len(rows), generator=draws)]
        if training.group_by_length:
            order = _group_by_length(order, examples.lengths, size, draws)
        yield from order.split(size)


def _group_by_length(order: Tensor, lengths: Tensor, size: int, draws: torch.Generator) -> Tensor:
    """Sort within groups of 8 batches by length, then shuffle the full batches."""
    groups = [group[lengths[group].argsort(stable=True)] for group in order.split(size * 8)]
    batches = [batch for group in groups for batch in group.split(size)]
    full = [batch for batch in batches if len(batch) == size]
    shuffled = [full[i] for i in torch.randperm(len(full), generator=draws).tolist()]
    return torch.cat([*shuffled, *(batch for batch in batches if len(batch) < size)])


MicroBatches = list[tuple[Any, float]]  # a batch in parts, each with its share of the batch's loss; they add up to 1
OptimizerState = dict[tuple[str, str], dict[str, Any]]  # an optimizer's moments, leaf by leaf


@dataclass
class LocalTrainer:
    """Trains one client in one round, on the model of this process; implements ``rounds.Trainer``."""

    model: Model
    task: Task
    examples: Examples
    shard: Shard
    training: Training
    turn: Turn
    rounds: int
    state: OptimizerState | None = None  # the client's kept moments; ``fit`` updates them
    step_done: Callable[[], None] = lambda: None
    loss: float = math.nan  # mean over the turn's batches; set by ``fit``

    def batch(self, rows: Tensor, draws: torch.Generator | None = None) -> Batch:
        """Return a batch of rows with this client's labels, on the device; augmented if ``draws`` is given."""
        moved: Batch = self._move(self._collate(rows, draws))
        return moved

    def split(self, rows: Tensor) -> list[Tensor]:
        """Return the rows of a batch in parts within ``training.max_tokens``."""
        limit = self.training.max_tokens
        return [rows] if limit is None else self.task.split_by_tokens(self.examples, rows, limit)

    def _micro_batches(self, rows: Tensor, draws: torch.Generator | None = None) -> MicroBatches:
        """Return a batch of rows, on the CPU, in parts within ``training.max_tokens``."""
        batches = [self._collate(part, draws) for part in self.split(rows)]
        if len(batches) == 1:
            return [(batches[0], 1.0)]
        terms = [self.task.loss_terms(batch) for batch in batches]
        return [(batch, count / sum(terms)) for batch, count in zip(batches, terms)]

    def _collate(self, rows: Tensor, draws: torch.Generator | None) -> Batch:
        task, examples = self.task, self.examples
        batch = task.collate(examples, rows) if draws is None else task.collate_for_training(examples, rows, draws)
        if self.shard.relabel is not None:
            batch = task.relabel(batch, self.shard.relabel)
        return pin_batch(batch) if self.model.device.type == "cuda" else batch

    def _move(self, batch: Any) -> Any:
        return move_batch(batch, self.model.device, non_blocking=True)

    def gradient(self, start: Tree) -> Tree:
        """Return the gradient at ``start`` on one batch, without dropout."""
        self.model.load(start)
        self.model.network.eval()
        seed = derive_seed(self.turn.seed, "gradient")
        rows = next(sample_batches(self.examples, self.shard.train, self.training, seed))
        total: Tree = {}
        for batch, share in self._micro_batches(rows):
            moved = self._move(batch)
            part = self.model.gradient(lambda network, x=moved, share=share: self.task.loss(network, x) * share)
            total = _add(total, part) if total else part
        return total

    def fit(self, start: Tree, trained: Mapping[str, frozenset[str]], rules: Rules) -> Tree:
        """Train the leaves of ``trained`` from ``start``, and return the tree; other leaves are the same objects."""
        self.model.load(start)
        parameters = self.model.select(trained)
        if not parameters:
            return start
        optimizer = self.training.build(list(parameters.values()))
        if self.training.keep_optimizer and self.state:
            for key in (key for key in parameters if key in self.state):
                # Copied, because the optimizer works in place and the turn may be interrupted.
                moments = {name: x.clone() if torch.is_tensor(x) else x for name, x in self.state[key].items()}
                optimizer.state[parameters[key]] = moments
        # Dropout draws from the global generator.
        with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(self.turn.seed)
            set_train_mode(self.model.network)
            frozen = Frozen.read(self.model.network, self.model.parts) if self.task.is_own_code else None
            self._run(optimizer, parameters, rules)
            if frozen is not None:
                frozen.check(self.model.network)
        if self.training.keep_optimizer:
            self.state = (self.state or {}) | {key: optimizer.state[x] for key, x in parameters.items()}
        return replace_leaves(start, self.model.read(), trained)

    def _run(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[tuple[str, str], Tensor], rules: Rules
    ) -> None:
        steps, losses = self.training.steps(len(self.shard.train)), [torch.zeros(0, device=self.model.device)]
        for step, step_losses in zip(range(steps), self._gradients(parameters, rules)):
            losses += step_losses
            for group in optimizer.param_groups:
                group["lr"] = self.training.rate((self.turn.round + step / steps) / self.rounds)
            if self.training.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(list(parameters.values()), self.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.step_done()
        self.loss = self._mean_loss(torch.cat(losses))
        check_divergence(self.loss, parameters.values(), self.turn)

    def _mean_loss(self, losses: Tensor) -> float:
        """Return the loss of a turn from those of its batches."""
        return float(losses.mean())

    def _gradients(self, parameters: Mapping[tuple[str, str], Tensor], rules: Rules) -> Iterator[list[Tensor]]:
        """Set the gradients of one step after another, and yield each step's losses, of batches or of rows."""
        parts = self.training.accumulation_steps
        stream = sample_batches(self.examples, self.shard.train, self.training, derive_seed(self.turn.seed, "batches"))
        draws = torch.Generator().manual_seed(derive_seed(self.turn.seed, "augmentation"))
        count = self.training.steps(len(self.shard.train)) * parts
        batches: Iterator[MicroBatches] = (self._micro_batches(rows, draws) for rows in islice(stream, count))
        # The caller's own code stays in one thread: it may draw from the global generator.
        if self.model.device.type == "cuda" and not self.task.is_own_code:
            batches = prefetch(batches)
        for _ in range(count // parts):
            yield [self._backward(next(batches), parts, rules) for _ in range(parts)]

    def _backward(self, batch: MicroBatches, parts: int, rules: Rules) -> Tensor:
        """Add the gradient of a batch's loss and of the penalty, over ``parts``; return the loss (1,)."""
        losses = []
        for number, (micro_batch, share) in enumerate(batch):
            moved = self._move(micro_batch)
            with self.model.running():
                loss = self.task.loss(self.model.network, moved) * share
            penalty = self._penalty(rules) if number == 0 else 0.0
            ((loss + penalty) / parts).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum(0, keepdim=True)

    def _penalty(self, rules: Rules) -> Tensor | float:
        layers = self.model.layers()
        return sum(rule.penalty(layers[path]) for path, rule in rules.items())


def _add(tree: Tree, other: Tree) -> Tree:
    return {path: {leaf: x + other[path][leaf] for leaf, x in layer.items()} for path, layer in tree.items()}


def replace_leaves(start: Tree, end: Tree, trained: Mapping[str, frozenset[str]]) -> Tree:
    """Return the tree after training: the leaves of ``trained`` from ``end``, and the others from ``start``."""
    return {
        path: {leaf: end[path][leaf] if leaf in trained[path] else x for leaf, x in layer.items()}
        for path, layer in start.items()
    }


def check_divergence(loss: float, parameters: Iterable[Tensor], turn: Turn, advice: str = ADVICE) -> None:
    """Raise ``FloatingPointError`` if training ended with values that are not finite.

    The mean loss does not include the last step.
    """
    is_finite = torch.stack([parameter.isfinite().all() for parameter in parameters]).all()
    if not math.isfinite(loss) or not bool(is_finite):
        problem = "weights are no longer finite" if math.isfinite(loss) else f"loss is {loss}"
        raise FloatingPointError(f"client {turn.client}'s {problem} in round {turn.round + 1}; {advice}.")
