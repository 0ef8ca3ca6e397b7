"""Export of a run that trained a model of PEFT in the caller's own loop: an adapter folder, without the base."""

import shutil
from pathlib import Path
from typing import Any, cast

from fedlora.adapters import LoRA
from fedlora.export.model_card import write_card
from fedlora.export.update import truncation_error
from fedlora.files import check_new_folder, write
from fedlora.linalg.factors import compact, total, truncate
from fedlora.runs.folder import RunFolder
from fedlora.training.peft_folder import save_folder
from fedlora.training.peft_keys import PREFIX
from fedlora.types import Factors, Layer, Tree

OF_VERA = ("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights")


def export_trained_peft(run: RunFolder, out: str | Path, client: int | None, rank: int | None) -> dict[str, Any]:
    """Write the shared adapter of a run on a ``PeftModel``, or a client's, to a new PEFT folder.

    Base updates are part of the adapter, whose rank grows by theirs; ``rank`` truncates every weight's update. Returns
    the folder, the error of the truncation and the ranks.
    """
    tree, folder = run.tree(client), check_new_folder(out)
    adapter, base_updates = run.config.method.adapter, run.base_updates
    parts = [part for part, layer in tree.items() if adapter.trainable & set(layer)]
    whole = {part: _update(run, part, tree) for part in parts}
    cut = {part: truncate(f, rank) if rank and f.V.shape[-2] > rank else f for part, f in whole.items()}
    is_own = isinstance(adapter, LoRA) and not base_updates and not rank  # the run's own factors, without the scale
    layers: dict[str, Layer] = {
        part: {leaf: tree[part][leaf] for leaf in "AB"} if is_own else {"A": f.V, "B": f.U} for part, f in cut.items()
    }
    # If the factors include their scale, alpha = rank makes PEFT's scale one.
    ranks = {part: float(layer["A"].shape[-2]) for part, layer in layers.items()}
    alphas = {part: cast(LoRA, run.adapter_of(part)).alpha for part in parts} if is_own else ranks
    heads = {f"{PREFIX}{part}.{leaf}": x for part in tree if part not in parts for leaf, x in tree[part].items()}
    config = {key: value for key, value in run.peft_config.items() if key not in OF_VERA}
    config |= {"peft_type": "LORA", "use_rslora": is_own and run.peft_config["use_rslora"], "lora_dropout": 0.0}
    about = {
        "client": client, "error": truncation_error(whole, cut),
        "ranks": sorted({f.V.shape[-2] for f in cut.values()}),
    }  # fmt: skip
    try:
        save_folder(folder, config, layers, alphas, heads)
        card = write_card(run.config, run.summary, about, merged=False, peft=run.peft_config)
        write(folder / "README.md", card.encode())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"folder": str(folder), **about, "difference": None}


def _update(run: RunFolder, part: str, tree: Tree) -> Factors:
    """Return a weight's whole difference from the pretrained one: the adapter's update and the base updates."""
    update, more = run.adapter_of(part).delta(tree[part]), run.base_updates.get(part)
    return update if more is None else compact(total([update, more]))
