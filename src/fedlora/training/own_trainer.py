"""A client's turn with the caller's own trainer: anything with ``.model`` and ``.train()``."""

import numbers
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.methods._base import pick
from fedlora.rounds import Rules
from fedlora.seeds import derive_seed
from fedlora.training.frozen import Frozen
from fedlora.training.local import OptimizerState, check_divergence, replace_leaves
from fedlora.training.model import Model
from fedlora.training.ranks import average, barrier, check_trained_together, synchronize
from fedlora.training.sharding import check_shapes, check_wrappers
from fedlora.training.train_mode import set_train_mode
from fedlora.types import Tree, Turn

ADVICE = "lower its learning rate, or clip its gradients"
LOSSES = ("training_loss", "train_loss", "loss")  # names under which ``train()`` may return its mean loss


@dataclass
class OwnTrainer:
    """One client's turn; implements ``rounds.Trainer``.

    Every random generator is set from the turn's seed before ``train()``, so the turn depends on the run, the round and
    the client only. A frozen leaf that training changed is an error; training that changes nothing is reported.
    """

    model: Model
    trainer: Any
    turn: Turn
    rounds: int
    keep_optimizer: bool = False
    state: OptimizerState | None = None  # the client's kept moments; ``fit`` updates them
    step_done: Callable[[], None] = lambda: None
    loss: float | None = None  # mean over the turn, if ``train()`` returns it

    def gradient(self, start: Tree) -> Tree:
        """Raise ``ValueError``: the loss is inside the caller's loop."""
        raise ValueError(
            "the method asks for a gradient before training, which a trainer of your own does not give; choose another "
            'setting of the method (such as method.score = "random"), or use a Trainer of transformers.'
        )

    def fit(self, start: Tree, trained: Mapping[str, frozenset[str]], rules: Rules) -> Tree:
        """Train the leaves of ``trained`` from ``start``, and return the tree; other leaves are the same objects."""
        barrier()
        check_wrappers(self.model.network)
        self.model.load(start)
        parameters = self.model.select(trained)
        if not parameters:
            return start
        with set_seeds(self.turn.seed):
            set_train_mode(self.model.network)
            frozen = Frozen.read(self.model.network, self.model.parts)
            self.loss = average(self.train(parameters))
        end = read_end(self.model, start, trained, self.loss, self.turn)
        frozen.check(self.model.network)
        check_turn(self.model, start, end, trained, rules, self.turn)
        return replace_leaves(start, end, trained)

    def train(self, parameters: Mapping[tuple[str, str], Tensor]) -> float | None:
        """Call the trainer, and return its mean loss, or None if it does not return one."""
        return read_loss(self.trainer.train())


def read_end(model: Model, start: Tree, trained: Mapping[str, frozenset[str]], loss: float | None, turn: Turn) -> Tree:
    """Return the leaves after training, whole, and those of ``trained`` as the first rank has them.

    Raises ``FloatingPointError`` if a turn has ended with a loss or values that are not finite.
    """
    check_wrappers(model.network)
    check_shapes(start, {path: part.leaves for path, part in model.parts.items()})
    end = model.read()
    changed = {path: pick(end[path], leaves) for path, leaves in trained.items()}
    check_trained_together(start, changed)
    synchronize(changed)
    check_divergence(loss or 0.0, (x for layer in changed.values() for x in layer.values()), turn, ADVICE)
    return end


def read_loss(result: Any) -> float | None:
    """Return the loss in the result of ``train()``: a number, or an object or table with one; None if there is none."""
    if isinstance(result, numbers.Real) and not isinstance(result, bool):
        return float(result)
    if isinstance(result, Tensor) and result.numel() == 1:
        return float(result.detach())
    for name in LOSSES:
        value = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
        if isinstance(value, numbers.Real | Tensor):
            return float(value.detach() if isinstance(value, Tensor) else value)
    return None


def check_turn(
    model: Model, start: Tree, end: Tree, trained: Mapping[str, frozenset[str]], rules: Rules, turn: Turn
) -> None:
    """Check that training changed only the leaves of ``trained``, and warn if it changed no factor of an adapter."""
    changed, adapted = False, [path for path in start if trained[path] and model.parts[path].base is not None]
    for path, layer in start.items():
        for leaf in model.parts[path].adapter.trainable & set(layer):
            before = layer[leaf].to(model.parts[path].leaves[leaf].dtype).float().to(end[path][leaf])
            same = torch.equal(end[path][leaf], before)
            changed |= not same and leaf in trained[path] and (path in adapted or not adapted)
            if not same and leaf not in trained[path]:
                raise ValueError(
                    f"{leaf} of {path!r} is not where client {turn.client}'s turn began, though {rules[path].title} "
                    "freezes it in this round; build the optimizer in the turn, of the parameters that require "
                    "gradients, and do not load a state dict."
                )
    if not changed:
        warnings.warn(
            f"client {turn.client}'s training changed {'no adapter' if adapted else 'nothing'} in round "
            f"{turn.round + 1}; its optimizer may hold other parameters than those of this turn (build it in train(), "
            "of the parameters that require gradients), or its learning rate is 0.",
            stacklevel=2,
        )


@contextmanager
def set_seeds(seed: int) -> Iterator[None]:
    """Set the random generators of Python, numpy and torch inside the block, and restore them after it."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        numpy.random.seed(derive_seed(seed, "numpy") % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
