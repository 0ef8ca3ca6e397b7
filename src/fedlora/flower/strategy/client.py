"""The client's two calls: ``receive`` where PEFT's setter of a state dict stood, ``send`` where its getter did.

Both ask the method's own hooks, so they do what a client of fedlora's engine does; the loop between them is yours.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Context, Message
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from fedlora.flower.strategy.instructions import BASE_UPDATES, Instructions, select_trained
from fedlora.flower.strategy.node_memory import NodeMemory
from fedlora.flower.strategy.peft_base import find_lora_layers, fold
from fedlora.flower.strategy.peft_state import MARK, PeftState, encode_mark, read_tensor, split_arrays
from fedlora.methods._base import Method
from fedlora.rounds import Rules, public_leaves
from fedlora.types import Layer, Tree, Turn, Work


def receive(model: Any, message: Message, context: Context) -> Any:
    """Brings a PEFT model to where this client's turn starts, and returns it.

    It takes the place of ``set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())``, before
    the optimiser is made: it cuts the factors to the model's own rank, restores the leaves that the node kept, adds
    the base updates that the base lacks, and freezes the leaves that the method does not train in this round. Without a
    fedlora strategy at the server it only sets the state dict. ``ValueError`` where model and message do not fit.
    """
    instructions = Instructions.read(message)
    if instructions is None:
        return load(model, _find_arrays(message))
    turn = ModelTurn(model, message, context, instructions)
    fold(
        model,
        turn.node.receive_base_updates(
            instructions, message.metadata.message_id, message.content.array_records.get(BASE_UPDATES)
        ),
    )
    set_state(model, {key: turn.held[part][leaf] for (part, leaf), key in turn.own.keys.items()})
    if message.metadata.message_type.startswith("train"):
        turn.freeze()
    return model


def send(model: Any, message: Message, context: Context) -> ArrayRecord:
    """Returns the upload after training; leaves that stay with the client are kept in ``context.state``.

    It takes the place of ``ArrayRecord(get_peft_model_state_dict(model))``. ``ValueError`` where ``receive`` was not
    called for this message, or where a leaf moved that the method freezes.
    """
    instructions = Instructions.read(message)
    if instructions is None:
        return ArrayRecord(get_peft_model_state_dict(_check_peft(model), adapter_name=_active_adapter(model)))
    turn = ModelTurn(model, message, context, instructions)
    if turn.node.message != message.metadata.message_id:
        raise ValueError(
            "fedlora.flower.send was called for a message that receive has not seen; call "
            "fedlora.flower.receive(model, msg, context) before training."
        )
    sent, stays = turn.finish()
    turn.node.save(stays)
    arrays = {
        turn.shared.keys[part, leaf]: Array(x.numpy()) for part, layer in sent.items() for leaf, x in layer.items()
    }
    return ArrayRecord({**arrays, MARK: encode_mark(instructions.round, instructions.last)})


def load(model: Any, arrays: ArrayRecord) -> Any:
    """Brings a PEFT model to a global model, and returns it: the adapter, and what the method has folded into the base.

    It takes the place of ``set_peft_model_state_dict(model, arrays.to_torch_state_dict())`` wherever the server
    evaluates or saves. ``merge_and_unload`` afterwards has both. ``ValueError`` where the two do not fit together.
    """
    plain, base_updates = split_arrays(arrays)
    own = PeftState.of(get_peft_model_state_dict(_check_peft(model), adapter_name=_active_adapter(model)))
    found = PeftState.of({key: read_tensor(key, array) for key, array in plain.items()})
    _check_fit(own, found)
    mine, theirs = (sorted(set(adapter.ranks().values())) for adapter in (own, found))
    if own.ranks() != found.ranks():
        raise ValueError(
            f"the model has ranks {mine} and the arrays {theirs}, or others at some weights; "
            "make the model with the server's LoraConfig."
        )
    fold(model, base_updates)
    set_state(model, {key: found.tree[part][leaf] for (part, leaf), key in own.keys.items()})
    return model


@dataclass
class ModelTurn:
    """One message at one node, for one model."""

    model: Any
    message: Message
    context: Context
    instructions: Instructions

    @cached_property
    def node(self) -> NodeMemory:
        """The node's memory."""
        return NodeMemory.of(self.context.state, self.instructions)

    @cached_property
    def own(self) -> PeftState:
        """The model's adapter as it is now."""
        return PeftState.of(
            get_peft_model_state_dict(_check_peft(self.model), adapter_name=_active_adapter(self.model))
        )

    @cached_property
    def shared(self) -> PeftState:
        """The server's adapter, as it arrived."""
        arrays = self.message.content[self.instructions.arrays]
        found = PeftState.of({key: read_tensor(key, array) for key, array in arrays.items()})
        _check_fit(self.own, found)
        return found

    @cached_property
    def rules(self) -> Rules:
        """The rule of each part."""
        rules = self.instructions.recipe.rules(self.shared)
        ranks, needed = self.own.ranks(), self.shared.ranks()
        for part, rank in ranks.items():
            if rank != needed[part] and not (rules[part].any_rank and rank < needed[part]):
                wanted = "no more than that" if rules[part].any_rank else "one rank for all"
                raise ValueError(
                    f"the model has rank {rank} at {part!r} and the server's adapter {needed[part]}; "
                    f"{rules[part].title} needs {wanted}: set r in the LoraConfig."
                )
        return rules

    @cached_property
    def starts(self) -> Tree:
        """The leaves at the turn's start, in the server's scale."""
        kept = self.node.load()
        return {
            p: public_leaves(r.receive(self.shared.tree[p], kept.get(p, {}), self._turn(p)))
            for p, r in self.rules.items()
        }

    @cached_property
    def held(self) -> Tree:
        """The leaves at the turn's start as the model holds them: in its scale, and padded with zeros to its rank.

        A padded rank has no gradient, since each of its factors is multiplied by the other's zeros.
        """
        return {part: self._widen(part, layer) for part, layer in self.starts.items()}

    def finish(self) -> tuple[Tree, Tree]:
        """Returns the upload and the leaves that stay, by the method's hooks."""
        work = {}
        for part, start in self.starts.items():
            moves = self._select_trained(part)
            for leaf in start.keys() - moves:
                self._check_unmoved(part, leaf)
            work[part] = Work(start, self._narrow(part, self.own.tree[part]), moves)
        sent = {part: rule.send(work[part], self._turn(part)) for part, rule in self.rules.items()}
        stays = {part: rule.keep(work[part], sent[part], self._turn(part)) for part, rule in self.rules.items()}
        return sent, stays

    def freeze(self) -> None:
        """Lets the factors be trained that the method trains in this round, and no others."""
        name = _active_adapter(self.model)
        for part, layer in self._layers.items():
            for leaf, module in (("A", layer.lora_A), ("B", layer.lora_B)):
                module[name].weight.requires_grad_(leaf in self._select_trained(part))

    def _select_trained(self, part: str) -> frozenset[str]:
        return select_trained(self.rules[part], self.starts[part], self._turn(part))

    @cached_property
    def _layers(self) -> dict[str, LoraLayer]:
        layers = find_lora_layers(self.model)
        return {part: layers[part] for part in self.own.adapted}

    def _turn(self, part: str) -> Turn:
        rank = self.own.tree[part]["A"].shape[0] if part in self.own.adapted else 0
        return Turn(self.instructions.round, self.context.node_id, rank, self.instructions.seed)

    def _ratio(self, part: str, rank: int) -> float:
        """From the server's ``B`` of a rank to the model's: the updates ``s B A`` are what must be equal."""
        return _scale(self.rules[part], rank) / self._layers[part].scaling[_active_adapter(self.model)]

    def _widen(self, part: str, layer: Layer) -> Layer:
        if part not in self.own.adapted:
            return layer
        own, rank = self.own.tree[part], layer["A"].shape[0]
        A, B = torch.zeros_like(own["A"]), torch.zeros_like(own["B"])
        A[:rank], B[:, :rank] = layer["A"], layer["B"] * self._ratio(part, rank)
        return {"A": A, "B": B}

    def _narrow(self, part: str, layer: Layer) -> Layer:
        if part not in self.own.adapted:
            return layer
        rank = self.starts[part]["A"].shape[0]
        B = layer["B"][:, :rank] / self._ratio(part, rank)
        return {"A": layer["A"][:rank].contiguous(), "B": B.contiguous()}

    def _check_unmoved(self, part: str, leaf: str) -> None:
        layer, now = self._layers[part], self.own.tree[part][leaf]
        precision = getattr(layer, f"lora_{leaf}")[_active_adapter(self.model)].weight.dtype
        if not torch.equal(now, self.held[part][leaf].to(precision).float()):
            raise ValueError(
                f"{leaf} of {part!r} is not where this turn began, though {self.rules[part].title} freezes it in this "
                "round; call fedlora.flower.receive(model, msg, context) before the optimiser is made, and do not set "
                "the state dict again."
            )


def set_state(model: Any, state: dict[str, Tensor]) -> None:
    """PEFT's setter, which says nothing of keys it does not know. ``ValueError`` names one."""
    unknown = set_peft_model_state_dict(model, state, adapter_name=_active_adapter(model)).unexpected_keys
    if unknown:
        raise ValueError(
            f"PEFT does not know {unknown[0]!r} of its own state dict; report this with your PEFT version."
        )


def _scale(rule: Method, rank: int) -> float:
    return float(rule.adapter.scale(rank))  # type: ignore[attr-defined]


def _check_fit(own: PeftState, found: PeftState) -> None:
    """The model and what arrived have the same parts and leaves, with the same outer shapes."""
    odd = sorted(own.keys.keys() ^ found.keys.keys())
    if odd:
        who = "the model" if odd[0] in own.keys else "the server's adapter"
        raise ValueError(
            f"only {who} has {'.'.join(odd[0])!r}, and {len(odd) - 1} more differ; make both with one LoraConfig "
            "(target_modules, modules_to_save)."
        )
    for part, layer in own.tree.items():
        mine, theirs = (
            [_outer(x, leaf, part in own.adapted) for leaf, x in sorted(t.items())] for t in (layer, found.tree[part])
        )
        if mine != theirs:
            raise ValueError(
                f"{part!r} is {mine} in the model and {theirs} in the server's adapter; start from one base model."
            )


def _outer(x: Tensor, leaf: str, adapted: bool) -> tuple[int, ...]:
    return tuple(x.shape) if not adapted else (x.shape[1] if leaf == "A" else x.shape[0],)


def _check_peft(model: Any) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"the model is a {type(model).__name__}; give fedlora.flower what PEFT's get_peft_model returns."
        )
    return model


def _active_adapter(model: Any) -> str:
    name = _check_peft(model).active_adapter
    if not isinstance(name, str):
        raise ValueError(f"the adapters {name!r} are active at once; call model.set_adapter with one of them.")
    return name


def _find_arrays(message: Message) -> ArrayRecord:
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise ValueError(f"the message holds {len(records)} records of arrays where one is needed.")
    return records[0]
