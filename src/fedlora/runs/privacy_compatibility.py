"""What has no sound analysis, each with its reason, before anything is loaded."""

from collections.abc import Iterator, Sequence

import torch

from fedlora.engines.clients import Clients
from fedlora.methods._base import Method
from fedlora.security.privacy import accounting
from fedlora.security.privacy.settings import Privacy
from fedlora.tasks._base import Task
from fedlora.types import Turn, Work


def check(p: Privacy, method: Method, clients: Clients, budgets: Sequence[int], task: Task) -> None:
    """``ValueError`` where ``[privacy]`` and these settings have no guarantee together."""
    if not p.on:
        return
    for wrong, text in [
        *_all(p, method),
        *(_client(p, method, clients, budgets) if p.by_client else _example(p, task)),
    ]:
        if wrong:
            raise ValueError(text)
    if p.by_client:
        p.delta_of(clients.members)
    accounting.require_opacus()


def _all(p: Privacy, method: Method) -> Iterator[tuple[bool, str]]:
    yield (
        method.uses_gradient,
        f"privacy.level is {p.level!r}, but {method.title} chooses what to train by a gradient on the client's rows "
        'that gets no noise; set method.score to "weight" or "random".',
    )


def _client(p: Privacy, method: Method, clients: Clients, budgets: Sequence[int]) -> Iterator[tuple[bool, str]]:
    """What the client level asks of a method and of the clients."""
    yield (
        _sends_nothing(method),
        f"privacy.level is 'client', but {method.title} sends nothing; set privacy.level = 'example' or 'none'.",
    )
    yield (
        method.weighting != "uniform",
        "privacy.level is 'client' and method.weighting is 'examples': a client's weight would go by its rows, so no "
        'noise bounds its part; set method.weighting = "uniform".',
    )
    yield (
        method.prunes,
        f"privacy.level is 'client', but {method.title}'s ranks go by what training came to, so the size of an upload "
        "tells what noise should hide; set method.decay = 1.0.",
    )
    yield (
        p.noise_on == "sum" and not (method.sums and method.averages),
        f"privacy.noise_on is 'sum', but {method.title}'s server is no sum of what is sent, so one client's part in it "
        'has no bound; set privacy.noise_on = "upload", which noises every upload by itself.',
    )
    full = method.adapter.budget
    yield (
        p.noise_on == "sum" and set(budgets) != {full},
        f"clients train {min(budgets)} to {max(budgets)} of {full} ranks or heads: in a mean over those who trained "
        "one, a client weighs the more the fewer they are; give all of them all, or set privacy.noise_on = 'upload'.",
    )
    yield (
        clients.rate is not None and bool(clients.dropout or clients.stragglers),
        "clients.sampling is 'poisson', but dropout and stragglers are drawn as shares of a cohort, so one client more "
        "changes what others do; leave clients.dropout and clients.stragglers out.",
    )


def _sends_nothing(method: Method) -> bool:
    layer = {leaf: torch.zeros(1, 1) for leaf in method.adapter.trainable}
    return not method.send(Work(layer, layer, frozenset(layer)), Turn(0, 0, 1))


def _example(p: Privacy, task: Task) -> Iterator[tuple[bool, str]]:
    """What the example level asks of a task."""
    yield (
        p.noise_on != "sum",
        "privacy.noise_on is 'upload', which is of the client level; with privacy.level = 'example' the noise is in "
        "every step: leave it out.",
    )
    yield (
        bool(getattr(task, "packing", False)),
        "task.packing is set, but rows in one sequence have no gradients of their own; with privacy.level = 'example' "
        "set task.packing = false.",
    )
