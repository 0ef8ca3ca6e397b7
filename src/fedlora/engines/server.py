"""A server without a model: finished PEFT state dicts go in, and the next one comes out, by any method."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from logging import getLogger
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.engines.aggregation_error import aggregation_errors
from fedlora.engines.base_updates import BaseUpdateLog, base_update_from_tree, base_update_to_tree
from fedlora.engines.peft_round import Leaf, PeftRound
from fedlora.files import BROKEN, RefusedFileError, decode_state, digest, encode_state, write
from fedlora.rounds import Received, public_leaves
from fedlora.security.guard import Guard
from fedlora.text import display_safe
from fedlora.training.peft_state import PeftState, Value, to_float32
from fedlora.training.recipe import Recipe, plain_work, server_obstacle
from fedlora.types import Factors, Tree

FORM = 1  # of saved files
LOG = getLogger(__name__)
STATE, SETTLED, RECENT = "state", "settled", "recent"  # parts of a saved file


class RoundError(ValueError):
    """A round cannot be combined. The server's state and round are unchanged; call ``step`` again."""


class Server:
    """Combines PEFT state dicts by one of fedlora's methods, in somebody else's engine or loop.

    ```python
    server = Server("flora-na", initial, lora_alpha=16)
    state = server.step([upload_a, upload_b, upload_c], weights=[120, 40, 80])
    ```

    Clients need not have fedlora. In each round, a client sets its adapter to ``state`` (with its own last values of
    the keys in ``keeps``, once it has trained), trains the keys in ``trains`` with all others frozen, and sends the
    keys in ``sends``. If a method's clients do more with an upload, as in FedRot-LoRA's rotation, the server does it.
    If clients differ in rank, or the method begins each turn afresh (FLoRA), a client starts from
    ``client_state(client, rank)`` instead of ``state``. If the method changes the base, each base weight of all
    clients is the pretrained one plus the product ``U @ V`` of ``base_updates``.

    Args:
        method: The name of a method that trains PEFT's LoRA, or ``"package.module:Class"``.
        initial: What PEFT's ``get_peft_model_state_dict`` returns: tensors or numpy arrays of floats.
        lora_alpha, use_rslora, alpha_pattern: Those of the ``LoraConfig`` of all clients.
        method_options: The method's settings, as in the table ``[method]``.
        seed: Of the random draws of the method.
        validation: Settings of the table ``[validation]``; validation is always on.
        robust: The name of a robust aggregator, or its table.
        min_clients: The number of good uploads that a round needs.
        measure: Whether ``errors`` is computed, which costs two QR factorisations a weight.

    Raises:
        ValueError: The method cannot serve such clients, or settings or state dict are wrong; one sentence says why.
    """

    def __init__(
        self,
        method: str,
        initial: Mapping[str, Value],
        *,
        lora_alpha: float,
        use_rslora: bool = False,
        alpha_pattern: Mapping[str, float] | None = None,
        method_options: Mapping[str, Any] | None = None,
        seed: int = 0,
        validation: Mapping[str, Any] | None = None,
        robust: str | Mapping[str, Any] | None = None,
        min_clients: int = 1,
        measure: bool = True,
    ) -> None:
        if min_clients < 1:
            raise ValueError(f"min_clients is {min_clients}; a round needs at least one upload.")
        _check_arguments(method, initial, lora_alpha)
        self.recipe = Recipe(method, lora_alpha, use_rslora, method_options or {}, alpha_pattern or {}, seed)
        self.method = self.recipe.build()
        if obstacle := server_obstacle(self.method):
            raise ValueError(
                f"{self.method.title} cannot be served to clients without fedlora: {obstacle}; take another method, or "
                "run it with fedlora's own engine (`fedlora run`)."
            )
        self._settings = {
            "validation": dict(validation or {}), "robust": dict(robust) if isinstance(robust, Mapping) else robust
        }  # fmt: skip
        self._guard = Guard(validation, robust, self.method, seed)
        self.min_clients, self.measure = min_clients, measure
        self.errors: dict[str, dict[str, float]] = {}
        self.last_base_updates: dict[str, Factors] = {}
        self._log = BaseUpdateLog()
        for key, x in initial.items():
            to_float32(key, x)  # raises for another kind of value
        self._number, self._state = 0, {key: _copy(x) for key, x in initial.items()}
        self._open().check_start()

    # --------------------------------------------------------------------------------- the next round
    @property
    def round(self) -> int:
        """The number of rounds so far."""
        return self._number

    @property
    def state(self) -> dict[str, Value]:
        """The present state dict, with the keys, types and precision of ``initial``; a copy."""
        return {key: _copy(x) for key, x in self._state.items()}

    @property
    def trains(self) -> list[str]:
        """The keys that clients train in the next round; all others are frozen."""
        return self._keys(self._round.trains)

    @property
    def sends(self) -> list[str]:
        """The keys that clients send in the next round; an upload with others is refused."""
        return self._keys(self._round.sends)

    @property
    def keeps(self) -> list[str]:
        """The keys that stay with each client: it goes on from its own values, and never sends them."""
        return self._keys(self._round.trains - self._round.sends)

    def client_state(self, client: int = 0, rank: int | None = None) -> dict[str, Value]:
        """Return the state dict from which a client starts the next round.

        It differs from ``state`` in two cases: ``rank`` is below the state's (the leading part of the factors, with
        ``B`` in the scale of that rank), or the method draws the start of each turn from the client's number.
        ``keeps`` holds here, too. Raises ``ValueError`` if the method needs one rank for all.
        """
        now = self._round
        if rank is not None and not (rank == now.rank or (self.method.any_rank and 1 <= rank < now.rank)):
            limit = f"1 to {now.rank}" if self.method.any_rank else f"{now.rank}, one rank for all clients"
            raise ValueError(f"the rank is {rank}; {self.method.title} needs {limit} with this state.")
        turn = now.turn(client, rank)
        tree = {part: public_leaves(rule.receive(now.shared.tree[part], {}, turn)) for part, rule in now.rules.items()}
        return {key: _copy(x) for key, x in now.shared.to_state_dict(tree, self._state).items()}

    # ----------------------------------------------------------------------------------- a round
    def step(
        self,
        state_dicts: Sequence[Mapping[str, Value]],
        weights: Sequence[float] | None = None,
        clients: Sequence[int] | None = None,
    ) -> dict[str, Value]:
        """Combine the uploads of a round and return the next state dict.

        Each upload has the keys in ``sends``, and is screened: ``quarantine`` has those that are left out, with the
        reasons, and the others go on without them.

        Args:
            state_dicts: The uploads, in any order.
            weights: The clients' numbers of examples, all above 0; equal if None.
            clients: The clients' numbers, from 0. Without them, an upload's place is its number in this round only:
                no client is left out for what it did in earlier rounds.

        Raises:
            RoundError: Fewer than ``min_clients`` uploads are good, a robust aggregator has fewer than three, or the
                result is not finite. State and round are unchanged.
            ValueError: There are no uploads, or weights or clients are wrong.
        """
        now, uploads = self._round, list(state_dicts)
        examples, ids = _check_weights(weights, len(uploads)), _check_clients(clients, len(uploads))
        received, refused = self._read(now, uploads, examples, ids, named=clients is not None)
        good = self._guard.screen(now.rules, now.shared.tree, self._number, received, refused, clients is not None)
        if len(good) < self.min_clients:
            reasons = self.quarantine.get(self._number + 1, {})
            first = next((f"; upload {k}: {reasons[k]}" for k in ids if k in reasons), "")
            raise RoundError(
                f"round {self._number + 1} has {len(good)} good uploads of {len(uploads)}, and {self.min_clients} are "
                f"needed (min_clients){first}; the state is unchanged, call step again with other uploads."
            )
        try:
            served, counted, _ = now.combine(self._guard, list(good.values()))
            state = now.shared.to_state_dict(served.shared, self._state)
            errors = self._measure(now, counted, served)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise RoundError(f"round {self._number + 1} cannot be combined: {error}") from error
        self.last_base_updates = {}
        if served.base_updates:
            self._log.append(served.base_updates)
            self._log.keep_recent()
            last = BaseUpdateLog(entries=[served.base_updates])
            self.last_base_updates = last.total()
        self._report_quarantine(named=clients is not None)
        self._state, self.errors, self._number = state, errors, self._number + 1
        self._open()
        return self.state

    def _report_quarantine(self, named: bool) -> None:
        """Warn of the uploads that were left out, since the state does not show it."""
        noun = "client" if named else "upload"
        for client, reason in self.quarantine.get(self._number + 1, {}).items():
            LOG.warning(
                "round %s: %s %s is left out, its upload is quarantined: %s.", self._number + 1, noun, client, reason
            )

    @property
    def base_updates(self) -> dict[str, Factors]:
        """The sum of all base updates: part -> ``U (m p)`` and ``V (p n)``, whose product is added to its base weight.

        A part is the path of a module in the base model, without PEFT's prefix. ``last_base_updates`` has those of the
        last round alone, for clients that have added all earlier ones. ``U @ V`` is ``(outputs, inputs)``: transpose
        it for GPT-2's layers.
        """
        return self._log.total()

    @property
    def quarantine(self) -> Mapping[int, Mapping[int, str]]:
        """Round (from 1) -> client -> the reason why its upload was left out."""
        return self._guard.quarantine

    @property
    def exclusions(self) -> frozenset[int]:
        """The clients that were quarantined in too many rounds (``validation.strikes``): ask them no more."""
        return self._guard.exclusions

    # ------------------------------------------------------------------------------------- on disk
    def save(self, path: str | Path) -> None:
        """Write everything to one file, atomically. ``Server.load`` goes on from it with the same bits."""
        arrays = sorted(key for key, x in self._state.items() if not isinstance(x, Tensor))
        tree: dict[str, Mapping[str, Tensor]] = {STATE: {key: torch.as_tensor(x) for key, x in self._state.items()}}
        tree |= {f"{SETTLED}/{part}": f._asdict() for part, f in self._log.prefix.items()}
        for i, entry in enumerate(self._log.entries):
            tree |= {f"{RECENT}/{i}/{key}": layer for key, layer in base_update_to_tree(entry).items()}
        about = {
            "form": FORM, "recipe": asdict(self.recipe), **self._settings, "min_clients": self.min_clients,
            "measure": self.measure, "round": self._number, "keys": list(self._state), "arrays": arrays,
            "quarantine": self._guard.quarantine, "conduct": self._guard.conduct, "errors": self.errors,
            "settled": self._log.start, "rounds": len(self._log.entries), "last": bool(self.last_base_updates),
        }  # fmt: skip
        about = json.loads(json.dumps(about))
        write(Path(path).expanduser(), encode_state(tree, {**about, "digest": _digest(tree, about)}))

    @classmethod
    def load(cls, path: str | Path) -> "Server":
        """Return the server that ``save`` wrote. Raises ``ValueError`` if the file is missing or damaged."""
        try:
            tree, about = decode_state(Path(path).expanduser().read_bytes())
            said = about.pop("digest")
            if about["form"] != FORM or said != _digest(tree, about):
                raise RefusedFileError("it was cut off or edited, or another version of fedlora wrote it")
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}; name a file of Server.save.") from error
        except BROKEN as error:
            raise ValueError(f"{str(path)!r} is no saved server: {display_safe(error)}; name another file.") from error
        return cls._restore(tree, about)

    @classmethod
    def _restore(cls, tree: Tree, about: Mapping[str, Any]) -> "Server":
        recipe = Recipe(**about["recipe"])
        tensors = {key: tree[STATE][key] for key in about["keys"]}
        state = {key: x.numpy() if key in about["arrays"] else x for key, x in tensors.items()}
        server = cls(
            recipe.method, state,
            lora_alpha=recipe.lora_alpha, use_rslora=recipe.use_rslora, alpha_pattern=recipe.alpha_pattern,
            method_options=recipe.method_options, seed=recipe.seed, validation=about["validation"],
            robust=about["robust"], min_clients=about["min_clients"], measure=about["measure"],
        )  # fmt: skip
        prefix = {part.partition("/")[2]: Factors(**f) for part, f in tree.items() if part.startswith(f"{SETTLED}/")}
        entries: list[dict[str, Mapping[str, Tensor]]] = [{} for _ in range(about["rounds"])]
        for part, layer in tree.items():
            kind, _, rest = part.partition("/")
            if kind == RECENT:
                number, _, key = rest.partition("/")
                entries[int(number)][key] = layer
        server._log = BaseUpdateLog(prefix, about["settled"], [base_update_from_tree(entry) for entry in entries])
        if about["last"]:
            server.last_base_updates = BaseUpdateLog(entries=server._log.entries[-1:]).total()
        server._guard.conduct = about["conduct"]
        server._guard.quarantine = {
            int(round): {int(client): why for client, why in reasons.items()}
            for round, reasons in about["quarantine"].items()
        }
        server.errors, server._number = about["errors"], about["round"]
        server._open()
        return server

    # ------------------------------------------------------------------------------------- inside
    def _open(self) -> PeftRound:
        shared = PeftState.of({key: to_float32(key, x) for key, x in self._state.items()})
        self._round = PeftRound(self.recipe, shared, self._number)
        return self._round

    def _keys(self, leaves: frozenset[Leaf]) -> list[str]:
        return [key for leaf, key in self._round.shared.keys.items() if leaf in leaves]

    def _read(
        self, now: PeftRound, uploads: Sequence[Any], examples: Sequence[float], ids: Sequence[int], named: bool
    ) -> tuple[dict[int, Received], dict[int, str]]:
        """Return the readable uploads by client, and the reasons why others are refused."""
        received, refused = dict[int, Received](), dict[int, str]()
        for client, upload, number in zip(ids, uploads, examples):
            if named and client in self.exclusions:
                self._guard.quarantine.setdefault(now.number + 1, {})[client] = (
                    "it was quarantined in too many rounds (validation.strikes)"
                )
                continue
            try:
                if not isinstance(upload, Mapping):
                    raise ValueError(f"it is a {type(upload).__name__} where a state dict is needed")
                received[client] = now.read_upload(client, number, upload, to_float32)
            except ValueError as error:
                refused[client] = display_safe(error)
        return now.align_turns({client: _complete(now, u) for client, u in received.items()}), refused

    def _measure(self, now: PeftRound, counted: Sequence[Received], served: Any) -> dict[str, dict[str, float]]:
        """Return the aggregation errors; none if the clients keep leaves, without which their weights are unknown."""
        if not self.measure or now.trains - now.sends:
            return {}
        return aggregation_errors(now.rules, now.shared.tree, counted, {}, served)


def _complete(now: PeftRound, upload: Received) -> Received:
    """Apply the method's ``send`` to the leaves that a client without fedlora has trained."""
    tree, turn = {}, now.turn(upload.turn.client, upload.turn.rank or None)  # 0: no A was sent, which has the rank
    for part, rule in now.rules.items():
        start = public_leaves(rule.receive(now.shared.tree[part], {}, turn))
        trained = frozenset(leaf for name, leaf in now.trains if name == part)
        stays = {leaf for leaf in trained if (part, leaf) not in now.sends}
        tree[part] = rule.send(plain_work(start, upload.tree[part], stays, trained), turn)
    return upload._replace(tree=tree)


def _check_arguments(method: Any, initial: Any, lora_alpha: Any) -> None:
    if not isinstance(method, str):
        raise ValueError(f"the method is {method!r}; give its name, such as 'flora-na'.")
    if not isinstance(initial, Mapping):
        raise ValueError(
            f"the initial state is a {type(initial).__name__}; give what PEFT's get_peft_model_state_dict returns."
        )
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, int | float):
        raise ValueError(f"lora_alpha is {lora_alpha!r}; give the number in the clients' LoraConfig.")


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if not count:
        raise ValueError("there are no uploads; give step at least one state dict.")
    if weights is None:
        return [1] * count
    if not hasattr(weights, "__iter__") or isinstance(weights, str):
        raise ValueError(f"weights is {weights!r}; give a list with one weight an upload.")
    values = [x.item() if hasattr(x, "item") else x for x in weights]
    if len(values) != count:
        raise ValueError(f"there are {count} uploads and {len(values)} weights; give one weight an upload.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
            raise ValueError(f"a weight is {value!r}; give each client's number of examples, a number above 0.")
    return values


def _check_clients(clients: Sequence[int] | None, count: int) -> list[int]:
    ids = list(range(count)) if clients is None else list(clients)
    if len(ids) != count:
        raise ValueError(f"there are {count} uploads and {len(ids)} clients; give one number an upload.")
    for client in ids:
        if type(client) is not int or client < 0:
            raise ValueError(f"a client is {client!r}; give each client a whole number from 0 of its own.")
    if len(set(ids)) < count:
        twice = next(client for client in ids if ids.count(client) > 1)
        raise ValueError(f"client {twice} is named twice; give one upload a client.")
    return ids


def _copy(value: Any) -> Value:
    return value.detach().clone() if isinstance(value, Tensor) else value.copy()


def _digest(tree: Tree, about: Mapping[str, Any]) -> str:
    text = json.dumps(about, sort_keys=True)
    return hashlib.blake2b(f"{digest(tree)} {text}".encode(), digest_size=16).hexdigest()
