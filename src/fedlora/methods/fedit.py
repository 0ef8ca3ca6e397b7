"""FedIT: average ``A`` and average ``B``.

Zhang et al. Towards Building the Federated GPT: Federated Instruction Tuning. ICASSP 2024.
https://arxiv.org/abs/2305.05644

Use it when a first line to compare with is wanted, or the server may do nothing but average: everything that knows
FedAvg (secure aggregation, robust rules, server optimisers, other frameworks) works with it.
Not when what is served must be the mean of what the clients trained, or clients have different ranks.
"""

from dataclasses import dataclass

from fedlora.methods._base import Method


@dataclass(frozen=True)
class FedIT(Method):
    """``A = Σ w_k A_k``, ``B = Σ w_k B_k``.

    The product of the means is not the mean of the products: what is served misses
    ``s Σ w_k (B_k − B)(A_k − A)``, which vanishes only where one factor is common to all clients.
    """

    title = "FedIT"
    cite = """@inproceedings{zhang2024fedit,
      title = {Towards Building the Federated {GPT}: Federated Instruction Tuning},
      author = {Zhang and others}, booktitle = {ICASSP}, year = {2024}, eprint = {2305.05644},
      archiveprefix = {arXiv}}"""
