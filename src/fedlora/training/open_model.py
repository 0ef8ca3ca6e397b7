"""Adapters of this library on any network, and the ``Model`` of a network that has adapters."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fedlora.adapters import Adapter
from fedlora.training.model import Model
from fedlora.training.peft_model import attach_peft, main_adapter

ATTRIBUTE = "_fedlora_model"


def attach(
    module: nn.Module, adapter: Adapter, targets: Sequence[str] | str | None = None,
    head: Sequence[str] | None = None, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """Put an adapter of this library on a network in place, and return the network.

        import torch
        net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        net = fedlora.attach(net, fedlora.LoRA(rank=2), targets=["0"], head=["2"])
        session = fedlora.Session(net, method="fedrot-lora", clients=3)

    The network's own weights are frozen; the adapter's leaves and the modules of ``head`` are trainable, and a forward
    pass includes them. ``fedlora.Session`` and ``fedlora.federate`` take the network with any method of that adapter.

    Args:
        module: any network with ``Linear`` or ``Conv1D`` layers.
        adapter: the parametrisation, such as ``fedlora.MultiHead(heads=4)``.
        targets: the weights to adapt: names, ``"all-linear"`` or a regular expression of paths. None: the usual query
            and value projections.
        head: the modules trained in full. None: the new modules of a pretrained network; ``[]``: none.
        seed: of the first leaves; a session or a run draws them again, from its own seed.

    Raises ``ValueError`` if a pattern matches nothing, or if the network has an adapter already.
    """
    if ATTRIBUTE in module.__dict__:
        raise ValueError("the network has an adapter of fedlora already; attach to a new copy of the network.")
    model = Model.attach(module, adapter, targets, head, device=next(module.parameters()).device)
    model.reset(seed)
    module.__dict__[ATTRIBUTE] = model
    return module


def open_model(network: Any) -> Model:
    """Return the ``Model`` of a network with adapters: of ``attach``, or a ``PeftModel``.

    The base is the pretrained one again, whatever an earlier run or session has added to it. A ``PeftModel`` begins
    with the factors that it has now, and a network of ``attach`` with leaves that are drawn from the run's seed.

    Raises ``ValueError`` for a network without adapters, or with one that is not understood.
    """
    known = getattr(network, "__dict__", {}).get(ATTRIBUTE)
    model = known if isinstance(known, Model) else attach_peft(network)
    model.unfold()
    return model


def find_adapter(model: Model) -> Adapter:
    """Return the adapter of a model; single weights of a ``PeftModel`` may have another rank or scale."""
    if model.remote_adapter is not None:
        return model.remote_adapter
    first = next(part for part in model.parts.values() if part.base is not None)
    return first.adapter if first.from_seed else main_adapter(model.network)
