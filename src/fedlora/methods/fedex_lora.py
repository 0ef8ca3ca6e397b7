"""FedEx-LoRA: average ``A`` and ``B``, and fold what that misses into the base.

Singhal et al. FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models.
ACL 2025. https://arxiv.org/abs/2410.09432

Use it when rounds must be exact and clients should go on from averaged factors, with FedIT's uploads.
Not when downloads are dear (the residual has rank ``K r`` unless ``residual_rank`` cuts it), the base weights must
stay as they are, or the server may not see single uploads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.adapters import LoRA
from fedlora.linalg.sums import Lazy, Term, stack, truncated_svd
from fedlora.methods._base import Method, mean
from fedlora.types import Layer, Outcome, Upload


@dataclass(frozen=True)
class FedExLoRA(Method):
    """``W += s Σ w_k (B_k − B̄)(A_k − Ā)``, which is ``s (Σ w_k B_k A_k − B̄ Ā)``, as factors of rank ``K r``.

    Written with centred factors the residual is no difference of large products. ``residual_rank`` folds only its
    best part of that rank (None: all of it, exact), and what goes down is that small.
    """

    residual_rank: int | None = None

    title = "FedEx-LoRA"
    cite = """@inproceedings{singhal2025fedex,
      title = {{FedEx-LoRA}: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models},
      author = {Singhal and others}, booktitle = {ACL}, year = {2025}, eprint = {2410.09432},
      archiveprefix = {arXiv}}"""
    adapters = (LoRA,)
    sums = False

    def __post_init__(self) -> None:
        if self.residual_rank is not None and self.residual_rank < 1:
            raise ValueError(f"method.residual_rank is {self.residual_rank}; it must be at least 1, or left out.")

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.residual_rank is None

    def combine(self, shared: Layer, uploads: Sequence[Upload]) -> Outcome:
        averaged = mean(uploads)
        residual = Lazy(len(uploads), lambda k: self._difference(uploads[k], averaged))
        rest = stack(residual) if self.residual_rank is None else truncated_svd(residual, self.residual_rank).factors()
        return Outcome({**shared, **averaged}, base_update=(rest,))

    def _difference(self, upload: Upload, averaged: Layer) -> Term:
        return self.adapter.term({leaf: upload.layer[leaf] - averaged[leaf] for leaf in "AB"}, upload.weight)
