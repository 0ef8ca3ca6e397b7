"""The client's two calls: ``receive`` replaces PEFT's setter of a state dict, and ``send`` replaces its getter.

Both call the method's own hooks, as a client of fedlora's engine does; the training loop between them is the user's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from flwr.app import Array, ArrayRecord, Context, Message
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.flower.strategy.arrays import MARK, encode_mark, read_state, split_arrays
from fedlora.flower.strategy.instructions import BASE_UPDATES, Instructions
from fedlora.flower.strategy.node_memory import NodeMemory
from fedlora.rounds import Rules, public_leaves
from fedlora.training.model import Model
from fedlora.training.open_model import open_model
from fedlora.training.own_trainer import check_turn
from fedlora.training.peft_model import active_adapter, attach_peft
from fedlora.training.peft_state import PeftState
from fedlora.training.recipe import trainable_leaves
from fedlora.types import Factors, Layer, Tree, Turn, Work


def receive(model: Any, message: Message, context: Context) -> Any:
    """Set a PEFT model to the start of this client's turn, and return it.

    Replaces ``set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())``. Call it before the
    optimiser is created: it cuts the factors to the model's own rank, restores the leaves that the node kept, adds
    missing base updates to the base, and freezes the leaves that the method does not train in this round. If the
    server's strategy is not fedlora's, it only sets the state dict. Raises ``ValueError`` if model and message do not
    fit together.
    """
    instructions = Instructions.read(message)
    if instructions is None:
        records = list(message.content.array_records.values())
        if len(records) != 1:
            raise ValueError(f"the message holds {len(records)} records of arrays where one is needed.")
        return load(model, records[0])
    turn = ModelTurn(_open(model), message, context, instructions)
    record = message.content.array_records.get(BASE_UPDATES)
    _fold(turn.model, turn.node.receive_base_updates(instructions, message.metadata.message_id, record))
    _set_state(model, turn.model_state, turn.model_leaves)
    if message.metadata.message_type.startswith("train"):
        turn.model.select(turn.trainable)
    return model


def send(model: Any, message: Message, context: Context) -> ArrayRecord:
    """Return the upload after training; leaves that stay with the client are kept in ``context.state``.

    Replaces ``ArrayRecord(get_peft_model_state_dict(model))``. Raises ``ValueError`` if ``receive`` was not called for
    this message, or if a leaf changed that the method freezes.
    """
    instructions = Instructions.read(message)
    if instructions is None:
        return ArrayRecord(_state_dict(model))
    _active_adapter(model)
    turn = ModelTurn(attach_peft(model), message, context, instructions)
    if turn.node.message != message.metadata.message_id:
        raise ValueError(
            "fedlora.flower.send was called for a message that receive has not seen; call "
            "fedlora.flower.receive(model, msg, context) before training."
        )
    sent, stays = turn.finish()
    turn.node.save(stays)
    keys = turn.shared.keys
    arrays = {keys[part, leaf]: Array(x.numpy()) for part, layer in sent.items() for leaf, x in layer.items()}
    return ArrayRecord({**arrays, MARK: encode_mark(instructions.round, instructions.last)})


def load(model: Any, arrays: ArrayRecord) -> Any:
    """Set a PEFT model to a global model, and return it: the adapter, and the method's updates of the base.

    Replaces ``set_peft_model_state_dict(model, arrays.to_torch_state_dict())`` where the server evaluates or saves. The
    result of ``merge_and_unload`` includes both. Raises ``ValueError`` if the two do not fit together.
    """
    plain, base_updates = split_arrays(arrays)
    state, arrived = PeftState.of(_state_dict(model)), read_state(plain)
    _check_fit(state, arrived)
    mine, theirs = (sorted(set(adapter.ranks().values())) for adapter in (state, arrived))
    if state.ranks() != arrived.ranks():
        raise ValueError(
            f"the model has ranks {mine} and the arrays {theirs}, or others at some weights; "
            "make the model with the server's LoraConfig."
        )
    _fold(_open(model), base_updates)
    _set_state(model, state, arrived.tree)
    return model


@dataclass
class ModelTurn:
    """One message at one node, for one model."""

    model: Model
    message: Message
    context: Context
    instructions: Instructions

    @cached_property
    def node(self) -> NodeMemory:
        """The node's memory."""
        return NodeMemory.of(self.context.state, self.instructions)

    @cached_property
    def model_state(self) -> PeftState:
        """The present adapter of the model."""
        return PeftState.of(_state_dict(self.model.network))

    @cached_property
    def shared(self) -> PeftState:
        """The adapter that the server sent."""
        state = read_state(self.message.content[self.instructions.arrays])
        _check_fit(self.model_state, state)
        return state

    @cached_property
    def rules(self) -> Rules:
        """The rule of each part."""
        rules = self.instructions.recipe.rules(self.shared)
        needed = self.shared.ranks()
        for part, rank in self.model_state.ranks().items():
            if rank != needed[part] and not (rules[part].any_rank and rank < needed[part]):
                limit = "no more than that" if rules[part].any_rank else "one rank for all"
                raise ValueError(
                    f"the model has rank {rank} at {part!r} and the server's adapter {needed[part]}; "
                    f"{rules[part].title} needs {limit}: set r in the LoraConfig."
                )
        return rules

    @cached_property
    def start(self) -> Tree:
        """The leaves at the turn's start, in the server's scale."""
        kept, tree = self.node.load(), self.shared.tree
        return {
            part: public_leaves(rule.receive(tree[part], kept.get(part, {}), self._turn(part)))
            for part, rule in self.rules.items()
        }

    @cached_property
    def trainable(self) -> Mapping[str, frozenset[str]]:
        """The leaves that the method trains in this round."""
        return {part: trainable_leaves(rule, self.start[part], self._turn(part)) for part, rule in self.rules.items()}

    @cached_property
    def model_leaves(self) -> Tree:
        """The leaves at the turn's start in the model's scale, padded with zeros to the model's rank.

        The padding has no gradient, since each factor's padding is multiplied by zeros of the other factor.
        """
        leaves = dict(self.start)
        for part in self.model_state.adapted:
            layer, state = self.start[part], self.model_state.tree[part]
            rank = layer["A"].shape[0]
            A, B = torch.zeros_like(state["A"]), torch.zeros_like(state["B"])
            A[:rank], B[:, :rank] = layer["A"], layer["B"] * self._ratio(part, rank)
            leaves[part] = {"A": A, "B": B}
        return leaves

    def finish(self) -> tuple[Tree, Tree]:
        """Return the upload and the leaves that stay, by the method's hooks."""
        end = self.model_state.tree
        check_turn(self.model, self.model_leaves, end, self.trainable, self.rules, self._turn())
        work = {part: Work(self.start[part], self._to_server(part), self.trainable[part]) for part in self.rules}
        sent = {part: rule.send(work[part], self._turn(part)) for part, rule in self.rules.items()}
        stays = {part: rule.keep(work[part], sent[part], self._turn(part)) for part, rule in self.rules.items()}
        return sent, stays

    def _to_server(self, part: str) -> Layer:
        """Return a part's leaves after training, without padding and in the server's scale."""
        end = self.model_state.tree[part]
        if part not in self.model_state.adapted:
            return end
        rank = self.start[part]["A"].shape[0]
        B = end["B"][:, :rank] / self._ratio(part, rank)
        return {"A": end["A"][:rank].contiguous(), "B": B.contiguous()}

    def _turn(self, part: str | None = None) -> Turn:
        rank = self.model_state.ranks().get(part, 0) if part else 0
        return Turn(self.instructions.round, self.context.node_id, rank, self.instructions.seed)

    def _ratio(self, part: str, rank: int) -> float:
        """Return the model's ``B`` divided by the server's ``B`` of this rank, for equal updates ``s B A``."""
        server, own = (cast(LoRA, x) for x in (self.rules[part].adapter, self.model.parts[part].adapter))
        return server.scale(rank) / own.scale(own.rank)


def _open(model: Any) -> Model:
    """Return the model on its pretrained base, without the updates of earlier messages."""
    _active_adapter(model)
    return open_model(model)


def _fold(model: Model, base_updates: Mapping[str, Factors]) -> None:
    """Add base updates to a pretrained base. Raises ``ValueError`` if they are of another base."""
    for part, update in base_updates.items():
        shape = model.parts[part].shape if part in model.parts else None
        if shape is None:
            raise ValueError(
                f"the server folds into {part!r}, which this model does not adapt; make the model with the server's "
                "target_modules."
            )
        if (update.U.shape[0], update.V.shape[1]) != shape:
            raise ValueError(
                f"the server folds an update of {update.U.shape[0]} x {update.V.shape[1]} into {part!r}, a weight of "
                f"{shape[0]} x {shape[1]}; start server and client from one base model."
            )
    model.fold({part: (update,) for part, update in base_updates.items()})


def _set_state(model: Any, state: PeftState, leaves: Tree) -> None:
    """Set the model's adapter by PEFT's setter, which ignores unknown keys. Raises ``ValueError`` for such a key."""
    values = {key: leaves[part][leaf] for (part, leaf), key in state.keys.items()}
    unknown = set_peft_model_state_dict(model, values, adapter_name=_active_adapter(model)).unexpected_keys
    if unknown:
        raise ValueError(f"PEFT does not know {unknown[0]!r} of its own state dict; report it with your PEFT version.")


def _check_fit(state: PeftState, arrived: PeftState) -> None:
    """Check that the model and the received adapter have the same parts and leaves, with the same outer shapes."""
    odd = sorted(state.keys.keys() ^ arrived.keys.keys())
    if odd:
        owner = "the model" if odd[0] in state.keys else "the server's adapter"
        raise ValueError(
            f"only {owner} has {'.'.join(odd[0])!r}, and {len(odd) - 1} more differ; make both with one LoraConfig "
            "(target_modules, modules_to_save)."
        )
    mine, theirs = _outer_shapes(state), _outer_shapes(arrived)
    for part, leaf in mine:
        if mine[part, leaf] != theirs[part, leaf]:
            raise ValueError(
                f"{leaf} of {part!r} is {mine[part, leaf]} in the model and {theirs[part, leaf]} in the server's "
                "adapter; start from one base model."
            )


def _outer_shapes(state: PeftState) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the shape of each leaf without ranks, which may differ."""
    return {
        (part, leaf): tuple(x.shape) if part not in state.adapted else (x.shape[1 if leaf == "A" else 0],)
        for part, layer in state.tree.items()
        for leaf, x in layer.items()
    }


def _state_dict(model: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=_active_adapter(model))
    return state


def _active_adapter(model: Any) -> str:
    return active_adapter(model, "give fedlora.flower what PEFT's get_peft_model returns")
