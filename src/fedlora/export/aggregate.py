"""Finished adapters, combined: PEFT folders in, a PEFT folder out, weight by weight and without a base model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.export.aggregation_errors import Report
from fedlora.files import check_new_folder
from fedlora.linalg.factors import total, truncate
from fedlora.linalg.geometry import distances
from fedlora.linalg.sums import CACHE_LIMIT
from fedlora.methods import load_merging_method, merging_methods
from fedlora.methods._base import Method, mean, terms, weighted_mean
from fedlora.methods.fedit import FedIT
from fedlora.runs.config import apply_overrides, construct
from fedlora.training.device import Engine
from fedlora.training.peft_folder import AdapterFolder, check_together, save_folder, save_labels
from fedlora.training.peft_keys import strip_wrappers
from fedlora.types import Layer, Outcome, Turn, Upload, Work


@dataclass(frozen=True)
class Combined:
    """One weight: what is served, what is left over, and how far what is served lies from the exact mean."""

    layer: Layer
    rest: Layer | None  # the update that the method folds, as factors of the output's scale
    base_updates: int | None  # the rank of what the method folds
    alpha: float
    figures: Mapping[str, float]


def method_for(name: str, settings: Sequence[str] = ()) -> Method:
    """A method by name, with ``key=value`` settings. ``ValueError`` where it cannot be applied to finished adapters."""
    kind = load_merging_method(name)
    made: Method = construct(kind, "method", apply_overrides({}, settings), skip=("adapter",))
    return made


def aggregate(
    folders: Sequence[str | Path],
    method: Method,
    out: str | Path,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    residual: str | Path | None = None,
    exact: bool = False,
    engine: Engine = Engine(),  # noqa: B008 - frozen
    one_base: bool = False,
) -> Report:
    """Combines PEFT adapters into one and writes it to ``out``; returns the errors against the exact mean.

    ``weights`` are shares of any sum (None: equal). ``rank`` is the output's (None: the largest there is). What a
    method folds goes into a second adapter at ``residual``, or with ``exact`` into the same one. ``engine`` says which
    device and how many threads. ``one_base`` says that the adapters' base models are one, whatever they are called.
    Memory is one weight's factors of all adapters (none of them, beyond ``CACHE_LIMIT`` numbers:
    then they are read anew at every pass), and the output. ``ValueError`` where the adapters do not belong together.
    """
    device = engine.prepare()
    adapters = [replace(AdapterFolder.open(folder), device=device) for folder in folders]
    shares = _shares(weights, len(adapters))
    check_together(adapters, one_base)
    target, second = check_new_folder(out), None if residual is None else check_new_folder(residual)
    if second is not None and second.resolve() == target.resolve():
        raise ValueError(f"--out and --residual are both {str(out)!r}; name two folders.")
    layers, alphas, rests, report = {}, {}, {}, Report()
    dtype = adapters[0].dtype if len({a.dtype for a in adapters}) == 1 else torch.float32
    for part, found in _combined(adapters, method, shares, rank, dtype, exact):
        alphas[part], layers[part] = found.alpha, found.layer
        if found.rest is not None:
            rests[part] = found.rest
            report.rest_ranks[part] = found.rest["A"].shape[-2]
        report.weights[part] = found.figures
        report.ranks[part] = layers[part]["A"].shape[-2]
        _fits(method, found, rank, exact, residual is not None)
    like, whole = _settings(adapters), _whole(adapters, shares)
    digest = next((a.base.digest for a in adapters if a.base.digest), None)
    save_folder(target, like, layers, alphas, whole, dtype, digest)
    labels = _labels(adapters)
    if labels is not None:
        save_labels(target, labels)
    if second is not None and rests:
        # Without a task: for some, PEFT would look for the head in this folder, too. So it would for tokens.
        alone = {"modules_to_save": None, "task_type": None, "trainable_token_indices": None}
        save_folder(second, {**like, **alone}, rests, alphas, None, dtype, digest)
    return report


def _settings(adapters: Sequence[AdapterFolder]) -> dict[str, Any]:
    """The first adapter's settings, as they are for the networks that PEFT loads the output into."""
    first = adapters[0]
    task = next((a.config["task_type"] for a in adapters if a.config.get("task_type")), None)
    found = {**first.config, **({"task_type": task} if task else {})}
    if first.keys.has_renamed_parts:  # the names of wrappers match nothing in a network that has none
        found |= {"target_modules": sorted(first.shapes)}
        found |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        found |= {"modules_to_save": [strip_wrappers(x) for x in first.config.get("modules_to_save") or ()] or None}
    return found


def _labels(adapters: Sequence[AdapterFolder]) -> tuple[str, ...] | None:
    """What the outputs are called, where some adapter says it."""
    return next((a.labels for a in adapters if a.labels is not None), None)


def _fits(method: Method, found: Combined, rank: int | None, exact: bool, residual: bool) -> None:
    """``ValueError`` where the method cannot do what was asked for."""
    own = found.layer["A"].shape[-2]
    if exact and rank is not None:
        raise ValueError("--exact writes the sum of all ranks, so --rank has no place beside it; keep one of them.")
    if rank is not None and own < rank:
        raise ValueError(f"--rank is {rank}, but {method.title} makes no more than rank {own} of these; lower it.")
    if found.base_updates is None and (exact or residual):
        raise ValueError(
            f"{method.title} leaves nothing over for {'--exact' if exact else '--residual'}; leave it out, or take "
            "--method fedex-lora or flora."
        )
    if found.base_updates is not None and not (exact or residual):
        raise ValueError(
            f"{method.title} leaves a residual of rank {found.base_updates} that its adapter cannot hold; add "
            "--residual DIR for a second adapter, or --exact for one adapter of the sum of the ranks."
        )


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise ValueError("no adapters were named; name at least one folder.")
    found = list(weights) if weights is not None else [1.0] * count
    if len(found) != count:
        raise ValueError(f"there are {len(found)} weights for {count} adapters; give one for each.")
    if min(found) < 0 or not 0 < sum(found) < float("inf"):
        raise ValueError(
            f"the weights are {found}; they cannot be negative, and their sum must be above zero and finite."
        )
    return [w / sum(found) for w in found]


def _combined(
    adapters: Sequence[AdapterFolder],
    method: Method,
    shares: Sequence[float],
    rank: int | None,
    dtype: torch.dtype,
    exact: bool,
) -> Iterator[tuple[str, Combined]]:
    parts = list(adapters[0].shapes)
    for group in [parts] if method.whole_model else [[part] for part in parts]:
        rules = {part: _rule(adapters, method, part, rank) for part in group}
        uploads = {part: _uploads(adapters, rules[part], part, shares) for part in group}
        starts = {part: _zeros(rules[part], uploads[part]) for part in group}
        try:
            made = rules[group[0]].combine_all(starts, uploads)
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"the factors of {group[0]!r} are too large to be combined in float32: {error}") from error
        for part in group:
            plain = uploads[part]  # against the adapters as they are, not as a method turned or cut them
            if "send" in vars(type(method)):
                plain = _uploads(adapters, FedIT(rules[part].adapter), part, shares)
            yield part, _judged(rules[part], plain, made[part], rank, dtype, exact)


def _rule(adapters: Sequence[AdapterFolder], method: Method, part: str, rank: int | None) -> Method:
    """The method with the parametrisation that the output has at this weight: the first adapter's scale."""
    ranks = [a.shapes[part][2] for a in adapters]
    if not method.any_rank and len(set(ranks)) > 1:
        able = [name for name, kind in merging_methods().items() if kind.any_rank]
        raise ValueError(
            f"the adapters have ranks {sorted(set(ranks))} at {part!r}, and {method.title} needs one rank for "
            f"all; take one of {', '.join(able)}."
        )
    own = adapters[0].lora(part)
    return replace(method, adapter=replace(own, rank=rank if rank and method.any_rank else max(ranks)))


def _uploads(adapters: Sequence[AdapterFolder], rule: Method, part: str, shares: Sequence[float]) -> list[Upload]:
    """Each adapter's factors of one weight, in the output's scale, and turned or cut where the method sends them so."""
    made: list[Mapping[str, Tensor]] = [_Factors(adapters, rule, part, k) for k in range(len(adapters))]
    m, n, r = adapters[0].shapes[part]
    if len(adapters) * r * (m + n) <= CACHE_LIMIT:  # read once; more than that is read anew at every pass
        made = [dict(layer) for layer in made]
    for adapter, layer in zip(adapters, made):
        adapter.verify(part, layer)
    ranks = [a.shapes[part][2] for a in adapters]
    return [Upload(Turn(1, k, rank), w, layer) for k, (rank, w, layer) in enumerate(zip(ranks, shares, made))]


@dataclass(frozen=True)
class _Factors(Mapping[str, Tensor]):
    """One adapter's factors of one weight, read when they are asked for."""

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
            return self._scaled(self.client, leaf)
        # What a client would turn or cut before sending; the first adapter stands for what it had received. Round 1:
        # the first in which a method that aligns has something to align with.
        first, own = ({x: self._scaled(k, x) for x in "AB"} for k in (0, self.client))
        turn = Turn(1, self.client, own["A"].shape[0])
        return self.rule.send(Work(first, own, frozenset("AB")), turn)[leaf]

    def _scaled(self, client: int, leaf: str) -> Tensor:
        adapter, lora = self.adapters[client], self.rule.adapter
        own = adapter.lora(self.part)
        assert isinstance(lora, LoRA)
        x, ratio = adapter.factor(self.part, leaf), own.scale(own.rank) / lora.scale(own.rank)
        return x if leaf == "A" or ratio == 1 else ratio * x


def _zeros(rule: Method, uploads: Sequence[Upload]) -> Layer:
    """No factors were served before: a zero update of the output's rank."""
    A, B, r = uploads[0].layer["A"], uploads[0].layer["B"], rule.adapter.budget
    return {"A": A.new_zeros(r, A.shape[-1]), "B": B.new_zeros(B.shape[-2], r)}


def _judged(
    rule: Method, uploads: Sequence[Upload], made: Outcome, rank: int | None, dtype: torch.dtype, exact: bool
) -> Combined:
    """What is written of one weight, in the precision it is written in, against the adapters as they are."""
    lora = rule.adapter
    assert isinstance(lora, LoRA)
    layer: Layer = {leaf: made.layer[leaf] for leaf in "AB"}
    if rank is not None and layer["A"].shape[-2] > rank:
        layer = lora.split(truncate(lora.delta(layer), rank))
    rest = lora.split(total(made.base_update)) if made.base_update else None
    base_updates = None if rest is None else rest["A"].shape[-2]
    if exact and rest is not None:  # one adapter of the sum of the ranks
        both = [lora.delta(x) for x in (layer, rest) if bool(x["B"].any())] or [lora.delta(layer)]
        layer, rest = lora.split(total(both)), None
    layer, rest = (x and {leaf: value.to(dtype).float() for leaf, value in x.items()} for x in (layer, rest))
    figures = {"served": [lora.term(x, 1.0) for x in (layer, rest) if x is not None]}
    if len({u.turn.rank for u in uploads}) == 1:
        figures["fedit"] = [lora.term(mean(uploads), 1.0)]
    norm, errors = distances(terms(lora, uploads), list(figures.values()))
    return Combined(layer, rest, base_updates, lora.alpha, {"norm": norm, **dict(zip(figures, errors))})


def _whole(adapters: Sequence[AdapterFolder], shares: Sequence[float]) -> dict[str, Tensor]:
    """Modules that were trained in full: their mean, in the precision that they all have."""
    return {key: _averaged(adapters, shares, key) for key in adapters[0].whole}


def _averaged(adapters: Sequence[AdapterFolder], shares: Sequence[float], key: str) -> Tensor:
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
