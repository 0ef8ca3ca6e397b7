"""What a federated method is: a handful of pure functions on one adapted weight.

The engine owns the loop, the data and the wire. A method only says, for one weight, what a
client starts from, which leaves it trains, what it sends and keeps, and what the server makes
of what it gets. The defaults are FedIT's, so a method's file is exactly what it changes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.adapters import Adapter, LoRA, MultiHead, VeRA
from fedlora.linalg.sums import Lazy, Term
from fedlora.types import Layer, Outcome, Tree, Turn, Upload, Work


@dataclass(frozen=True)
class Method:
    """Seven hooks with FedIT's defaults, and what the class claims of itself; ``tests/laws`` holds it to that.

    A method of another package is a frozen dataclass; its fields are the ``[method]`` table and need defaults. Hooks
    return new values and write to no argument.
    """

    adapter: Adapter = field(default_factory=LoRA)
    weighting: Literal["examples", "uniform"] = "examples"

    title: ClassVar[str] = ""  # the name as papers print it
    cite: ClassVar[str] = ""  # BibTeX of what is to be cited; empty: nothing was published
    adapters: ClassVar[tuple[type[Adapter], ...]] = (LoRA, VeRA)  # which parametrisations the rule is defined for
    exact: ClassVar[bool] = False  # does a round end at the mean of the clients' trained weights?
    lossy: ClassVar[bool] = False  # does a round drop, on purpose, part of what even a single client trained?
    any_rank: ClassVar[bool] = False  # may clients differ in budget?
    personal: ClassVar[bool] = False  # is there one model a client, rather than one for all?
    shares_head: ClassVar[bool] = True  # are the parts trained in full averaged, or does each client keep its own?
    sums: ClassVar[bool] = True  # does the server only sum what it gets, so that secure aggregation can hide it?
    weighs: ClassVar[bool] = False  # does the server give the uploads other weights than their shares?
    keeps_frame: ClassVar[bool] = True  # does a leaf mean the same next round, so that what was lost can be added then?

    @classmethod
    def merge_obstacle(cls) -> str | None:
        """The reason why the server's rule cannot combine LoRAs that were trained without it; None where it can."""
        if LoRA not in cls.adapters:
            return "it trains an adapter of another kind"
        if cls.personal:
            return "it leaves every client a model of its own"
        if cls.trains is not Method.trains:
            return "it changes which factors the clients train"
        return None

    @property
    def whole_model(self) -> bool:
        """Whether these settings fit all weights together, so that none can be combined alone."""
        return False

    @property
    def uses_gradient(self) -> bool:
        """Whether ``trains`` goes by a gradient on the client's own rows."""
        return False

    @property
    def prunes(self) -> bool:
        """Whether the size of what a client sends goes by what its training came to."""
        return False

    @property
    def imitation(self) -> bool:
        """Whether these settings repeat published code as it is, so that the laws are not promised."""
        return False

    @property
    def caution(self) -> str | None:
        """What a user of these settings should know before a run, in a sentence."""
        return None

    @property
    def averages(self) -> bool:
        """Whether the server does nothing to the shared leaves but average them."""
        return type(self).combine is Method.combine and type(self).combine_all is Method.combine_all

    # ------------------------------------------------------------- on the client, before training
    def receive(self, shared: Layer, kept: Layer, turn: Turn) -> Layer:
        """The leaves a client starts from."""
        return {**shared, **kept}

    def trains(self, start: Layer, turn: Turn, gradient: Callable[[], Layer]) -> frozenset[str]:
        """The leaves to train this turn. ``gradient()`` is the loss gradient at ``start`` on one batch."""
        return self.adapter.trainable

    def penalty(self, layer: Layer) -> Tensor | float:
        """What to add to the client's loss for this weight."""
        return 0.0

    # -------------------------------------------------------------- on the client, after training
    def send(self, work: Work, turn: Turn) -> Layer:
        """The leaves that go up."""
        return pick(work.end, work.trained)

    def keep(self, work: Work, sent: Layer, turn: Turn) -> Layer:
        """The leaves that stay for this client's next turn: what it trained and did not send."""
        return pick(work.end, work.trained - set(sent))

    # ------------------------------------------------------------------------------ on the server
    def combine(self, shared: Layer, uploads: Sequence[Upload]) -> Outcome:
        """The next shared leaves, and any update to fold into the base.

        Leaves carry leading dimensions here: weights of one shape are combined in one call.
        """
        return Outcome({**shared, **mean(uploads)})

    def combine_all(self, shared: Tree, uploads: Mapping[str, Sequence[Upload]]) -> dict[str, Outcome]:
        """``combine`` for every weight. Replace this one only if the weights must be seen together."""
        return {part: self.combine(shared[part], uploads[part]) for part in shared}


def terms(adapter: Adapter, uploads: Sequence[Upload]) -> Sequence[Term]:
    """The exact mean ``Σ w_k ΔW_k``, each client's scale inside, as a sum of products."""
    return Lazy(len(uploads), lambda k: adapter.term(uploads[k].layer, uploads[k].weight))


def pick(layer: Layer, leaves: frozenset[str] | set[str]) -> Layer:
    """The named leaves of a layer, in one order for all."""
    return {leaf: layer[leaf] for leaf in sorted(leaves)}


def mean(uploads: Sequence[Upload]) -> dict[str, Tensor]:
    """Each leaf, averaged over the clients that sent it.

    Raises ``ValueError`` where the clients' shapes differ: torch would broadcast some of them.
    """
    averaged: dict[str, Tensor] = {}
    for leaf in sorted({leaf for u in uploads for leaf in u.layer}):
        sent = [u for u in uploads if leaf in u.layer]
        averaged[leaf] = weighted_mean([u.weight for u in sent], (u.layer[leaf] for u in sent), leaf)
    return averaged


def weighted_mean(weights: Sequence[float], values: Iterable[Tensor], name: str) -> Tensor:
    """``Σ w_k x_k / Σ w_k`` in one pass, each value only held while it is added."""
    total, rest = sum(weights), iter(values)
    found = (weights[0] / total) * next(rest)
    for w, value in zip(weights[1:], rest, strict=True):
        if value.shape != found.shape:
            shapes = sorted({tuple(found.shape), tuple(value.shape)})
            raise ValueError(
                f"cannot average leaf {name!r}: clients sent shapes {shapes}, and averaging needs one shape for all; "
                "give every client the same rank or take a method that allows any rank (see `fedlora methods`)."
            )
        found = torch.add(found, value, alpha=w / total)
    return found


__all__ = ["Adapter", "LoRA", "Method", "MultiHead", "VeRA", "mean", "pick", "terms", "weighted_mean"]
