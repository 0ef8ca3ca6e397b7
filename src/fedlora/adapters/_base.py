"""What an adapter is: leaves, the update they stand for, and which of them act on which side."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.sums import Term
from fedlora.types import Factors, Layer


@dataclass(frozen=True)
class Adapter(ABC):
    """A parametrisation ``leaves ↔ ΔW`` of one weight ``W (m n)``; it owns every scale, and holds no tensors.

    Leaves that are not ``trainable`` come from a seed, are equal at all parties and never travel.

    An adapter of another package is a frozen dataclass that defines ``inputs``, ``outputs``, ``budget``, ``like``,
    ``init`` and ``delta``; its fields are the ``[adapter]`` table. ``delta`` and ``forward`` must be differentiable,
    and ``delta`` must take leaves with leading dimensions. ``forward`` is worth defining if it can be cheaper than two
    products with the factors. A method takes the adapter if ``Method.adapters`` names the class or one that it extends.
    """

    cite = ""  # BibTeX of its paper

    @property
    @abstractmethod
    def inputs(self) -> frozenset[str]:
        """Trainable leaves that act on the features (LoRA: ``A``)."""

    @property
    @abstractmethod
    def outputs(self) -> frozenset[str]:
        """Trainable leaves that make the result (LoRA: ``B``)."""

    @property
    def trainable(self) -> frozenset[str]:
        """Leaves that training may move."""
        return self.inputs | self.outputs

    @property
    @abstractmethod
    def budget(self) -> int:
        """What a client with all resources trains: a LoRA's rank, or the number of Ravan's heads."""

    @classmethod
    @abstractmethod
    def like(cls, other: "Adapter") -> "Adapter":
        """An adapter of this kind with about as many trainable numbers as ``other``."""

    @abstractmethod
    def init(self, m: int, n: int, seed: int) -> dict[str, Tensor]:
        """Leaves for a weight of ``m`` outputs and ``n`` inputs, float32, with ``ΔW = 0``; the seed fixes them."""

    @abstractmethod
    def delta(self, layer: Layer) -> Factors:
        """``ΔW = U V`` with every scale inside."""

    def forward(self, x: Float[Tensor, "*batch n"], layer: Layer) -> Float[Tensor, "*batch m"]:
        """``x ΔWᵀ`` without forming ``ΔW``."""
        U, V = self.delta(layer)
        return (x @ V.mT) @ U.mT

    def term(self, layer: Layer, weight: float) -> Term:
        """``weight · ΔW``, one client's share of a sum."""
        return Term(weight, *self.delta(layer))

    def around(self, update: Factors, fresh: Layer) -> Layer:
        """Leaves that stand for a known update, as nearly as they can; ``fresh`` are those of ``init``.

        Raises ``ValueError`` where the parametrisation cannot start from an update.
        """
        raise ValueError(
            f"an adapter of kind {type(self).__name__} cannot start from an update; leave model.start out."
        )

    def leading(self, layer: Layer, rank: int) -> Layer:
        """The part of ``layer`` that a client of smaller budget holds; its update is that part of the update."""
        return layer


def check_alpha(alpha: int | float) -> None:
    """``ValueError`` where an update's scale would be none, or turn it round."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"adapter.alpha is {alpha}; it scales the update and must be a number above 0.")


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Float32 draws in ``[-bound, bound)``."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that no draw depends on what was drawn elsewhere."""
    return torch.Generator().manual_seed(seed)
