"""The properties that every method has, as functions of a method: each raises AssertionError where it is broken."""

import torch

from fedlora.methods._base import Method
from tests.fixtures.laws import HEAD, Nudge, World, distance

CLOSE = 1e-9
ROUNDS = 3  # enough for methods that alternate, or that start to act in the second round


def federation_of_one(method: Method) -> None:
    """After a round with one client, what it receives next is what it trained; not so for a method that claims ``lossy``."""
    world, worst = World(method, examples=(4,)), 0.0
    for round in range(ROUNDS):
        trained = world.step({0: Nudge(round)})
        worst = max(worst, distance(world.held(0), trained[0]))
    assert (worst > 1e-4) if method.lossy else (worst < CLOSE), f"claims lossy={method.lossy}, misses by {worst:.1e}"


def nothing_in_nothing_out(method: Method) -> None:
    """A round in which nobody moves changes no weight of anybody; a lossy method may let weights decay."""
    if method.lossy:
        return
    world = World(method)
    for round in range(ROUNDS):
        world.step({client: Nudge(10 * round + client) for client in range(3)})
        before = [world.held(client) for client in range(3)]
        world.step({client: Nudge(0, size=0.0) for client in range(3)})
        for client in range(3):
            assert distance(world.held(client), before[client]) < CLOSE, f"round {round}, client {client}"


def agreement(method: Method) -> None:
    """From any state, clients that agree are one client, whatever their weights."""
    many, one = World(method, same_seed=True), World(method, same_seed=True)
    for round in range(ROUNDS):
        many.step({client: Nudge(round) for client in range(3)})
        one.step({0: Nudge(round)})
        assert distance(many.held(1), one.held(0)) < CLOSE, f"round {round}"
        one.follow(many, {client: client for client in range(3)})


def order(method: Method) -> None:
    """Which number a client has is nothing: from any state, the same clients under other numbers end the same."""
    examples, names = (5, 2, 9), {0: 2, 1: 0, 2: 1}
    first = World(method, examples, same_seed=True)
    second = World(method, tuple(examples[names[client]] for client in range(3)), same_seed=True)
    for round in range(ROUNDS):
        first.step({client: Nudge(10 * round + client) for client in range(3)})
        second.step({client: Nudge(10 * round + names[client]) for client in range(3)})
        for client in range(3):
            assert distance(second.held(client), first.held(names[client])) < CLOSE, f"round {round}"
        second.follow(first, names)


def gap(method: Method, rounds: int = 2) -> float:
    """How far the weights served lie from the mean of the clients' trained weights, at worst over the rounds."""
    world, worst = World(method), 0.0
    for round in range(rounds):
        trained = world.step({client: Nudge(10 * round + client) for client in range(3)})
        shares = [n / sum(world.examples) for n in world.examples]
        shares = shares if method.weighting == "examples" else [1 / 3] * 3
        mean = {p: sum(w * trained[k][p] for k, w in enumerate(shares)) for p in trained[0]}
        worst = max(worst, distance(world.held(0), mean))
        head = {p: x for p, x in mean.items() if p.startswith(HEAD)}
        assert distance(world.held(0), head) < CLOSE, "the head is not the mean of the heads"
    return worst


def exactness(method: Method) -> None:
    """``exact`` means exact, and a method that does not claim it is not; there is no global weight for a personal one."""
    if method.personal:
        return
    found = gap(method)
    assert (found < CLOSE) if method.exact else (found > 1e-4), f"claims exact={method.exact}, misses by {found:.1e}"


def purity(method: Method) -> None:
    """Hooks leave their arguments alone."""
    world = World(method)
    world.step({client: Nudge(client) for client in range(3)})
    held = [
        x
        for tree in (world.shared, *world.kept.values(), *world.sent.values())
        for la in tree.values()
        for x in la.values()
    ]
    copies = [x.clone() for x in held]
    world.step({client: Nudge(5 + client) for client in range(3)})
    assert all(torch.equal(x, copy) for x, copy in zip(held, copies))


def independence(method: Method) -> None:
    """A client's turn does not depend on whether another client trained before it in the round."""
    together, alone = World(method), World(method)
    for world in (together, alone):
        world.step({client: Nudge(client) for client in range(3)})
    together.step({0: Nudge(5), 1: Nudge(6)})
    alone.step({1: Nudge(6)})
    for part, layer in alone.sent[1].items():
        assert all(torch.equal(x, together.sent[1][part][leaf]) for leaf, x in layer.items())
    for part, layer in alone.kept[1].items():
        assert all(torch.equal(x, together.kept[1][part][leaf]) for leaf, x in layer.items())


LAWS = (federation_of_one, nothing_in_nothing_out, agreement, order, exactness, purity, independence)
