"""The ``[compression]`` table: encodes leaves and base updates. If it is empty, they are sent unchanged.

An upload has the difference between a leaf and its start: the result of ``receive`` without the client's own state,
which the server computes, too. A leaf with another shape than its start (a client that pruned itself) is encoded whole.
The server combines the decoded leaves.

A delivery has a leaf whole or, with a coarse codec, its difference from the last version. The server keeps the decoded
leaf, so its tree equals the clients' to the bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from fedlora.engines.base_updates import BaseUpdate
from fedlora.engines.comm.codecs import CODECS
from fedlora.engines.comm.codecs._base import Chain
from fedlora.rounds import Rules, client_start, public_leaves
from fedlora.schema import construct
from fedlora.seeds import derive_seed
from fedlora.types import Factors, Layer, Tree, Turn

MARK, SHAPE = "@", "shape"  # the fields of an encoded leaf are LEAF@FIELD; with SHAPE if the shape is not its start's
# Notes beside a leaf: its error-feedback residual, its encoded fields, and its encoded version (a count).
RESIDUAL, ENCODED, VERSION = "_residual.", "_encoded.", "_version."
NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 65504.0  # of float16


class EncodedUpload(NamedTuple):
    """One client's upload as it is sent, as the server decodes it, and the tree that the client keeps."""

    encoded: Tree
    decoded: Tree
    kept: Tree


@dataclass(frozen=True)
class Compression:
    """The ``[compression]`` table. Adapters and heads are encoded alike; base updates have their own precision."""

    up: str | list[str] = "float32"  # a codec, or "top-k" and a codec for the numbers that it keeps
    down: str | list[str] = "float32"
    base_updates: Literal["float32", "bfloat16", "float16"] = "float32"  # rounded to this before they are applied
    error_feedback: bool = False  # add the error of one encoding to the next
    top_k: float | None = None  # share that "top-k" keeps; the first stage of ``up`` if no direction names "top-k"
    max_upload_mb: float = 1024.0  # a larger upload is refused before it is read

    def __post_init__(self) -> None:
        if not self.max_upload_mb > 0:
            raise ValueError(f"compression.max_upload_mb is {self.max_upload_mb}; it must be a positive number.")
        if self.top_k is None and self._top_k_stages:
            raise ValueError(
                f"compression has the stage {self._top_k_stages[0]!r}, but not the share that it keeps; set "
                "compression.top_k."
            )
        chains = self.upward, self.downward  # a wrong stage is reported at once
        if self.error_feedback and chains == (None, None):
            raise ValueError("compression.error_feedback has no error to add; set compression.up or compression.down.")

    @cached_property
    def _top_k_stages(self) -> list[str]:
        """The stages of both directions that take a share."""
        return [name for direction in (self.up, self.down) for name in _codec_names(direction) if _takes_share(name)]

    @cached_property
    def upward(self) -> Chain | None:
        """The encoding of uploads; None without one."""
        first = ["top-k"] if self.top_k is not None and not self._top_k_stages else []
        return self._chain([*first, *_codec_names(self.up)])

    @cached_property
    def downward(self) -> Chain | None:
        """The encoding of deliveries; None without one."""
        return self._chain(_codec_names(self.down))

    def _chain(self, names: Sequence[str]) -> Chain | None:
        settings = {name: {"share": self.top_k} if _takes_share(name) else {} for name in names}
        return Chain(tuple(construct(CODECS.load(n), "compression", settings[n]) for n in names)) if names else None

    # ------------------------------------------------------------------------------------- up
    def encode_upload(
        self, rules: Rules, shared: Tree, kept: Tree, turn: Turn, sent: Tree, stays: Tree
    ) -> EncodedUpload:
        """Encode the leaves ``sent`` of a turn; ``kept`` is the client's tree before the turn, ``stays`` after it."""
        if self.upward is None:
            return EncodedUpload(sent, sent, stays)
        start = client_start(rules, shared, {}, turn)
        encoded: dict[str, dict[str, Tensor]] = {part: {} for part in sent}
        decoded: dict[str, dict[str, Tensor]] = {part: {} for part in sent}
        residuals: dict[str, dict[str, Tensor]] = {}
        for part, layer in sent.items():
            before = {name: x for name, x in kept.get(part, {}).items() if name.startswith(RESIDUAL)}
            residuals[part] = dict(before)
            for leaf, x in layer.items():
                base, decoded[part][leaf] = start[part].get(leaf), x
                if base is None or not _is_encodable(x):
                    encoded[part][leaf] = x
                    continue
                draws = _generator(turn.seed, "up", part, leaf)
                fields, decoded[part][leaf], error = self._encode_leaf(x, base, before.get(RESIDUAL + leaf), draws)
                encoded[part] |= {f"{leaf}{MARK}{field}": value for field, value in fields.items()}
                if error is not None:
                    residuals[part][RESIDUAL + leaf] = error
        return EncodedUpload(encoded, decoded, {part: {**stays[part], **residuals.get(part, {})} for part in stays})

    def _encode_leaf(
        self, x: Tensor, base: Tensor, residual: Tensor | None, draws: Generator
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """Return a leaf's fields, its decoded value and its new residual."""
        assert self.upward is not None
        if base.shape != x.shape:
            fields = self.upward.encode(x, draws)
            value = self.upward.decode(fields, tuple(x.shape)).to(x)
            return {**fields, SHAPE: torch.tensor(tuple(x.shape), dtype=torch.int32)}, value, None
        change = _add_residual(x - base.to(x), residual)
        fields = self.upward.encode(change, draws)
        got = self.upward.decode(fields, tuple(x.shape)).to(x)
        return fields, base.to(x) + got, change - got if self.error_feedback else None

    def decode_upload(self, rules: Rules, shared: Tree, turn: Turn, encoded: Tree) -> Tree:
        """Decode an upload. ``ValueError`` if it is no encoding of such leaves."""
        if self.upward is None:
            return encoded
        start = client_start(rules, shared, {}, turn)
        decoded = {}
        for part, layer in encoded.items():
            decoded[part], encodings = _separate(layer)
            for leaf, encoding in encodings.items():
                base = _find_leaf(part, leaf, start.get(part, {}))
                shape = _parse_shape(part, leaf, encoding.pop(SHAPE, None), tuple(base.shape))
                got = self.upward.decode(encoding, shape)
                decoded[part][leaf] = base.to(got) + got if shape == tuple(base.shape) else got
        return decoded

    # ----------------------------------------------------------------------------------- down
    def encode_shared(self, before: Tree, after: Tree, seed: int) -> Tree:
        """Replace the leaves of the server's tree by their decoded values, and note their encoding."""
        if self.downward is None:
            return after
        served = {}
        for part, layer in after.items():
            served[part] = dict(layer)
            for leaf, x in public_leaves(layer).items():
                if x is not before[part].get(leaf) and _is_encodable(x):
                    served[part] |= self._encode_shared_leaf(
                        leaf, x, before[part], _generator(seed, "down", part, leaf)
                    )
        return served

    def _encode_shared_leaf(self, leaf: str, x: Tensor, before: Layer, draws: Generator) -> dict[str, Tensor]:
        assert self.downward is not None
        base = before[leaf].to(x) if self.downward.coarse else None
        goal = _add_residual(x, before.get(RESIDUAL + leaf))
        fields = self.downward.encode(goal if base is None else goal - base, draws)
        got = self.downward.decode(fields, tuple(x.shape)).to(x)
        value = got if base is None else base + got
        notes = {f"{ENCODED}{leaf}{MARK}{field}": y for field, y in fields.items()}
        residual = {RESIDUAL + leaf: goal - value} if self.error_feedback else {}
        return {leaf: value, **notes, **residual, VERSION + leaf: before.get(VERSION + leaf, torch.tensor(0)) + 1}

    def encoded_leaf(self, layer: Layer, leaf: str, held: int, version: int) -> Layer | None:
        """The encoded form of a leaf for a client that holds version ``held`` of it; None if it is sent whole.

        A difference is of use only to clients that hold the last version.
        """
        if self.downward is None or VERSION + leaf not in layer or (self.downward.coarse and held != version - 1):
            return None
        fields = self.downward.form(tuple(layer[leaf].shape))
        return {f"{leaf}{MARK}{field}": layer[f"{ENCODED}{leaf}{MARK}{field}"] for field in fields}

    def decode_delivery(self, encoded: Tree, held: Tree) -> Tree:
        """Decode a delivery to a client that holds ``held``. ``ValueError`` as in ``decode_upload``."""
        if self.downward is None:
            return encoded
        decoded = {}
        for part, layer in encoded.items():
            if part not in held:
                continue
            decoded[part], encodings = _separate(layer)
            for leaf, encoding in encodings.items():
                base = _find_leaf(part, leaf, held[part])
                got = self.downward.decode(encoding, tuple(base.shape)).to(base)
                decoded[part][leaf] = base + got if self.downward.coarse else got
        return decoded

    # ---------------------------------------------------------------------------- base updates
    def round_base_update(self, base_update: BaseUpdate) -> BaseUpdate:
        """Round a base update as every client will apply it. ``ValueError`` if float16 cannot hold it."""
        return self.widen(self.narrow(base_update)) if self.base_updates in NARROW else base_update

    def narrow(self, base_update: BaseUpdate) -> BaseUpdate:
        """Cast a rounded base update to the dtype in which it is sent."""
        dtype = NARROW.get(self.base_updates)
        return base_update if dtype is None else _map_factors(base_update, lambda x: _narrow(x, dtype))

    def widen(self, base_update: BaseUpdate) -> BaseUpdate:
        """Cast a received base update to float32."""
        return _map_factors(base_update, lambda x: x.float() if x.dtype in NARROW.values() else x)


def _codec_names(direction: str | list[str]) -> list[str]:
    names = [direction] if isinstance(direction, str) else direction
    return [name for name in names if name != "float32"]


def _takes_share(name: str) -> bool:
    return "share" in {f.name for f in fields(CODECS.load(name))}


def _is_encodable(x: Tensor) -> bool:
    return x.is_floating_point() and x.numel() > 0


def _generator(seed: int, direction: str, part: str, leaf: str) -> Generator:
    return Generator().manual_seed(derive_seed(seed, direction, f"{part}/{leaf}"))


def _add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    """Add the last encoding's error, if the leaf still has that shape."""
    return x if residual is None or residual.shape != x.shape else x + residual.to(x)


def _separate(layer: Layer) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Separate the leaves that were sent unchanged from the fields of the encoded ones."""
    plain: dict[str, Tensor] = {}
    encoded: dict[str, dict[str, Tensor]] = {}
    for name, x in layer.items():
        leaf, mark, field = name.rpartition(MARK)
        if mark:
            encoded.setdefault(leaf, {})[field] = x
        else:
            plain[name] = x
    return plain, encoded


def _find_leaf(part: str, leaf: str, layer: Layer) -> Tensor:
    if leaf not in layer:
        raise ValueError(f"an encoded leaf {leaf!r} of {part!r} came, which the model does not have")
    return layer[leaf]


def _parse_shape(part: str, leaf: str, shape: Tensor | None, largest: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an encoded leaf: ``largest``, or a smaller one that was sent with it."""
    if shape is None:
        return largest
    fits = shape.dtype == torch.int32 and tuple(shape.shape) == (len(largest),)
    sizes = tuple(shape.tolist()) if fits else ()
    if not fits or not all(1 <= size <= most for size, most in zip(sizes, largest)):
        raise ValueError(f"the encoded leaf {leaf!r} of {part!r} says a shape that is not within {largest}")
    return sizes


def _map_factors(base_update: BaseUpdate, change: Callable[[Tensor], Tensor]) -> Mapping[str, tuple[Factors, ...]]:
    return {part: tuple(Factors(change(f.U), change(f.V)) for f in terms) for part, terms in base_update.items()}


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16 and not x.is_meta and bool((x.abs() > LARGEST).any()):
        raise ValueError(
            "compression.base_updates is 'float16', and a base update has numbers beyond 65504; set it to 'bfloat16' "
            "or 'float32'."
        )
    return x.to(dtype)
