"""Export of a run's result for use without fedlora: a PEFT adapter, or a merged model."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import Dense, LoRA
from fedlora.export._updates import collect_updates
from fedlora.export.model_card import write_card
from fedlora.export.peft_trained import export_trained_peft
from fedlora.export.update import export_update
from fedlora.files import check_new_folder, remove_on_error, write
from fedlora.runs.build import attach_adapters
from fedlora.runs.folder import RunFolder
from fedlora.runs.table import Column, Table, format_relative
from fedlora.schema import ConfigError
from fedlora.tasks._code import Code
from fedlora.tasks.networks.pretrained import resolve_model
from fedlora.training.base_model import weights_digest
from fedlora.training.model import Model
from fedlora.training.peft_folder import save_folder, save_labels
from fedlora.training.peft_keys import PREFIX
from fedlora.training.precision import HALF
from fedlora.training.targets import new_modules
from fedlora.types import Factors, Layer, Tree

HEADS = ("classifier", "score")  # ends of paths that PEFT saves of every network for the task SEQ_CLS
CLOSE_HALF = 5e-2  # the same in bfloat16, whose steps are 2^-8 of a number
CLOSE = 1e-3  # largest difference of a reloaded model's logits in float32, relative to the largest logit


def export_model(
    run: RunFolder,
    out: str | Path,
    client: int | None = None,
    rank: int | None = None,
    merged: bool = False,
    code: Code | None = None,
) -> dict[str, Any]:
    """Write the shared model's adapter, or one client's, to a new folder; returns the folder and its errors.

    ``rank`` truncates every weight's update to its best approximation of that rank. ``merged`` writes the whole model
    instead. The export is loaded again, by PEFT or by transformers, and its logits are compared with those of the
    run's own model. If they differ, the folder is removed and ``RuntimeError`` is raised. For a run on Python objects
    see ``export_update``; ``code`` are these objects, if they are here.
    """
    if run.config.task.is_own_code:
        if run.peft_config and not merged:
            return export_trained_peft(run, out, client, rank)
        if merged:
            raise ConfigError(
                "the model of this run was a Python object, so no whole model can be written; export its update, and "
                "apply that to the model with fedlora.load_update."
            )
        return export_update(run, out, client, rank, code)
    tree, folder = run.tree(client), check_new_folder(out)
    network = run.network()
    is_half = any(x.dtype in HALF for x in network.parameters())
    model = attach_adapters(run.config, network, "bf16" if is_half else "float32")
    parts = [part for part, p in model.parts.items() if not isinstance(p.adapter, Dense)]
    cut, about = collect_updates(run, tree, parts, client, rank)
    heads = {part: tree[part] for part in model.parts if part not in cut}
    # A truncated update is folded into the base instead of the adapter and the base updates.
    blank, updates = (model.initial(run.config.seed), cut) if rank else (tree, run.base_updates)
    model.load({part: blank[part] if part in cut else tree[part] for part in model.parts})
    model.fold({part: (f,) for part, f in updates.items()})
    expected = _compute_logits(run, model.network, is_half)
    with remove_on_error(folder):
        if merged:
            _merge_and_write(run, folder, cut, heads)
        else:
            _write_adapter(run, folder, model, tree, cut, heads, bool(rank))
        logits = _compute_logits(run, _reload(run, folder, merged, is_half), is_half)
        difference = float((logits - expected).abs().max() / expected.abs().max())
        if difference > (CLOSE_HALF if is_half else CLOSE):
            raise RuntimeError(
                f"the export's logits differ from the run's by {difference:.1e} of the largest; please report it."
            )
        write(folder / "README.md", write_card(run.config, run.summary, about, merged).encode())
    return {"folder": str(folder), **about, "difference": difference}


def _write_adapter(
    run: RunFolder, folder: Path, model: Model, tree: Tree, cut: Mapping[str, Factors], heads: Mapping[str, Layer],
    truncated: bool,
) -> None:  # fmt: skip
    adapter, lora = run.config.method.adapter, None
    layers: dict[str, Layer] = {part: {"A": f.V, "B": f.U} for part, f in cut.items()}
    if isinstance(adapter, LoRA) and not run.base_updates and not truncated:  # the run's own factors, without the scale
        layers, lora = {part: {leaf: tree[part][leaf] for leaf in "AB"} for part in cut}, adapter
    bases = [model.parts[part].module.base for part in layers]
    network, task = run.network(), run.config.task
    roots = find_modules_to_save(network, heads, task.peft)
    kind = type(network)
    config = {
        "peft_type": "LORA",
        "task_type": task.peft,
        # PEFT's setting for networks without one of its tasks.
        "auto_mapping": None if task.peft else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": run.config.model.name,
        "target_modules": sorted(layers),
        "modules_to_save": roots or None,
        "fan_in_fan_out": any(isinstance(base, Conv1D) for base in bases),
        "use_rslora": lora is not None and lora.use_rslora,
        "bias": "none",
        "lora_dropout": 0.0,
    }
    # If the factors include their scale, alpha = rank makes PEFT's scale one.
    alphas = {part: lora.alpha if lora else float(layer["A"].shape[-2]) for part, layer in layers.items()}
    whole = {f"{path}.{leaf}": x for path in roots for leaf, x in network.get_submodule(path).state_dict().items()}
    whole |= {f"{part}.{leaf}": x for part, layer in heads.items() for leaf, x in layer.items()}
    whole = {f"{PREFIX}{name}": x for name, x in whole.items()}
    digest = weights_digest(resolve_model(run.config.model.name))
    save_folder(folder, config, layers, alphas, whole, base_digest=digest)
    if run.summary["labels"] and not task.brings_head:
        save_labels(folder, run.summary["labels"])


def find_modules_to_save(network: nn.Module, heads: Iterable[str], task: str | None) -> list[str]:
    """Return PEFT's ``modules_to_save``: the modules trained in full, and those that the checkpoint lacks.

    For classifiers PEFT saves further modules by itself, and it cannot save a module inside a saved one.
    """
    paths = [path for path, _ in network.named_modules()]
    modules = {*heads, *(path for path in new_modules(network) if network.get_submodule(path).state_dict())}
    if task == "SEQ_CLS":
        modules |= {path for path in paths if path.endswith(HEADS)}
    return sorted(path for path in modules if not any(path.startswith(f"{other}.") for other in modules))


@torch.no_grad()
def _merge_and_write(run: RunFolder, folder: Path, cut: Mapping[str, Factors], heads: Mapping[str, Layer]) -> None:
    network = run.network(stored=True)
    for part, f in cut.items():
        module = network.get_submodule(part)
        change = f.dense().mT if isinstance(module, Conv1D) else f.dense()
        module.weight.copy_(module.weight.float() + change)  # in float32, rounded once
    for part, layer in heads.items():
        for leaf, x in layer.items():
            getattr(network.get_submodule(part), leaf).copy_(x)
    network.save_pretrained(folder)
    preprocessor = run.config.task.preprocessor(run.config.model.name)
    if preprocessor is not None:
        preprocessor.save_pretrained(folder)


def _reload(run: RunFolder, folder: Path, merged: bool, is_half: bool) -> nn.Module:
    if merged:
        loading = {"loading": {"dtype": torch.bfloat16}} if is_half else {}
        return run.config.task.network(str(folder), len(run.summary["labels"]), run.config.seed, **loading)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(
            "an export is checked with PEFT, which is not installed: pip install 'fedlora[peft]'."
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # raised inside PEFT
        return PeftModel.from_pretrained(run.network(), folder)


@torch.no_grad()
def _compute_logits(run: RunFolder, network: nn.Module, is_half: bool) -> Tensor:
    network.eval()
    with torch.autocast("cpu", torch.bfloat16) if is_half else nullcontext():
        logits: Tensor = network(**run.config.task.probe(network)).logits
    return logits.float()


def tabulate_exports(exports: Sequence[Mapping[str, Any]]) -> Table:
    """Build the table of exported folders, with their distances from the run's own model."""
    rows = [
        {"folder": row["folder"], "client": "shared" if row["client"] is None else str(row["client"]),
         "ranks": ", ".join(map(str, row["ranks"])), "error": format_relative(row["error"]),
         "difference": format_relative(row["difference"])}
        for row in exports
    ]  # fmt: skip
    columns = (Column("folder", "folder"), Column("client", "client"), Column("ranks", "ranks"),
               Column("error", "cut off"), Column("difference", "largest difference of logits"))  # fmt: skip
    return Table("exports", "Exported, loaded again and compared", columns, rows)
