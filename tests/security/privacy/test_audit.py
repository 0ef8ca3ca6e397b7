"""Audits: what an adversary who sees everything but the noise can tell, against what ε says that it may.

One run with many canaries: Steinke, Nasr, Jagielski. Privacy Auditing with One (1) Training Run. NeurIPS 2023.
https://arxiv.org/abs/2305.08846
Membership inference over many runs: Jagielski, Ullman, Oprea. Auditing Differentially Private Machine Learning.
NeurIPS 2020. https://arxiv.org/abs/2006.07709
Both are run without noise, too: there they must find more than ε allows, or they would find nothing anywhere.
"""

import math

import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from torch import nn

pytest.importorskip("opacus", reason="needs the dp extra")

from fedlora.adapters import LoRA
from fedlora.methods.fedit import FedIT
from fedlora.rounds import Received
from fedlora.security.privacy import Stream, dp_sgd, key_of
from fedlora.security.privacy.accounting import compute_epsilon, find_noise_multiplier
from fedlora.security.privacy.client_level import private_turn
from fedlora.tasks._base import Examples, Shard, lengths_of_one
from fedlora.training.local import Training
from fedlora.training.model import Model
from fedlora.types import Turn
from tests.fixtures.private_task import Toy

CANARIES, STEPS, DELTA, SURE = 120, 4, 1e-7, 0.95


class Wide(nn.Module):
    """One feature a canary, so that each canary moves weights of its own: the worst case."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.classifier = nn.Linear(CANARIES, 8), nn.Linear(8, 2)

    def forward(self, x, labels=None):
        return type("Out", (), {"logits": self.classifier(self.first(x))[:, 0]})


def trained(noise, key):
    """One run of DP-SGD in which a coin decides for each canary; each canary's coin and its score."""
    model = Model.attach(Wide(), LoRA(rank=4), ["first"], ["classifier"])
    x, labels = 2 * torch.eye(CANARIES)[:, None], torch.arange(CANARIES) % 2
    coins = torch.rand(CANARIES, generator=torch.Generator().manual_seed(key)) < 0.5
    training = Training(local_steps=STEPS, batch_size=CANARIES, optimizer="sgd", learning_rate=0.3, momentum=0.0, max_grad_norm=None)  # fmt: skip
    trainer = dp_sgd.PrivateTrainer(
        model, Toy(), Examples({"x": x}, labels, lengths_of_one(CANARIES)),
        Shard(coins.nonzero()[:, 0], torch.arange(0)), training, Turn(0, 0, 4), 1,
        clip=1.0, noise=noise, stream=Stream(key_of(key)),
    )  # fmt: skip
    start = model.initial(0)
    draws = torch.Generator().manual_seed(5)
    start = {p: {leaf: x + 0.2 * torch.randn(x.shape, generator=draws) for leaf, x in layer.items()} for p, layer in start.items()}  # fmt: skip
    end = trainer.fit(start, {p: part.adapter.trainable for p, part in model.parts.items()}, model.rules(FedIT(LoRA(rank=4)), FedIT))  # fmt: skip
    model.load(start)
    change, column = end["first"]["A"] - start["first"]["A"], []
    for i in range(CANARIES):  # how far the canary's own column went down the canary's own gradient
        one = Toy().collate(trainer.examples, torch.tensor([i]))
        g = model.gradient(lambda network, one=one: Toy().loss(network, one))["first"]["A"]
        column.append(-float((change[:, i] * g[:, i]).sum() / g[:, i].norm()))
    return coins, torch.tensor(column)


def one_run_bound(coins, scores, guesses=60):
    """The ε that so many right guesses rule out: their number is at most binomial with ``e^ε / (1 + e^ε)``."""
    order = scores.argsort()
    right = int(coins[order[-guesses // 2 :]].sum()) + int((~coins[order[: guesses // 2]]).sum())

    def chance(e):
        return float(stats.binom.sf(right - 1, guesses, 1 / (1 + math.exp(-e)))) + 2 * CANARIES * DELTA

    return 0.0 if chance(0.0) > 1 - SURE else brentq(lambda e: chance(e) - (1 - SURE), 0, 50)


def test_canaries_in_one_run_tell_less_than_epsilon_and_without_noise_more():
    noise = find_noise_multiplier("prv", 1.0, 1.0, STEPS, DELTA)
    reported = compute_epsilon("prv", noise, 1.0, STEPS, DELTA)
    assert 0.99 < reported <= 1.0
    measured = [one_run_bound(*trained(noise, key)) for key in range(3)]
    assert max(measured) < reported
    assert one_run_bound(*trained(0.0, 0)) > 2 * reported, "the audit sees what noise would have hidden"
    little = find_noise_multiplier("prv", 30.0, 1.0, STEPS, DELTA)
    assert reported < one_run_bound(*trained(little, 0)) < 30.0, "and little noise hides little"


RUNS, CLIP = 500, 1.0


def guesses(noise):
    """Scores of a client's membership, over many runs with and without it: the served change along the client's own."""
    rules = {"a": FedIT(LoRA(rank=2), "uniform")}
    shared = {"a": LoRA(rank=2).init(4, 4, 0)}
    own = {"a": {leaf: x + 3.0 for leaf, x in shared["a"].items()}}
    direction = {leaf: own["a"][leaf] - x for leaf, x in shared["a"].items()}
    norm = math.sqrt(sum(float(x.square().sum()) for x in direction.values()))
    others = [Received(Turn(0, k, 2), 1, {"a": {leaf: x - 0.1 * k for leaf, x in shared["a"].items()}}) for k in (1, 2)]
    found = {}
    for there in (True, False):
        uploads = [*others, *([Received(Turn(0, 0, 2), 1, own)] if there else [])]
        found[there] = torch.tensor([
            sum(float(((x - shared["a"][leaf]) * direction[leaf]).sum()) for leaf, x in private_turn(
                rules, shared, Turn(0, 0, 2), uploads, CLIP, noise * CLIP, 1.0, Stream(key_of(2 * run + there))
            ).shared["a"].items()) / norm
            for run in range(RUNS)
        ])  # fmt: skip
    return found


def membership_bound(found, delta):
    """ε from the rates of right and false alarms at a threshold chosen on one half, bounded on the other."""
    half = RUNS // 2
    best = max(found[False][:half].tolist(), key=lambda t: _log_ratio(found, slice(0, half), t, delta))
    return max(0.0, _log_ratio(found, slice(half, None), best, delta))


def _log_ratio(found, part, threshold, delta):
    n = RUNS // 2
    hits, alarms = (int((found[there][part] > threshold).sum()) for there in (True, False))
    low = stats.beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0  # Clopper and Pearson
    high = stats.beta.ppf(0.975, alarms + 1, n - alarms) if alarms < n else 1.0
    return math.log(max(low - delta, 1e-12) / high)


def test_membership_of_a_client_can_be_told_as_far_as_epsilon_and_no_further():
    delta = 1e-5
    noise = find_noise_multiplier("prv", 2.0, 1.0, 1, delta)
    measured = membership_bound(guesses(noise), delta)
    assert measured < compute_epsilon("prv", noise, 1.0, 1, delta) <= 2.0
    assert membership_bound(guesses(0.0), delta) > 4.0, "without noise the client is found nearly always"
    some = find_noise_multiplier("prv", 12.0, 1.0, 1, delta)
    assert 0.5 < membership_bound(guesses(some), delta) < 12.0
