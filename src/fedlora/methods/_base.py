"""The interface of a federated method: a few pure functions on one adapted weight.

The engine has the loop, the data and the network. A method defines, for one weight, the leaves that a client starts
from, trains, sends and keeps, and how the server combines uploads. The defaults are FedIT's, so a method's file only
has its differences from FedIT.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.adapters import Adapter, LoRA, VeRA
from fedlora.linalg.sums import Lazy, Term
from fedlora.types import Layer, Outcome, Tree, Turn, Upload, Work


@dataclass(frozen=True)
class Method:
    """Seven hooks with FedIT's defaults, and claims about the method, which ``tests/laws`` checks.

    A method of another package is a frozen dataclass; its fields are the ``[method]`` table and need defaults. Hooks
    return new values and write to no argument.
    """

    adapter: Adapter = field(default_factory=LoRA)
    weighting: Literal["examples", "uniform"] = "examples"

    title: ClassVar[str] = ""  # the name as papers print it
    cite: ClassVar[str] = ""  # BibTeX entry; empty if there is no publication
    adapters: ClassVar[tuple[type[Adapter], ...]] = (LoRA, VeRA)  # parametrisations that the method supports
    exact: ClassVar[bool] = False  # does a round end at the mean of the clients' trained weights?
    lossy: ClassVar[bool] = False  # does a round drop part of an update on purpose, even with a single client?
    any_rank: ClassVar[bool] = False  # may clients differ in budget?
    personal: ClassVar[bool] = False  # does each client have its own model?
    shares_head: ClassVar[bool] = True  # are the parts trained in full averaged, or does each client keep its own?
    sums: ClassVar[bool] = True  # does the server only sum uploads, so that secure aggregation can hide them?
    weighs: ClassVar[bool] = False  # does the server change the weights of uploads?
    keeps_frame: ClassVar[bool] = (
        True  # does a leaf keep its meaning, so that a compression error can be added next round?
    )

    @classmethod
    def merge_obstacle(cls) -> str | None:
        """Return the reason why the method cannot merge LoRAs that were trained without it; None if it can."""
        if LoRA not in cls.adapters:
            return "it trains an adapter of another kind"
        if cls.personal:
            return "it leaves every client a model of its own"
        if cls.trains is not Method.trains:
            return "it changes which factors the clients train"
        return None

    @property
    def whole_model(self) -> bool:
        """Whether these settings combine all weights jointly."""
        return False

    @property
    def uses_gradient(self) -> bool:
        """Whether ``trains`` needs a gradient on the client's own rows."""
        return False

    @property
    def prunes(self) -> bool:
        """Whether the size of an upload depends on the result of training."""
        return False

    @property
    def imitation(self) -> bool:
        """Whether these settings reproduce published code exactly, so that the laws may not hold."""
        return False

    @property
    def caution(self) -> str | None:
        """A warning to users of these settings, in one sentence."""
        return None

    @property
    def averages(self) -> bool:
        """Whether the server only averages the shared leaves."""
        return type(self).combine is Method.combine and type(self).combine_all is Method.combine_all

    # ------------------------------------------------------------- on the client, before training
    def receive(self, shared: Layer, kept: Layer, turn: Turn) -> Layer:
        """Return the leaves that a client starts from."""
        return {**shared, **kept}

    def trains(self, start: Layer, turn: Turn, gradient: Callable[[], Layer]) -> frozenset[str]:
        """Return the leaves to train this turn. ``gradient()`` is the loss gradient at ``start`` on one batch."""
        return self.adapter.trainable

    def penalty(self, layer: Layer) -> Tensor | float:
        """Return a term that is added to the client's loss for this weight."""
        return 0.0

    # -------------------------------------------------------------- on the client, after training
    def send(self, work: Work, turn: Turn) -> Layer:
        """Return the leaves to upload."""
        return pick(work.end, work.trained)

    def keep(self, work: Work, sent: Layer, turn: Turn) -> Layer:
        """Return the leaves to keep for this client's next turn: those that it trained and did not send."""
        return pick(work.end, work.trained - set(sent))

    # ------------------------------------------------------------------------------ on the server
    def combine(self, shared: Layer, uploads: Sequence[Upload]) -> Outcome:
        """Return the next shared leaves, and any update of the base.

        Leaves carry leading dimensions here: weights of one shape are combined in one call.
        """
        return Outcome({**shared, **mean(uploads)})

    def combine_all(self, shared: Tree, uploads: Mapping[str, Sequence[Upload]]) -> dict[str, Outcome]:
        """Call ``combine`` for every weight. Override this only to combine weights jointly."""
        return {part: self.combine(shared[part], uploads[part]) for part in shared}


def terms(adapter: Adapter, uploads: Sequence[Upload]) -> Sequence[Term]:
    """Return the exact mean ``Σ w_k ΔW_k``, including each client's scale, as a sum of products."""
    return Lazy(len(uploads), lambda k: adapter.term(uploads[k].layer, uploads[k].weight))


def pick(layer: Layer, leaves: frozenset[str] | set[str]) -> Layer:
    """Return the named leaves of a layer, in sorted order."""
    return {leaf: layer[leaf] for leaf in sorted(leaves)}


def mean(uploads: Sequence[Upload]) -> dict[str, Tensor]:
    """Return each leaf's mean over the clients that sent it.

    Raises ``ValueError`` if the clients' shapes differ, since torch would broadcast some shapes.
    """
    averaged: dict[str, Tensor] = {}
    for leaf in sorted({leaf for u in uploads for leaf in u.layer}):
        sent = [u for u in uploads if leaf in u.layer]
        averaged[leaf] = weighted_mean([u.weight for u in sent], (u.layer[leaf] for u in sent), leaf)
    return averaged


def weighted_mean(weights: Sequence[float], values: Iterable[Tensor], name: str) -> Tensor:
    """Return ``Σ w_k x_k / Σ w_k`` in one pass, with one value in memory at a time."""
    total, rest = sum(weights), iter(values)
    average = (weights[0] / total) * next(rest)
    for w, value in zip(weights[1:], rest, strict=True):
        if value.shape != average.shape:
            shapes = sorted({tuple(average.shape), tuple(value.shape)})
            raise ValueError(
                f"cannot average leaf {name!r}: clients sent shapes {shapes}, and averaging needs one shape for all; "
                "give every client the same rank or take a method that allows any rank (see `fedlora methods`)."
            )
        average = torch.add(average, value, alpha=w / total)
    return average
