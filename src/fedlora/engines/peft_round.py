"""One round in which state dicts of PEFT's LoRA go in and one comes out: what each must hold, and their combination.

Flower's strategy and ``fedlora.Server`` are this round with different messages around it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules, Served, client_start, public_leaves, server_turn
from fedlora.security.guard import Guard
from fedlora.security.validation.expected import build_upload_spec
from fedlora.training.peft_state import PeftState, parse_keys
from fedlora.training.recipe import Recipe, trainable_leaves
from fedlora.types import Tree, Turn

Value = TypeVar("Value")  # of a state dict: a tensor, or an array of a message
Leaf = tuple[str, str]  # the part and its leaf


class Combined(NamedTuple):
    """The result of a round, and the uploads that count in it."""

    served: Served
    uploads: list[Received]
    kept: list[int] | None  # the clients that a robust aggregator kept; None without one


@dataclass(frozen=True)
class PeftRound:
    """One round of a recipe, from the state that its clients were sent."""

    recipe: Recipe
    shared: PeftState
    number: int  # from 0

    @cached_property
    def method(self) -> Method:
        """The method of the adapted parts."""
        return self.recipe.build()

    @cached_property
    def rules(self) -> Rules:
        """The rule of each part."""
        return self.recipe.rules(self.shared)

    @cached_property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.shared.ranks().values())

    @cached_property
    def sends(self) -> frozenset[Leaf]:
        """The leaves that clients send in this round."""
        sent = build_upload_spec(self.rules, self.shared.tree, self.turn(0)).sent
        return frozenset((part, leaf) for part, layer in sent.items() for leaf in layer)

    @cached_property
    def trains(self) -> frozenset[Leaf]:
        """The leaves that clients train in this round."""
        turn = self.turn(0)
        start = client_start(self.rules, self.shared.tree, {}, turn)
        return frozenset(
            (part, leaf) for part, rule in self.rules.items() for leaf in trainable_leaves(rule, start[part], turn)
        )

    def turn(self, client: int, rank: int | None = None) -> Turn:
        """Return a client's turn; ``rank`` is the state's if it is None."""
        seed = self.recipe.turn_seed(self.number, client)
        return Turn(self.number, client, self.rank if rank is None else rank, seed)

    def check_start(self) -> None:
        """Raise ``ValueError`` if the clients of this method do not begin at the update that the state holds."""
        for part, rank in self.shared.ranks().items():
            rule, layer = self.rules[part], self.shared.tree[part]
            start = public_leaves(rule.receive(layer, {}, Turn(0, 0, rank)))
            if not torch.allclose(rule.adapter.delta(start).dense(), rule.adapter.delta(layer).dense(), atol=1e-6):
                raise ValueError(
                    f"{rule.title} begins every turn afresh and would lose the update that the initial arrays hold at "
                    f"{part!r}; take another method, or merge the adapter into the base first."
                )

    def read_upload(
        self, client: int, examples: float, state: Mapping[str, Value], read: Callable[[str, Value], Tensor]
    ) -> Received:
        """Return a client's state dict as an upload; ``read`` converts its values to float32.

        Raises ``ValueError`` if it has not exactly the leaves that clients send in this round, with their shapes.
        """
        tree = self._read_tree(state, read)
        ranks = [layer["A"].shape[0] for part, layer in tree.items() if part in self.shared.adapted and "A" in layer]
        return Received(self.turn(client, max(ranks, default=0)), examples, tree)  # type: ignore[arg-type]

    def align_turns(self, uploads: Mapping[int, Received]) -> dict[int, Received]:
        """Return the uploads with the state's rank in their turns if all have the same shapes.

        Methods compare the ranks of turns, and an upload without ``A`` does not tell its rank.
        """
        forms = {
            tuple(tuple(x.shape) for layer in upload.tree.values() for x in layer.values())
            for upload in uploads.values()
        }
        if len(forms) != 1:
            return dict(uploads)
        return {client: upload._replace(turn=self.turn(client)) for client, upload in uploads.items()}

    def combine(self, guard: Guard, uploads: Sequence[Received]) -> Combined:
        """Combine screened uploads. Raises ``ValueError`` if there are too few of them, or the result is not finite."""
        try:
            counted, kept = guard.apply_rule(self.rules, self.shared.tree, self.number, uploads)
            if not counted:
                raise ValueError("a robust rule needs 3 good uploads.")
            served = server_turn(self.rules, self.shared.tree, counted)
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"a factorisation failed ({error}); lower the learning rate.") from error
        tensors = [x for layer in served.shared.values() for x in layer.values()]
        tensors += [x for factors in served.base_updates.values() for f in factors for x in f]
        if not all(bool(x.isfinite().all()) for x in tensors):
            raise ValueError("the result is not finite; lower the learning rate.")
        return Combined(served, counted, kept)

    def _read_tree(self, state: Mapping[str, Value], read: Callable[[str, Value], Tensor]) -> Tree:
        keys, _ = parse_keys(state)
        which = ", which the method does not send in this round"
        for verb, odd, end in (("lacks", self.sends - keys.keys(), ""), ("sent", keys.keys() - self.sends, which)):
            if odd:
                names = sorted(self.shared.keys.get(x, keys.get(x, "")) for x in odd)
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(f"it {verb} {names[0]!r}{more}{end}")
        tree: dict[str, dict[str, Tensor]] = {part: {} for part in self.rules}
        for (part, leaf), key in sorted(keys.items()):
            tree[part][leaf] = read(key, state[key])
        for part, layer in tree.items():
            self._check_shapes(part, layer)
        return tree

    def _check_shapes(self, part: str, layer: Mapping[str, Tensor]) -> None:
        needed = {leaf: tuple(self.shared.tree[part][leaf].shape) for leaf in layer}
        if self.method.any_rank and part in self.shared.adapted and layer.keys() == {"A", "B"}:
            rank = layer["A"].shape[0] if layer["A"].dim() == 2 else 0
            if 1 <= rank <= needed["A"][0]:
                needed = {"A": (rank, needed["A"][1]), "B": (needed["B"][0], rank)}
        shapes = {leaf: tuple(x.shape) for leaf, x in layer.items()}
        if shapes != needed:
            raise ValueError(f"it sent {shapes} for {part!r} where {needed} is needed")
