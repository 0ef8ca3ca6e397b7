"""The ``[compression]`` table: encodes leaves and base updates. If it is empty, they are sent unchanged.

Up goes the difference between a leaf and the one that its client's turn began with, which the server can make itself:
what ``receive`` makes of the server's tree without anything that the client kept. A leaf of another shape than there
(a client that pruned itself) is encoded whole. The server combines what it decodes.

Down goes a leaf whole, or, where the codec is coarse, its difference to the one served before. What the server holds
from then on is what was decoded: its tree is what the clients hold, to the bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedlora.engines.base_updates import BaseUpdate
from fedlora.engines.comm.codecs import CODECS
from fedlora.engines.comm.codecs._base import Chain
from fedlora.engines.comm.encoding import (
    CODED,
    MARK,
    OWED,
    SAID,
    SHAPE,
    apart,
    base_of,
    codable,
    draws,
    known,
    shape_of,
    with_owed,
)
from fedlora.methods._base import Method
from fedlora.rounds import Rules, client_start, public_leaves
from fedlora.schema import construct
from fedlora.types import Factors, Layer, Tree, Turn

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 65504.0  # float16's


class Crossed(NamedTuple):
    """One client's upload: what crosses, what the server makes of that, and what stays with the client."""

    crosses: Tree
    decoded: Tree
    stays: Tree


@dataclass(frozen=True)
class Compression:
    """The ``[compression]`` table. Adapters and heads are encoded alike; base updates have a precision of their own."""

    up: str | list[str] = "float32"  # a codec, or "top-k" and a codec for what it keeps
    down: str | list[str] = "float32"
    base_updates: Literal["float32", "bfloat16", "float16"] = (
        "float32"  # base updates are rounded to this before anybody applies them
    )
    error_feedback: bool = False  # what encoding loses is added to what is encoded next
    top_k: float | None = None  # the share that "top-k" keeps; a first stage of ``up`` where no direction names it
    max_upload_mb: float = 1024.0  # a larger upload is refused before it is read

    def __post_init__(self) -> None:
        if not self.max_upload_mb > 0:
            raise ValueError(f"compression.max_upload_mb is {self.max_upload_mb}; it must be a positive number.")
        if self.top_k is None and self._named:
            raise ValueError(
                f"compression has the stage {self._named[0]!r}, but not which share it keeps; set compression.top_k."
            )
        lossy = [chain for chain in (self.upward, self.downward) if chain is not None]
        if self.error_feedback and not lossy:
            raise ValueError(
                "compression.error_feedback has nothing to make up for; set compression.up or compression.down."
            )

    def check(self, method: Method, secure: bool) -> None:
        """``ValueError`` where these settings and the method or the protocol exclude each other."""
        if secure and self.upward is not None:
            raise ValueError(
                f"compression.up is {self.up!r}, but flower.secure_aggregation adds up masked fixed-point numbers, and "
                "codes with scales or places of their own cannot be added; leave compression.up and top_k out."
            )
        if method.keeps_frame:
            return
        if self.error_feedback:
            raise ValueError(
                f"compression.error_feedback adds the loss of one round to the next, but {method.title} begins each "
                "round in other coordinates; leave error_feedback out, or take a method that averages."
            )
        if self.downward is not None and self.downward.coarse:
            raise ValueError(
                f"compression.down is {self.down!r}, which sends changes only, but {method.title} serves other "
                "coordinates each round; take int8, bfloat16 or float16."
            )

    @property
    def _named(self) -> list[str]:
        """The stages, of both directions, that take a share."""
        return [name for direction in (self.up, self.down) for name in _listed(direction) if _takes_share(name)]

    @cached_property
    def upward(self) -> Chain | None:
        """How uploads are encoded; None where they are not."""
        first = ["top-k"] if self.top_k is not None and not self._named else []
        return self._chain([*first, *_listed(self.up)])

    @cached_property
    def downward(self) -> Chain | None:
        """How what is served is encoded; None where it is not."""
        return self._chain(_listed(self.down))

    def _chain(self, names: Sequence[str]) -> Chain | None:
        found = [
            construct(CODECS.load(name), "compression", {"share": self.top_k} if _takes_share(name) else {})
            for name in names
        ]
        return Chain(tuple(found)) if found else None

    # ------------------------------------------------------------------------------------- up
    def sent(self, rules: Rules, shared: Tree, kept: Tree, turn: Turn, sent: Tree, stays: Tree) -> Crossed:
        """What crosses of what the method sends, and with it what the server will have and what the client owes."""
        if self.upward is None:
            return Crossed(sent, sent, stays)
        start = client_start(rules, shared, {}, turn)
        crosses: dict[str, Layer] = {}
        decoded: dict[str, Layer] = {}
        rest: dict[str, Layer] = {}
        for part, layer in sent.items():
            before = {leaf: x for leaf, x in kept.get(part, {}).items() if leaf.startswith(OWED)}
            coded = [self._coded(f"{part}/{leaf}", leaf, x, start[part], before, turn) for leaf, x in layer.items()]
            crosses[part] = {name: x for fields, _, _ in coded for name, x in fields.items()}
            decoded[part] = dict(zip(layer, (x for _, x, _ in coded)))
            rest[part] = {**before, **{OWED + leaf: x for leaf, (_, _, x) in zip(layer, coded) if x is not None}}
        return Crossed(crosses, decoded, {part: {**stays[part], **rest.get(part, {})} for part in stays})

    def _coded(
        self, name: str, leaf: str, x: Tensor, start: Layer, kept: Layer, turn: Turn
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """One leaf's fields, what they decode to, and what is owed then."""
        assert self.upward is not None
        if not codable(x) or leaf not in start:
            return {leaf: x}, x, None
        base, shape = base_of(start, leaf, tuple(x.shape)), tuple(x.shape)
        owed = kept.get(OWED + leaf) if base is not None else None
        goal = with_owed(x if base is None else x - base.to(x), owed)
        found = self.upward.encode(goal, draws(turn.seed, "up", name))
        got = self.upward.decode(found, shape).to(x)
        fields = {f"{leaf}{MARK}{field}": value for field, value in found.items()}
        if base is None:
            fields[f"{leaf}{MARK}{SHAPE}"] = torch.tensor(shape, dtype=torch.int32)
        feeds = self.error_feedback and base is not None
        return fields, got if base is None else base.to(x) + got, goal - got if feeds else None

    def arrived(self, rules: Rules, shared: Tree, turn: Turn, crossed: Tree) -> Tree:
        """What a client sent, from what crossed. ``ValueError`` where that is no encoding of such a leaf."""
        if self.upward is None:
            return crossed
        start = client_start(rules, shared, {}, turn)
        return {part: self._arrived(part, layer, start.get(part, {})) for part, layer in crossed.items()}

    def _arrived(self, part: str, layer: Layer, start: Layer) -> Layer:
        plain, coded = apart(layer)
        found = dict(plain)
        for leaf, coding in coded.items():
            shape = shape_of(part, leaf, coding, start)
            base = base_of(start, leaf, shape)
            assert self.upward is not None
            got = self.upward.decode({k: x for k, x in coding.items() if k != SHAPE}, shape)
            found[leaf] = got if base is None else base.to(got) + got
        return found

    # ----------------------------------------------------------------------------------- down
    def said(self, before: Tree, after: Tree, seed: int) -> Tree:
        """The server's tree as every client will hold it, with the encoded form of what changed among its notes."""
        if self.downward is None:
            return after
        return {part: self._said(part, before[part], layer, seed) for part, layer in after.items()}

    def _said(self, part: str, before: Layer, after: Layer, seed: int) -> Layer:
        found = dict(after)
        for leaf, x in public_leaves(after).items():
            if x is before.get(leaf) or not codable(x):
                continue
            found |= self._leaf(f"{part}/{leaf}", leaf, x, before, seed)
        return found

    def _leaf(self, name: str, leaf: str, x: Tensor, before: Layer, seed: int) -> dict[str, Tensor]:
        assert self.downward is not None
        base = before[leaf].to(x) if self.downward.coarse else None
        goal = with_owed(x, before.get(OWED + leaf))
        coded = self.downward.encode(goal if base is None else goal - base, draws(seed, "down", name))
        got = self.downward.decode(coded, tuple(x.shape)).to(x)
        value = got if base is None else base + got
        notes = {f"{CODED}{leaf}{MARK}{field}": y for field, y in coded.items()}
        owed = {OWED + leaf: goal - value} if self.error_feedback else {}
        return {leaf: value, **notes, **owed, SAID + leaf: before.get(SAID + leaf, torch.tensor(0)) + 1}

    def crossing(self, layer: Layer, leaf: str, held: int, version: int) -> Layer | None:
        """The encoded form in which a leaf goes to a client that holds version ``held`` of it; None: it goes whole.

        A difference is of use to those only who hold the version before.
        """
        if self.downward is None or SAID + leaf not in layer or (self.downward.coarse and held != version - 1):
            return None
        fields = self.downward.form(tuple(layer[leaf].shape))
        return {f"{leaf}{MARK}{field}": layer[f"{CODED}{leaf}{MARK}{field}"] for field in fields}

    def heard(self, crossed: Tree, held: Tree) -> Tree:
        """The leaves that came down, from what the client held before. ``ValueError`` as for ``arrived``."""
        if self.downward is None:
            return crossed
        return {part: self._heard(part, layer, held[part]) for part, layer in crossed.items() if part in held}

    def _heard(self, part: str, layer: Layer, held: Layer) -> Layer:
        plain, coded = apart(layer)
        found = dict(plain)
        for leaf, coding in coded.items():
            assert self.downward is not None
            base = known(part, leaf, held)
            got = self.downward.decode(coding, tuple(base.shape)).to(base)
            found[leaf] = base + got if self.downward.coarse else got
        return found

    # ---------------------------------------------------------------------------- base updates
    def rounded(self, base_updates: BaseUpdate) -> BaseUpdate:
        """Rounds a base update as all parties will apply it. Raises ``ValueError`` if float16 cannot hold it."""
        return self.widened(self.narrowed(base_updates)) if self.base_updates in NARROW else base_updates

    def narrowed(self, base_updates: BaseUpdate) -> BaseUpdate:
        """Casts a rounded base update to the dtype in which it is sent."""
        kind = NARROW.get(self.base_updates)
        return base_updates if kind is None else _each(base_updates, lambda x: _narrow(x, kind))

    def widened(self, base_updates: BaseUpdate) -> BaseUpdate:
        """Casts a received base update to float32."""
        return _each(base_updates, lambda x: x.float() if x.dtype in NARROW.values() else x)


def _listed(direction: str | list[str]) -> list[str]:
    names = [direction] if isinstance(direction, str) else direction
    return [name for name in names if name != "float32"]


def _takes_share(name: str) -> bool:
    return "share" in {f.name for f in fields(CODECS.load(name))}


def _each(base_updates: BaseUpdate, change) -> Mapping[str, tuple[Factors, ...]]:
    return {part: tuple(Factors(change(f.U), change(f.V)) for f in several) for part, several in base_updates.items()}


def _narrow(x: Tensor, kind: torch.dtype) -> Tensor:
    if kind == torch.float16 and not x.is_meta and bool((x.abs() > LARGEST).any()):
        raise ValueError(
            "compression.base_updates is 'float16', and a base update has numbers beyond 65504; set it to 'bfloat16' "
            "or 'float32'."
        )
    return x.to(kind)
