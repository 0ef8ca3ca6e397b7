"""The record of a round: one line of ``metrics.jsonl``.

The round loop writes it, and trackers, callbacks, live views and reports read it. Keys of type ``Client`` are numbers
in the process that runs the federation, and strings in a file, as in JSON.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Client = Any  # int, or a string in JSON
Direction = Literal["up", "down"]
Fault = Literal["absent", "unscored", "quarantined"]


class CapabilityScores(TypedDict):
    """The scores of the clients of one capability."""

    capability: float
    clients: int
    mean: float
    worst: float


class ClientScores(TypedDict, total=False):
    """The task's metric of the clients' own models, each on its own test rows, over the clients that were scored."""

    mean: float  # over clients
    examples_mean: float  # over all rows
    worst: float
    worst_client: int
    spread: float  # the population standard deviation over clients
    figures: Mapping[str, float]  # every metric, mean over clients
    each: Sequence[float | None]  # by client; None: not scored
    capability: Sequence[CapabilityScores]  # if clients differ in it; the weakest first


class AttackResult(TypedDict, total=False):
    """The success of an attack."""

    success: float  # share of the rows
    rows: float
    clients: int  # honest clients, if it is a mean over their own models


class Spent(TypedDict):
    """The privacy spent so far, by the worst client."""

    epsilon: float | None  # None: no noise, or only the clients know their rows
    delta: float | None


class _Global(TypedDict("_Global", {"global": Mapping[str, float]}, total=False)):  # a keyword cannot name a field
    """Every metric of the shared model on the global test rows."""


class RoundRecord(_Global, total=False):
    """A round's figures. All have ``round``, ``cohort``, ``loss``, ``bytes`` and ``seconds``; later versions add keys.

    An evaluated round has ``clients``, and ``global`` if the method has a shared model.
    """

    round: int  # from 1
    cohort: Sequence[int]  # the clients whose uploads were combined; empty if privacy hides it
    loss: Mapping[Client, float | None]  # the mean loss of a client's turn; empty if privacy hides it
    privacy: Spent
    stragglers: Sequence[int]  # clients that did a part of their steps
    weights: Mapping[str, Mapping[str, float]]  # part -> errors, see ``aggregation_error.aggregation_errors``
    oracle: Mapping[str, Any]  # see ``runs.counterfactual``
    clients: ClientScores
    attack: AttackResult
    absent: Mapping[Client, str]  # clients that were asked and did not reply -> reason
    unscored: Mapping[Client, str]  # clients without scores -> reason
    quarantined: Mapping[Client, str]  # clients with rejected uploads -> reason
    robust: Mapping[str, Any]  # the decision of a robust aggregator, see ``security.robust``
    bytes: Mapping[Direction, Mapping[str, int]]  # by kind of message, all clients together
    seconds: Mapping[str, float]  # by phase, and ``total``
