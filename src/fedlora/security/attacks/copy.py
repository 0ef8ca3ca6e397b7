"""Copy: another client's upload of the round before, sent as one's own.

Lin et al. Free-riders in Federated Learning: Attacks and Defenses. 2019. https://arxiv.org/abs/1911.12560
"""

from dataclasses import dataclass

from fedlora.security.attacks._base import Attack


@dataclass(frozen=True)
class Copy(Attack):
    """Every attacker sends what client ``victim`` sent in its last round; before there is any, its own."""

    cite = """@misc{lin2019freeriders, title = {Free-riders in Federated Learning: Attacks and Defenses},
      author = {Lin and others}, year = {2019}, eprint = {1911.12560}, archiveprefix = {arXiv}}"""

    victim: int | None = None  # None: the first client of the round that is no attacker

    meets = "'copy', which sends another's upload"

    def together(self, rules, shared, uploads, overheard):
        """The victim's last upload from every attacker; and what it sends now, for the next round."""
        victim = self.victim if self.victim is not None else min(uploads.keys() - self.who, default=-1)
        last = next(iter(overheard.values()), None)
        overheard.clear()
        if victim in uploads:
            overheard[victim] = {part: dict(uploads[victim].tree[part]) for part in rules}
        acting = [k for k, u in uploads.items() if k != victim and self.acts(u.turn)]
        return {} if last is None else {client: uploads[client]._replace(tree=last) for client in acting}
