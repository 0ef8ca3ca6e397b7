"""A run's result as something that others load without fedlora: a PEFT adapter, or a merged model."""

import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import Dense, LoRA
from fedlora.export.model_card import card
from fedlora.files import check_new_folder, write
from fedlora.linalg.factors import compact, total, truncate
from fedlora.linalg.geometry import distances
from fedlora.linalg.sums import Term
from fedlora.runs.build import attach_adapters
from fedlora.runs.config import ConfigError
from fedlora.runs.folder import RunFolder
from fedlora.tasks.networks.pretrained import resolve_model
from fedlora.training.base_model import weights_digest
from fedlora.training.model import Model
from fedlora.training.peft_folder import save_folder, save_labels
from fedlora.training.peft_keys import PREFIX
from fedlora.training.targets import new_modules
from fedlora.types import Factors, Layer, Tree

HEADS = ("classifier", "score")  # ends of paths that PEFT saves of every network for the task SEQ_CLS
CLOSE = 1e-3  # of the largest logit: what a reloaded model may differ by in float32 before the export has failed


def export(
    run: RunFolder, out: str | Path, client: int | None = None, rank: int | None = None, merged: bool = False
) -> dict[str, Any]:
    """Writes the shared model's adapter, or one client's, to a new folder, and returns what was written.

    ``rank`` cuts every weight's update to its best approximation of that rank. ``merged`` writes the whole model
    instead. What was written is loaded again, by PEFT or by transformers, and its logits are compared with the run's
    own model; ``RuntimeError``, and nothing left, where they differ.
    """
    tree, folder = run.tree(client), check_new_folder(out)
    model = attach_adapters(run.config, run.network())
    whole = updates(model, tree, run.base_updates)
    cut = {part: truncate(f, rank) if rank and f.V.shape[-2] > rank else f for part, f in whole.items()}
    about = {"client": client, "error": _cut_off(whole, cut), "ranks": sorted({f.V.shape[-2] for f in cut.values()})}
    heads = {part: tree[part] for part in model.parts if part not in whole}
    wanted = _logits(run, _played(run, model, tree, cut if rank else None))
    try:
        if merged:
            _write_merged(run, folder, cut, heads)
        else:
            _write_adapter(run, folder, model, _layers(run, tree, cut, bool(rank)), heads)
        away = float((_logits(run, _reloaded(run, folder, merged)) - wanted).abs().max() / wanted.abs().max())
        if away > CLOSE:
            raise RuntimeError(
                f"the export's logits differ from the run's by {away:.1e} of the largest; please report it."
            )
        write(folder / "README.md", card(run.config, run.summary, about, merged).encode())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"folder": str(folder), **about, "difference": away}


def updates(model: Model, tree: Tree, base_updates: Mapping[str, Factors]) -> dict[str, Factors]:
    """All that separates each adapted weight from the pretrained one: the adapter's update and what was folded."""
    found = {}
    for part, p in model.parts.items():
        if not isinstance(p.adapter, Dense):
            own = p.adapter.delta(tree[part])
            both = [f for f in (own, base_updates.get(part)) if f is not None and bool(f.U.any())]
            found[part] = compact(total(both)) if both else own
    return found


def _cut_off(whole: Mapping[str, Factors], cut: Mapping[str, Factors]) -> float:
    """What truncation lost, relative to all updates together (Frobenius)."""
    pairs = [(Term(1.0, *whole[part]), Term(1.0, *cut[part])) for part in whole if cut[part] is not whole[part]]
    lost = sum((norm * away[0]) ** 2 for norm, away in (distances([f], [[c]]) for f, c in pairs))
    everything = sum(distances([Term(1.0, *f)], [])[0] ** 2 for f in whole.values())
    return float(lost / everything) ** 0.5 if everything else 0.0


def _layers(
    run: RunFolder, tree: Tree, cut: Mapping[str, Factors], truncated: bool
) -> tuple[dict[str, Layer], LoRA | None]:
    """Each weight's factors, and the run's own LoRA; None: factors with their scale inside."""
    adapter = run.config.method.adapter
    if isinstance(adapter, LoRA) and not run.base_updates and not truncated:
        return {part: {leaf: tree[part][leaf] for leaf in "AB"} for part in cut}, adapter
    return {part: {"A": f.V, "B": f.U} for part, f in cut.items()}, None


def _write_adapter(
    run: RunFolder,
    folder: Path,
    model: Model,
    made: tuple[Mapping[str, Layer], LoRA | None],
    heads: Mapping[str, Layer],
) -> None:
    layers, lora = made
    bases = [model.parts[part].module.base for part in layers]
    network, task = run.network(), run.config.task
    roots = find_modules_to_save(network, heads, task.peft)
    kind = type(network)
    config = {
        "peft_type": "LORA",
        "task_type": task.peft,
        # PEFT's word for networks that it has no task for.
        "auto_mapping": None if task.peft else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": run.config.model.name,
        "target_modules": sorted(layers),
        "modules_to_save": roots or None,
        "fan_in_fan_out": any(isinstance(base, Conv1D) for base in bases),
        "use_rslora": lora is not None and lora.use_rslora,
        "bias": "none",
        "lora_dropout": 0.0,
    }
    # Where the scale is inside the factors, alpha = rank makes PEFT's scale one.
    alphas = {part: lora.alpha if lora else float(layer["A"].shape[-2]) for part, layer in layers.items()}
    whole = {f"{path}.{leaf}": x for path in roots for leaf, x in network.get_submodule(path).state_dict().items()}
    whole |= {f"{part}.{leaf}": x for part, layer in heads.items() for leaf, x in layer.items()}
    whole = {f"{PREFIX}{name}": x for name, x in whole.items()}
    digest = weights_digest(resolve_model(run.config.model.name))
    save_folder(folder, config, layers, alphas, whole, base_digest=digest)
    if run.summary["labels"] and not task.brings_head:
        save_labels(folder, run.summary["labels"])


def find_modules_to_save(network: nn.Module, heads: Iterable[str], task: str | None) -> list[str]:
    """PEFT's ``modules_to_save``: what was trained in full, and what the checkpoint lacks, trained or not.

    For classifiers PEFT itself saves more than was asked for, and it cannot save a module inside a saved one.
    """
    paths = [path for path, _ in network.named_modules()]
    found = {*heads, *(path for path in new_modules(network) if network.get_submodule(path).state_dict())}
    if task == "SEQ_CLS":
        found |= {path for path in paths if path.endswith(HEADS)}
    return sorted(path for path in found if not any(path.startswith(f"{other}.") for other in found))


@torch.no_grad()
def _write_merged(run: RunFolder, folder: Path, cut: Mapping[str, Factors], heads: Mapping[str, Layer]) -> None:
    network = run.network()
    for part, f in cut.items():
        module = network.get_submodule(part)
        module.weight += f.dense().mT if isinstance(module, Conv1D) else f.dense()
    for part, layer in heads.items():
        for leaf, x in layer.items():
            getattr(network.get_submodule(part), leaf).copy_(x)
    network.save_pretrained(folder)
    preprocessor = run.config.task.preprocessor(run.config.model.name)
    if preprocessor is not None:
        preprocessor.save_pretrained(folder)


def _played(run: RunFolder, model: Model, tree: Tree, instead: Mapping[str, Factors] | None) -> nn.Module:
    """The run's own model; or with other updates in the place of its adapters and base updates."""
    if instead is None:
        model.load(tree)
        model.fold({part: (f,) for part, f in run.base_updates.items()})
    else:
        blank = model.initial(run.config.seed)
        model.load({part: blank[part] if part in instead else tree[part] for part in model.parts})
        model.fold({part: (f,) for part, f in instead.items()})
    return model.network


def _reloaded(run: RunFolder, folder: Path, merged: bool) -> nn.Module:
    if merged:
        return run.config.task.network(str(folder), len(run.summary["labels"]), run.config.seed)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(
            "an export is checked with PEFT, which is not installed: pip install 'fedlora[peft]'."
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT's own business
        return PeftModel.from_pretrained(run.network(), folder)


@torch.no_grad()
def _logits(run: RunFolder, network: nn.Module) -> Tensor:
    network.eval()
    found: Tensor = network(**run.config.task.probe(network)).logits
    return found
