"""FLoRA-NA: serve mixes of the clients' factors whose product is nearly the mean of the products.

Nguyen et al. FLoRA-NA: Nearly Accurate Aggregation for Federated Low-Rank Adaptation. 2025.
https://arxiv.org/abs/2509.26399

Use it when FedIT's traffic and factors must stay as they are, and the server may spend a little on a mean that lies
nearer to the exact one.
Not when rounds must be exact, the server may not see single uploads (secure aggregation), or ranks differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.linalg.least_squares import ClientFactors, Grams, adam, als, gram_matrices
from fedlora.linalg.matrix_free import solve_mixes, solve_streaming
from fedlora.linalg.sums import CACHE_LIMIT, Lazy
from fedlora.methods._base import Method
from fedlora.types import Layer, Outcome, Tree, Upload


@dataclass(frozen=True)
class FLoRANA(Method):
    """``min_{p,q} ‖Σ w_k B_k A_k − (Σ p_k B_k)(Σ q_k A_k)‖_F``; serve ``B = Σ p_k B_k`` and ``A = Σ q_k A_k``.

    Solved by alternating least squares, until a sweep changes nothing, at most ``sweeps`` of them: for few clients
    in the Gram matrices ``B_kᵀ B_l`` and ``A_k A_lᵀ``, for many by passes over the factors. They start from FedIT's
    ``p = q = w``. If the clients' factors are rotated against each other, they also start from single clients and
    principal components, and the best mix is served: on 30 such draws at most 0.0037 above the least error known
    (docs/benchmarks.md). ``scope="model"`` fits one ``(p, q)`` for all weights together; ``anchor`` adds
    last round's factors as one more atom. ``solver="adam"`` takes the authors' 200 steps from ones towards the sum
    ``K Σ w_k B_k A_k``, as the abstract has it, and serves ``p / √K`` and ``q / √K``. It is for fidelity studies
    only: 200 steps do not reach the sum of many clients, and its error is then larger than FedIT's (0.3 of the
    update with 10 clients and 1.8 with 30, FedIT's being 0.04 and 0.02).
    """

    scope: Literal["weight", "model"] = "weight"
    solver: Literal["als", "adam"] = "als"
    sweeps: int = 300
    anchor: bool = False

    title = "FLoRA-NA"
    cite = """@misc{nguyen2025florana,
      title = {{FLoRA-NA}: Nearly Accurate Aggregation for Federated Low-Rank Adaptation},
      author = {Nguyen and others}, year = {2025}, eprint = {2509.26399}, archiveprefix = {arXiv}}"""
    adapters = (LoRA,)
    sums = False  # the server must see every client's factors

    @property
    def whole_model(self) -> bool:
        return self.scope == "model"

    @property
    def imitation(self) -> bool:
        return self.solver == "adam"

    @property
    def caution(self) -> str | None:
        if self.solver != "adam":
            return None
        return (
            "method.solver is 'adam': its 200 steps do not reach the mean of more than a few clients, and FedIT may be "
            "nearer to it; take 'als' unless you repeat the authors' code."
        )

    def combine_all(self, shared: Tree, uploads: Mapping[str, Sequence[Upload]]) -> dict[str, Outcome]:
        if self.solver == "als" and self.scope == "weight":
            return {part: self._alone(shared[part], uploads[part]) for part in shared}
        parts = list(shared)
        sources = [self._terms(shared[part], uploads[part]) for part in parts]
        factors = [_stack(*each) for each in sources]
        # Grams of different shapes (m, n) are all (K K r r): stacked over every leading dimension, one solve does.
        grams = [gram_matrices(f) for f in factors]
        sizes = [g.B.shape[:-4].numel() for g in grams]
        all_grams = Grams(*(torch.cat([side.reshape(-1, *side.shape[-4:]) for side in s]) for s in zip(*grams)))
        w = factors[0].w
        p, q = (adam if self.solver == "adam" else als)(all_grams, w, self.scope == "model", self.sweeps)
        mixes = zip(torch.split(p, sizes), torch.split(q, sizes))
        return {part: apply_mixes(shared[part], layers, *mix) for part, (layers, _), mix in zip(parts, sources, mixes)}

    def _alone(self, shared: Layer, uploads: Sequence[Upload]) -> Outcome:
        layers, w = self._terms(shared, uploads)
        if len(layers) * sum(x.numel() for x in shared.values()) <= CACHE_LIMIT:
            return apply_mixes(shared, layers, *solve_mixes(_stack(layers, w), self.sweeps))
        A, B = (Lazy(len(layers), lambda k, leaf=leaf: layers[k][leaf]) for leaf in "AB")
        return apply_mixes(shared, layers, *solve_streaming(A, B, w, self.sweeps))

    def _terms(self, shared: Layer, uploads: Sequence[Upload]) -> tuple[list[Layer], Tensor]:
        """Return the layers that a mix may use, and their weights in the target."""
        layers, w = [u.layer for u in uploads], [u.weight for u in uploads]
        if self.anchor:
            layers, w = [*layers, shared], [*w, 0.0]
        return layers, torch.tensor(w, dtype=torch.float64, device=shared["A"].device)


def _stack(layers: Sequence[Layer], w: Tensor) -> ClientFactors:
    """Stack all factors in memory."""
    A, B = (torch.stack([layer[leaf] for layer in layers], dim=-3) for leaf in "AB")
    return ClientFactors(A, B, w)


def apply_mixes(shared: Layer, layers: Sequence[Layer], p: Tensor, q: Tensor) -> Outcome:
    """The mixed factors in the clients' precision, and how far the mix has come to rest on one client."""
    stack = shared["A"].shape[:-2]
    mixed = {}
    for leaf, mix in (("A", q.reshape(*stack, -1)), ("B", p.reshape(*stack, -1))):
        x = torch.zeros_like(shared[leaf])
        for k, layer in enumerate(layers):
            x = torch.addcmul(x, layer[leaf], mix[..., k].to(x.dtype)[..., None, None])
        mixed[leaf] = x
    p = p.reshape(*stack, -1)
    concentration = p.abs().amax(-1) / p.abs().sum(-1).clamp_min(torch.finfo(p.dtype).tiny)
    return Outcome({**shared, **mixed}, notes={"concentration": concentration})
