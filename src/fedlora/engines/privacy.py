"""What ``[privacy]`` does to a federation's turns, and what its rounds have spent of it."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.rounds import Received, Served, server_turn
from fedlora.security.attacks._base import poison_task
from fedlora.security.privacy import Stream, dp_sgd, per_sample_gradients
from fedlora.security.privacy.client_level import private_turn, protect
from fedlora.training.local import LocalTrainer, State
from fedlora.types import Tree

if TYPE_CHECKING:
    from fedlora.engines.federation import Federation

CLIENT, EXAMPLE = (
    "one client more or less, with all that it holds: what it sends is covered, what it keeps for itself is not",
    "one training row of one client more or less: all that is trained is covered, what a client keeps included",
)


def trainer(
    f: "Federation", number: int, client: int, moments: State | None, step_done: Callable[[], None], key: bytes | None,
) -> LocalTrainer:  # fmt: skip
    """A client's local training in a round; ``key`` is a party's own, where it has one."""
    assert f.data is not None, "clients train on rows"
    turn = f.turn(number, client)
    own = (
        f.model,
        poison_task(f.attack, f.task, turn),
        f.data.train,
        f.shards[client],
        f.spends(number, client),
        turn,
        f.rounds,
    )
    if not f.privacy.by_example:
        return LocalTrainer(*own, moments, step_done)
    return dp_sgd.PrivateTrainer(
        *own, moments, step_done, clip=f.privacy.clip, noise=f.noise, stream=stream(f, key).child("client", client)
    )


def stream(f: "Federation", key: bytes | None = None) -> Stream:
    """The federation's draws, or those of a party with a key of its own."""
    return Stream(f.key if key is None else key)


def leaving(
    f: "Federation", number: int, client: int, shared: Tree, sent: Tree, key: bytes | None = None, sharing: int = 0
) -> Tree:
    """What leaves a client: its upload, or where noise is added here, its clipped and noised change.

    ``sharing`` is how many clients' noise together must suffice, where a server only learns their sum.
    """
    p = f.privacy
    if not p.by_client or not (sharing or p.noise_on == "upload"):
        return sent
    std = f.noise * p.clip * (math.sqrt(1 / sharing) if sharing and p.noise_on == "sum" else 1.0)
    own = stream(f, key).child("client", client)
    return protect(f.rules, shared, f.turn(number, client), sent, p.clip, std, own)


def made(f: "Federation", number: int, shared: Tree, uploads: Sequence[Received]) -> Served:
    """What the server makes of a round's uploads."""
    p = f.privacy
    if not p.sums_clients:
        return server_turn(f.rules, shared, uploads)
    expected = f.clients.expected
    return private_turn(f.rules, shared, f.turn(number, 0), uploads, p.clip, f.noise * p.clip, expected, stream(f))


def check(f: "Federation") -> None:
    """``ValueError`` where the network's rows act on each other and single rows are to be protected."""
    if f.privacy.by_example:
        per_sample_gradients.check(f.model.network)


def delta(f: "Federation") -> float:
    """One δ for the run: of the clients, or of the rows of the client that has most."""
    if f.privacy.by_client:
        return f.privacy.delta_of(f.clients.members)
    return f.privacy.delta_of(max((len(f.shards[k].train) for k in f.book.rates), default=1))


def noise(f: "Federation") -> float:
    """The noise multiplier of the run: one for all clients whose rows this machine knows."""
    p = f.privacy
    if p.noise_multiplier is not None:
        return p.noise_multiplier
    d, book = delta(f), f.book
    return max((p.noise(q, n, d) for q, n in book.worst(book.planned)), default=math.nan)


def spent(f: "Federation", rounds: int) -> dict[str, Any]:
    """ε after so many rounds, of the worst client, and its δ; nothing where privacy is off.

    ``epsilon`` is None where there is no noise, or where only the parties themselves know their rows.
    """
    if not f.privacy.on:
        return {}
    pairs = f.book.worst(f.book.after(rounds))
    if not pairs:
        return {"privacy": {"epsilon": None, "delta": None}}
    d = delta(f)
    return {"privacy": {"epsilon": _finite(f.privacy.largest_epsilon(f.noise, pairs, d)), "delta": d}}


def told(f: "Federation", rounds: int) -> str:
    """A line for the log of a party that alone knows its rows; empty where the server says it."""
    if not (f.privacy.by_example and f.clients.own_data):
        return ""
    found = spent(f, rounds)["privacy"]
    return f"fedlora: after round {rounds}, ε = {found['epsilon']} at δ = {found['delta']} for this party's rows"


def report(f: "Federation", rounds: int, plan: bool = False) -> dict[str, Any]:
    """What the guarantee is, for summaries, plans and cards; nothing where privacy is off."""
    if not f.privacy.on:
        return {}
    p, z, d = f.privacy, f.noise, delta(f)
    book = f.book
    count = book.planned if plan else book.after(rounds)
    own = {k: _finite(p.epsilon(z, book.rates[k], n, d)) for k, n in count.items()}
    worst = None if not own or None in own.values() else max(x for x in own.values() if x is not None)
    found: dict[str, Any] = {
        "level": p.level, "epsilon": worst, "delta": d if own else None, "noise_multiplier": _finite(z),
        "clip": p.clip, "noise_on": p.noise_on, "accountant": p.accountant, "rounds": rounds,
        "sampling_rate": max(book.rates.values(), default=None),
        "secret": p.secret, "covers": CLIENT if p.by_client else EXAMPLE,
    }  # fmt: skip
    return {"privacy": found | ({"clients": {str(k): x for k, x in own.items()}} if p.by_example else {})}


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
