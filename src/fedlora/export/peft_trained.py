"""Export of a run that trained a model of PEFT in the caller's own loop: an adapter folder, without the base."""

from pathlib import Path
from typing import Any, cast

from fedlora.adapters import LoRA
from fedlora.export._updates import collect_updates, list_adapted_parts
from fedlora.export.model_card import write_card
from fedlora.files import check_new_folder, remove_on_error, write
from fedlora.runs.folder import RunFolder
from fedlora.training.peft_folder import save_folder
from fedlora.training.peft_keys import PREFIX
from fedlora.types import Layer

OF_VERA = ("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights")


def export_trained_peft(run: RunFolder, out: str | Path, client: int | None, rank: int | None) -> dict[str, Any]:
    """Write the shared adapter of a run on a ``PeftModel``, or a client's, to a new PEFT folder.

    Base updates are part of the adapter, whose rank grows by theirs; ``rank`` truncates every weight's update. Returns
    the folder, the error of the truncation and the ranks.
    """
    tree, folder = run.tree(client), check_new_folder(out)
    adapter, parts = run.config.method.adapter, list_adapted_parts(run, tree)
    cut, about = collect_updates(run, tree, parts, client, rank)
    is_own = isinstance(adapter, LoRA) and not run.base_updates and not rank  # the run's own factors, without the scale
    layers: dict[str, Layer] = {
        part: {leaf: tree[part][leaf] for leaf in "AB"} if is_own else {"A": f.V, "B": f.U} for part, f in cut.items()
    }
    # If the factors include their scale, alpha = rank makes PEFT's scale one.
    ranks = {part: float(layer["A"].shape[-2]) for part, layer in layers.items()}
    alphas = {part: cast(LoRA, run.adapter_of(part)).alpha for part in parts} if is_own else ranks
    heads = {f"{PREFIX}{part}.{leaf}": x for part in tree if part not in parts for leaf, x in tree[part].items()}
    config = {key: value for key, value in run.peft_config.items() if key not in OF_VERA}
    config |= {"peft_type": "LORA", "use_rslora": is_own and run.peft_config["use_rslora"], "lora_dropout": 0.0}
    with remove_on_error(folder):
        save_folder(folder, config, layers, alphas, heads)
        card = write_card(run.config, run.summary, about, merged=False, peft=run.peft_config)
        write(folder / "README.md", card.encode())
    return {"folder": str(folder), **about, "difference": None}
