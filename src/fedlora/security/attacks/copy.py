"""Copy: sends another client's upload of the previous round.

Lin et al. Free-riders in Federated Learning: Attacks and Defenses. 2019. https://arxiv.org/abs/1911.12560
"""

from dataclasses import dataclass

from fedlora.security.attacks._base import Attack


@dataclass(frozen=True)
class Copy(Attack):
    """Every attacker sends the last upload of client ``victim``, or its own one before there is any."""

    cite = """@misc{lin2019freeriders, title = {Free-riders in Federated Learning: Attacks and Defenses},
      author = {Lin and others}, year = {2019}, eprint = {1911.12560}, archiveprefix = {arXiv}}"""

    victim: int | None = None  # None: the first honest client of the round

    meets = "'copy', which sends the victim's upload"

    def alter_together(self, rules, shared, uploads, overheard):
        victim = self.victim if self.victim is not None else min(uploads.keys() - self.attackers, default=-1)
        last = next(iter(overheard.values()), None)
        overheard.clear()
        if victim in uploads:
            overheard[victim] = {part: dict(uploads[victim].tree[part]) for part in rules}
        acting = [k for k, u in uploads.items() if k != victim and self.is_attack(u.turn)]
        return {} if last is None else {client: uploads[client]._replace(tree=last) for client in acting}
