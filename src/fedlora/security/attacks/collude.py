"""Collusion: all attackers send one and the same upload, so that each has near neighbours.

Baruch et al. A Little Is Enough: Circumventing Defenses For Distributed Learning. NeurIPS 2019, on why a tight group is
hard to detect: https://arxiv.org/abs/1902.06156
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedlora.rounds import Received, Rules
from fedlora.security.attacks._base import Attack
from fedlora.security.validation.expected import UploadSpecs
from fedlora.types import Layer, Tree


@dataclass(frozen=True)
class Collude(Attack):
    """``−scale`` times the mean of the attackers' own honest updates, from each of them: a third of the clients."""

    cite = """@inproceedings{baruch2019little,
      title = {A Little Is Enough: Circumventing Defenses For Distributed Learning},
      author = {Baruch and others}, booktitle = {NeurIPS}, year = {2019}, eprint = {1902.06156},
      archiveprefix = {arXiv}}"""

    share: float = 1 / 3
    scale: float = 1.0

    meets = "'collude', which needs the attackers' uploads"

    def alter_together(self, rules, shared, uploads, overheard):
        own = [upload for client, upload in uploads.items() if client in self.attackers]
        return forge(self, rules, shared, uploads, own, -self.scale)


def forge(
    attack: Attack, rules: Rules, shared: Tree, uploads: Mapping[int, Received], known: Sequence[Received], by: float
) -> dict[int, Received]:
    """Move every attacker's start by ``by`` times the mean change of the known uploads, leaf by leaf."""
    known = [u for u in known if all(x.isfinite().all() for layer in u.tree.values() for x in layer.values())]
    specs = UploadSpecs(rules, shared)
    starts = [specs.of(other.turn).start for other in known]
    forged = {}
    for client, upload in uploads.items():
        if not attack.is_attack(upload.turn) or not known:
            continue
        start, tree = specs.of(upload.turn).start, dict[str, Layer]()
        for part in rules:
            pairs = [(s[part], u.tree[part]) for s, u in zip(starts, known)]
            tree[part] = _forge_layer(start[part], upload.tree[part], pairs, by)
        forged[client] = upload._replace(tree=tree)
    return forged


def _forge_layer(start: Layer, own: Layer, pairs: Sequence[tuple[Layer, Layer]], by: float) -> Layer:
    forged = {}
    for leaf, x in own.items():
        changes = [b[leaf] - a[leaf] for a, b in pairs if leaf in b and b[leaf].shape == x.shape]
        forged[leaf] = start[leaf] + by * torch.stack(changes).mean(0) if changes else x
    return forged
