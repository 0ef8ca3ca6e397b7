"""Aggregation of finished adapters: from PEFT folders to a PEFT folder, weight by weight, without a base model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.files import check_new_folder
from fedlora.linalg.factors import total, truncate
from fedlora.linalg.geometry import distances
from fedlora.linalg.sums import CACHE_LIMIT
from fedlora.methods import load_merging_method, merging_methods
from fedlora.methods._base import Method, mean, terms, weighted_mean
from fedlora.methods.fedit import FedIT
from fedlora.runs.config import Overrides, to_table
from fedlora.runs.table import Table, format_relative, from_pairs, to_html
from fedlora.schema import construct
from fedlora.training.device import Engine
from fedlora.training.peft_folder import AdapterFolder, check_together, save_folder, save_labels
from fedlora.training.peft_keys import strip_wrappers
from fedlora.types import Layer, Outcome, Turn, Upload, Work


@dataclass(frozen=True)
class CombinedWeight:
    """The aggregate of one weight."""

    layer: Layer  # the served factors
    rest: Layer | None  # the method's base update, as factors of the output's scale
    rest_rank: int | None  # the rank of the method's base update
    alpha: float
    figures: Mapping[str, float]  # errors against the exact mean


@dataclass(frozen=True)
class AggregationReport:
    """Relative errors against the exact mean, weight by weight and over all weights."""

    weights: Mapping[str, Mapping[str, float]]
    ranks: set[int]
    rest_ranks: set[int]
    adapters: int  # how many were combined
    folder: Path
    method: str  # its title

    @property
    def errors(self) -> dict[str, float]:
        """Each weight's error, ``‖served - W*‖ / ‖W*‖`` (Frobenius norms), where ``W*`` is the exact mean."""
        return {part: row["served"] for part, row in self.weights.items()}

    def _repr_html_(self) -> str:
        return to_html(tabulate_aggregation(self.as_table()))

    def total(self, name: str) -> float | None:
        """Return ``√Σ ‖error‖² / √Σ ‖W*‖²`` over all weights."""
        rows = [row for row in self.weights.values() if name in row]
        squares = sum(row["norm"] ** 2 for row in rows)
        return (sum((row[name] * row["norm"]) ** 2 for row in rows) / squares) ** 0.5 if squares else None

    def as_table(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "method": self.method,
            "adapters": self.adapters,
            "folder": str(self.folder),
            "error": self.total("served"),
            "error_fedit": self.total("fedit"),
            "ranks": sorted(self.ranks),
            "residual_ranks": sorted(self.rest_ranks),
            "weights": {part: dict(row) for part, row in self.weights.items()},
        }


def build_method(name: str, settings: Overrides = ()) -> Method:
    """Build a method by name, with its settings; ``ValueError`` if it does not fit finished adapters."""
    kind = load_merging_method(name)
    method: Method = construct(kind, "method", to_table({}, settings), skip=("adapter",))
    return method


def aggregate_adapters(
    folders: Sequence[str | Path],
    method: Method,
    out: str | Path,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    residual: str | Path | None = None,
    exact: bool = False,
    engine: Engine = Engine(),  # noqa: B008 - frozen
    one_base: bool = False,
) -> AggregationReport:
    """Combine PEFT adapters into one and write it to ``out``; returns the errors against the exact mean.

    Memory holds the output and one weight's factors of all adapters, which are read anew at every pass beyond
    ``CACHE_LIMIT`` numbers.

    Args:
        weights: Shares of any sum; equal if None.
        rank: The output's rank; the largest of the adapters' if None.
        residual: The folder of a second adapter, for the method's base update.
        exact: Put the base update into the same adapter instead.
        engine: The device and the number of threads.
        one_base: The adapters' base models are one, under different names.

    Raises:
        ValueError: The adapters do not belong together, or the method cannot produce the wanted output.
    """
    device = engine.prepare()
    adapters = [replace(AdapterFolder.open(folder), device=device) for folder in folders]
    shares = _normalise(weights, len(adapters))
    check_together(adapters, one_base)
    target, second = check_new_folder(out), None if residual is None else check_new_folder(residual)
    if second is not None and second.resolve() == target.resolve():
        raise ValueError(f"--out and --residual are both {str(out)!r}; name two folders.")
    layers, alphas, rests, figures = {}, {}, {}, {}
    dtype = adapters[0].dtype if len({a.dtype for a in adapters}) == 1 else torch.float32
    for part, combined in _combine(adapters, method, shares, rank, dtype, exact):
        layers[part], alphas[part], figures[part] = combined.layer, combined.alpha, combined.figures
        if combined.rest is not None:
            rests[part] = combined.rest
        _check_options(method, combined, rank, exact, residual is not None)
    like, whole = _merge_settings(adapters), {key: _average_module(adapters, shares, key) for key in adapters[0].whole}
    digest = next((a.base.digest for a in adapters if a.base.digest), None)
    save_folder(target, like, layers, alphas, whole, dtype, digest)
    labels = next((a.labels for a in adapters if a.labels is not None), None)
    if labels is not None:
        save_labels(target, labels)
    if second is not None and rests:
        # Without task and tokens: PEFT would look for the head and the tokens in this folder, too.
        alone = {"modules_to_save": None, "task_type": None, "trainable_token_indices": None}
        save_folder(second, {**like, **alone}, rests, alphas, None, dtype, digest)
    ranks, rest_ranks = ({layer["A"].shape[-2] for layer in part_layers.values()} for part_layers in (layers, rests))
    return AggregationReport(figures, ranks, rest_ranks, len(adapters), Path(out), method.title)


def _merge_settings(adapters: Sequence[AdapterFolder]) -> dict[str, Any]:
    """Return the first adapter's settings, changed to fit the networks that PEFT loads the output into."""
    first = adapters[0]
    task = next((a.config["task_type"] for a in adapters if a.config.get("task_type")), None)
    settings = {**first.config, **({"task_type": task} if task else {})}
    if any(part != path for part, path in first.keys.paths.items()):  # a network without wrappers has no such names
        settings |= {"target_modules": sorted(first.shapes)}
        settings |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        settings |= {"modules_to_save": [strip_wrappers(x) for x in first.config.get("modules_to_save") or ()] or None}
    return settings


def _check_options(method: Method, combined: CombinedWeight, rank: int | None, exact: bool, residual: bool) -> None:
    """Raise ``ValueError`` if the method cannot produce the wanted output."""
    largest = combined.layer["A"].shape[-2]
    if exact and rank is not None:
        raise ValueError("--exact writes the sum of all ranks, so --rank has no place beside it; keep one of them.")
    if rank is not None and largest < rank:
        raise ValueError(f"--rank is {rank}, but {method.title} makes no more than rank {largest} of these; lower it.")
    if combined.rest_rank is None and (exact or residual):
        raise ValueError(
            f"{method.title} leaves nothing over for {'--exact' if exact else '--residual'}; leave it out, or take "
            "--method fedex-lora or flora."
        )
    if combined.rest_rank is not None and not (exact or residual):
        raise ValueError(
            f"{method.title} leaves a residual of rank {combined.rest_rank} that its adapter cannot hold; add "
            "--residual DIR for a second adapter, or --exact for one adapter of the sum of the ranks."
        )


def _normalise(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise ValueError("no adapters were named; name at least one folder.")
    shares = list(weights) if weights is not None else [1.0] * count
    if len(shares) != count:
        raise ValueError(f"there are {len(shares)} weights for {count} adapters; give one for each.")
    if min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise ValueError(
            f"the weights are {shares}; they cannot be negative, and their sum must be above zero and finite."
        )
    return [share / sum(shares) for share in shares]


def _combine(
    adapters: Sequence[AdapterFolder],
    method: Method,
    shares: Sequence[float],
    rank: int | None,
    dtype: torch.dtype,
    exact: bool,
) -> Iterator[tuple[str, CombinedWeight]]:
    parts = list(adapters[0].shapes)
    for group in [parts] if method.whole_model else [[part] for part in parts]:
        rules = {part: _build_rule(adapters, method, part, rank) for part in group}
        uploads = {part: _build_uploads(adapters, rules[part], part, shares) for part in group}
        starts = {}  # a zero update of the output's rank: no factors were served before
        for part in group:
            A, B, r = uploads[part][0].layer["A"], uploads[part][0].layer["B"], rules[part].adapter.budget
            starts[part] = {"A": A.new_zeros(r, A.shape[-1]), "B": B.new_zeros(B.shape[-2], r)}
        try:
            outcomes = rules[group[0]].combine_all(starts, uploads)
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"the factors of {group[0]!r} are too large to be combined in float32: {error}") from error
        for part in group:
            plain = uploads[part]  # the adapters themselves, before a method rotates or truncates them
            if "send" in vars(type(method)):
                plain = _build_uploads(adapters, FedIT(rules[part].adapter), part, shares)
            yield part, _measure(rules[part], plain, outcomes[part], rank, dtype, exact)


def _build_rule(adapters: Sequence[AdapterFolder], method: Method, part: str, rank: int | None) -> Method:
    """Build the method with the output's parametrisation of this weight, which has the first adapter's scale."""
    ranks = [a.shapes[part][2] for a in adapters]
    if not method.any_rank and len(set(ranks)) > 1:
        able = [name for name, kind in merging_methods().items() if kind.any_rank]
        raise ValueError(
            f"the adapters have ranks {sorted(set(ranks))} at {part!r}, and {method.title} needs one rank for "
            f"all; take one of {', '.join(able)}."
        )
    lora = adapters[0].lora(part)
    return replace(method, adapter=replace(lora, rank=rank if rank and method.any_rank else max(ranks)))


def _build_uploads(adapters: Sequence[AdapterFolder], rule: Method, part: str, shares: Sequence[float]) -> list[Upload]:
    """Build an upload for each adapter: its factors of one weight in the output's scale, as the method sends them."""
    layers: list[Mapping[str, Tensor]] = [_Factors(adapters, rule, part, k) for k in range(len(adapters))]
    m, n, r = adapters[0].shapes[part]
    if len(adapters) * r * (m + n) <= CACHE_LIMIT:  # read once; more is read anew at every pass
        layers = [dict(layer) for layer in layers]
    for adapter, layer in zip(adapters, layers):
        adapter.verify(part, layer)
    ranks = [a.shapes[part][2] for a in adapters]
    return [Upload(Turn(1, k, rank), w, layer) for k, (rank, w, layer) in enumerate(zip(ranks, shares, layers))]


@dataclass(frozen=True)
class _Factors(Mapping[str, Tensor]):
    """One adapter's factors of one weight, which are read at each access."""

    adapters: Sequence[AdapterFolder]
    rule: Method
    part: str
    client: int

    def __iter__(self) -> Iterator[str]:
        return iter("AB")

    def __contains__(self, leaf: object) -> bool:  # without reading it
        return leaf in ("A", "B")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, leaf: str) -> Tensor:
        if "send" not in vars(type(self.rule)):
            return self._scale(self.client, leaf)
        # The method rotates or truncates before sending; the first adapter stands for the factors that a client has
        # received. Round 1 is the first in which a method has such factors to align with.
        first, own = ({x: self._scale(k, x) for x in "AB"} for k in (0, self.client))
        turn = Turn(1, self.client, own["A"].shape[0])
        return self.rule.send(Work(first, own, frozenset("AB")), turn)[leaf]

    def _scale(self, client: int, leaf: str) -> Tensor:
        adapter, lora = self.adapters[client], self.rule.adapter
        own = adapter.lora(self.part)
        assert isinstance(lora, LoRA)
        x, ratio = adapter.factor(self.part, leaf), own.scale(own.rank) / lora.scale(own.rank)
        return x if leaf == "A" or ratio == 1 else ratio * x


def _measure(
    rule: Method, uploads: Sequence[Upload], outcome: Outcome, rank: int | None, dtype: torch.dtype, exact: bool
) -> CombinedWeight:
    """Round one weight's aggregate to the precision of the file, and measure it against the adapters."""
    lora = rule.adapter
    assert isinstance(lora, LoRA)
    layer: Layer = {leaf: outcome.layer[leaf] for leaf in "AB"}
    if rank is not None and layer["A"].shape[-2] > rank:
        layer = lora.split(truncate(lora.delta(layer), rank))
    rest = lora.split(total(outcome.base_update)) if outcome.base_update else None
    rest_rank = None if rest is None else rest["A"].shape[-2]
    if exact and rest is not None:  # one adapter of the sum of the ranks
        both = [lora.delta(x) for x in (layer, rest) if bool(x["B"].any())] or [lora.delta(layer)]
        layer, rest = lora.split(total(both)), None
    layer, rest = (x and {leaf: value.to(dtype).float() for leaf, value in x.items()} for x in (layer, rest))
    figures = {"served": [lora.term(x, 1.0) for x in (layer, rest) if x is not None]}
    if len({u.turn.rank for u in uploads}) == 1:
        figures["fedit"] = [lora.term(mean(uploads), 1.0)]
    norm, errors = distances(terms(lora, uploads), list(figures.values()))
    return CombinedWeight(layer, rest, rest_rank, lora.alpha, {"norm": norm, **dict(zip(figures, errors))})


def _average_module(adapters: Sequence[AdapterFolder], shares: Sequence[float], key: str) -> Tensor:
    """Average a module that was trained in full, in the adapters' common precision."""
    stored = adapters[0].raw_tensor(adapters[0].file_key(key))
    if not stored.is_floating_point():  # counts and the like have no mean
        for other in adapters[1:]:
            if not torch.equal(stored, other.raw_tensor(other.file_key(key))):
                raise ValueError(
                    f"{key!r} holds {stored.dtype} and differs between {str(adapters[0].path)!r} and "
                    f"{str(other.path)!r}; only floats can be averaged, so train without this module."
                )
        return stored
    mean = weighted_mean(shares, (a.check_finite(key, a.parameter(key)) for a in adapters), key)
    kinds = {a.dtypes[a.file_key(key)] for a in adapters}
    return mean.to(kinds.pop() if len(kinds) == 1 else torch.float32)


def tabulate_aggregation(result: Mapping[str, Any]) -> Table:
    """Build the table of an aggregation: its ranks and errors."""
    count = result["adapters"]
    worst = max(result["weights"], key=lambda part: result["weights"][part]["served"])
    return from_pairs(f"{count} adapter{'' if count == 1 else 's'} combined", [
        ("weights", str(len(result["weights"]))),
        ("ranks", ", ".join(map(str, result["ranks"]))),
        ("error against the exact mean", format_relative(result["error"])),
        ("the same, of the averaged factors", format_relative(result["error_fedit"])),
        (f"largest error, at {worst}", format_relative(result["weights"][worst]["served"])),
        ("folder", result["folder"]),
    ])  # fmt: skip
