"""Export of a run on a network that is no Hugging Face model: a file of weight updates, and a function to apply it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.export._updates import collect_updates, list_adapted_parts
from fedlora.export.model_card import write_card
from fedlora.files import check_new_folder, load_about, load_tree, remove_on_error, save_tree, write
from fedlora.runs.build import attach_adapters
from fedlora.runs.folder import RunFolder
from fedlora.schema import ConfigError
from fedlora.tasks._base import move_batch
from fedlora.tasks._code import Code
from fedlora.types import Factors, Tree

FILE = "update.safetensors"
CLOSE = 1e-4  # largest difference of the outputs in float32, relative to the largest output


def export_update(
    run: RunFolder, out: str | Path, client: int | None = None, rank: int | None = None, code: Code | None = None
) -> dict[str, Any]:
    """Write the shared model's update of the base, or one client's, to a new folder; returns the folder and its errors.

    ``update.safetensors`` has ``NAME.A`` (r n) and ``NAME.B`` (m r) of each adapted weight, whose update is ``B @ A``
    with every scale and base update, and the parameters of each module that was trained in full. ``rank`` truncates
    every update to its best approximation of that rank. With ``code``, the caller's objects, the update is applied to
    a new network, and its outputs are compared with the run's own; if they differ, the folder is removed and
    ``RuntimeError`` is raised.
    """
    tree, folder = run.tree(client), check_new_folder(out)
    cut, about = collect_updates(run, tree, list_adapted_parts(run, tree), client, rank)
    with remove_on_error(folder):
        factors = {part: {"A": f.V, "B": f.U} for part, f in cut.items()}
        about_file = {"about": json.dumps({"adapted": sorted(factors)})}
        save_tree(folder / FILE, {part: factors.get(part, layer) for part, layer in tree.items()}, about_file)
        difference = None if code is None else _compare_outputs(run, folder, code, tree, cut if rank else None)
        if difference is not None and difference > CLOSE:
            raise RuntimeError(
                f"the export's outputs differ from the run's by {difference:.1e} of the largest; please report it."
            )
        write(folder / "README.md", write_card(run.config, run.summary, about, merged=False).encode())
    return {"folder": str(folder), **about, "difference": difference}


@torch.no_grad()
def load_update(network: nn.Module, folder: str | Path) -> nn.Module:
    """Apply an exported update to a network with the run's pretrained weights, in place, and return it.

        import torch
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        rows = [(torch.randn(4), k % 2) for k in range(40)]
        loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        objects = {"model": net, "train": [rows[:20], rows[20:]], "test": rows, "loss": loss}
        fedlora.run(**objects, targets=["0"], head=["2"], rounds=1, out="runs/net").export("exported")

        net = fedlora.load_update(net, "exported")

    Raises ``ValueError`` if a module is missing, or if a shape differs; then nothing is changed.
    """
    path, changes = Path(folder).expanduser() / FILE, []
    if not path.exists():
        raise ConfigError(
            f"{str(folder)!r} has no {FILE}; name a folder that the export of a run on own objects wrote."
        )
    adapted = load_about(path)["adapted"]
    for part, layer in load_tree(path).items():
        try:
            module = network.get_submodule(part)
        except AttributeError as error:
            raise ValueError(
                f"{str(path)!r} changes {part!r}, which the network does not have; give its own."
            ) from error
        if part in adapted:
            delta = layer["B"] @ layer["A"]
            changes.append((part, module, "weight", delta.mT if isinstance(module, Conv1D) else delta, True))
        else:
            changes += [(part, module, leaf, value, False) for leaf, value in layer.items()]
    for part, module, leaf, value, _ in changes:
        old = getattr(module, leaf, None)
        if not isinstance(old, Tensor) or old.shape != value.shape:
            shape = tuple(old.shape) if isinstance(old, Tensor) else "none"
            raise ValueError(
                f"{str(path)!r} has a {leaf} of {tuple(value.shape)} for {part!r}, whose own is {shape}; give the "
                "network of the run."
            )
    for _, module, leaf, value, is_update in changes:
        parameter = getattr(module, leaf)
        fresh = parameter.float() + value.to(parameter.device) if is_update else value
        parameter.copy_(fresh)
    return network


@torch.no_grad()
def _compare_outputs(run: RunFolder, folder: Path, code: Code, tree: Tree, cut: Mapping[str, Factors] | None) -> float:
    """Return the largest difference between the run's model and the reloaded one, relative to the largest output.

    ``cut`` are truncated updates, which replace the run's adapters and base updates.
    """
    batch, seed = code.probe(), run.config.seed
    model = attach_adapters(run.config, code.network(seed))
    blank, updates = (tree, run.base_updates) if cut is None else (model.initial(seed), cut)
    model.load({part: blank[part] if part in (cut or {}) else tree[part] for part in tree})
    model.fold({part: (f,) for part, f in updates.items()})
    expected = compute_outputs(code, model.network, batch)
    here = compute_outputs(code, load_update(code.network(seed), folder), batch)
    largest = max(float(x.abs().max()) for x in expected)
    return max(float((a - b).abs().max()) for a, b in zip(expected, here, strict=True)) / (largest or 1.0)


def compute_outputs(code: Code, network: nn.Module, batch: Any) -> list[Tensor]:
    """Return the tensors that the network puts out while the loss is computed; the loss itself if it puts out none."""
    outputs: list[Tensor] = []
    hook = network.register_forward_hook(lambda module, inputs, output: outputs.extend(_floats(output)))
    try:
        loss = code.loss(network.eval(), move_batch(batch, torch.device("cpu")))
    finally:
        hook.remove()
    return outputs or [loss[None]]


def _floats(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().float()] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [x for part in parts for x in _floats(part)]
