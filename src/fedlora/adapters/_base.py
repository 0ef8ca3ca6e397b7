"""The interface of an adapter: its leaves, the weight update that they represent, and the side that each acts on."""

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
    """A parametrisation ``leaves ↔ ΔW`` of one weight ``W (m n)``; it has every scale, and no tensors.

    Leaves that are not ``trainable`` come from a seed, are equal on all clients, and are never sent.

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
        """Trainable leaves that produce the result (LoRA: ``B``)."""

    @property
    def trainable(self) -> frozenset[str]:
        """Leaves that training may change."""
        return self.inputs | self.outputs

    @property
    @abstractmethod
    def budget(self) -> int:
        """The full budget of a client: a LoRA's rank, or the number of Ravan's heads."""

    @classmethod
    @abstractmethod
    def like(cls, other: "Adapter") -> "Adapter":
        """Return an adapter of this kind with about as many trainable parameters as ``other``."""

    @abstractmethod
    def init(self, m: int, n: int, seed: int) -> dict[str, Tensor]:
        """Return float32 leaves with ``ΔW = 0`` for a weight of ``m`` outputs and ``n`` inputs."""

    @abstractmethod
    def delta(self, layer: Layer) -> Factors:
        """Return ``ΔW = U V``, including every scale."""

    def forward(self, x: Float[Tensor, "*batch n"], layer: Layer) -> Float[Tensor, "*batch m"]:
        """Return ``x ΔWᵀ`` without forming ``ΔW``."""
        U, V = self.delta(layer)
        return (x @ V.mT) @ U.mT

    def term(self, layer: Layer, weight: float) -> Term:
        """Return ``weight · ΔW``, one client's term of a sum."""
        return Term(weight, *self.delta(layer))

    def around(self, update: Factors, fresh: Layer) -> Layer:
        """Return leaves that approximate a given update; ``fresh`` are those of ``init``.

        Raises ``ValueError`` if the parametrisation cannot start from an update.
        """
        raise ValueError(f"a {type(self).__name__} cannot start from an update; leave model.start out.")

    def leading(self, layer: Layer, rank: int) -> Layer:
        """Return the part of ``layer`` that a client of smaller budget holds; its update is that part of the update."""
        return layer


def check_positive(adapter: Adapter, *keys: str) -> None:
    """Raise ``ValueError`` if one of these settings is set and below 1."""
    for key in keys:
        if (value := getattr(adapter, key)) is not None and value < 1:
            raise ValueError(f"adapter.{key} is {value}; it must be at least 1.")


def check_alpha(alpha: int | float) -> None:
    """Raise ``ValueError`` unless ``alpha`` is positive and finite."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"adapter.alpha is {alpha}; it scales the update and must be a number above 0.")


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Return float32 draws in ``[-bound, bound)``."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def generator(seed: int) -> torch.Generator:
    """Return a new generator, so that no draw depends on other draws."""
    return torch.Generator().manual_seed(seed)
