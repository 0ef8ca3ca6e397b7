"""DP-SGD on the adapter: each row's own gradient, the sample, the clipping and the noise."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from fedlora.adapters import Adapter, LoRA, LoRASB, MultiHead, VeRA
from fedlora.methods.fedit import FedIT
from fedlora.methods.ffa_lora import FFALoRA
from fedlora.methods.local import Local
from fedlora.security.privacy import Stream, dp_sgd, key_of, per_sample_gradients
from fedlora.tasks._base import Examples, Shard, lengths_of_one
from fedlora.training.local import Training
from fedlora.training.model import Model
from fedlora.types import Turn
from tests.fixtures.private_task import Toy

ADAPTERS = [LoRA(rank=2), VeRA(rank=3), MultiHead(heads=2, head_rank=2), LoRASB(core_rank=2)]


class Tiny(nn.Module):
    """Tokens by features, a weight that is used twice, one that sees a mean, dropout, a norm and a classifier."""

    def __init__(self, dropout=0.0, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 5)
        self.norm, self.dropout = norm or nn.LayerNorm(5), nn.Dropout(dropout)
        self.classifier = nn.Linear(5, 3)

    def forward(self, x, labels=None):
        x = torch.tanh(self.first(torch.tanh(self.first(x))))
        x = self.norm(self.second(self.dropout(x).mean(1)))
        return type("Out", (), {"logits": self.classifier(x)})


def attached(adapter: Adapter, dropout=0.0, norm=None):
    return Model.attach(Tiny(dropout, norm), adapter, ["first", "second"], ["classifier", "norm"])


def rows(n=6):
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, 6, generator=draws)
    return Examples({"x": x}, torch.randint(3, (n,), generator=draws), lengths_of_one(n))


def loaded(model, rule=FedIT):
    """With leaves that are nowhere zero, so that every leaf has a gradient; returns the trained ones."""
    draws = torch.Generator().manual_seed(5)
    tree = model.initial(0)
    moved = {p: {leaf: x + 0.3 * torch.randn(x.shape, generator=draws) if leaf in model.parts[p].adapter.trainable else x for leaf, x in layer.items()} for p, layer in tree.items()}  # fmt: skip
    model.load(moved)
    return model.select(
        {p: rule(part.adapter).trains(moved[p], Turn(0, 0, 2), dict) for p, part in model.parts.items()}
    )


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_each_rows_gradient_equals_that_of_the_row_alone(adapter):
    model, task, examples = attached(adapter), Toy(), rows()
    parameters = loaded(model)
    batch = task.collate(examples, torch.arange(6))
    losses, found = per_sample_gradients.compute_gradients(
        model, lambda network: task.losses(network, batch), 6, parameters
    )
    assert found.keys() == parameters.keys()
    for i in range(6):
        one = task.collate(examples, torch.tensor([i]))
        alone = model.gradient(lambda network, one=one: task.loss(network, one))
        assert math.isclose(float(losses[i]), float(task.loss(model.network, one).detach()), rel_tol=1e-5)
        for (path, leaf), x in found.items():
            torch.testing.assert_close(x[i], alone[path][leaf], atol=1e-5, rtol=1e-5)
            assert float(x[i].abs().max()) > 1e-6, f"{leaf} of {path} has a gradient"
    assert isinstance(model.parts["first"].module.adapter, type(adapter)), "the model is as it was before"


def test_only_what_is_trained_has_gradients():
    model, task = attached(LoRA(rank=2)), Toy()
    parameters = loaded(model, FFALoRA)
    batch = task.collate(rows(), torch.arange(6))
    _, found = per_sample_gradients.compute_gradients(model, lambda network: task.losses(network, batch), 6, parameters)
    assert {leaf for path, leaf in found if path == "first"} == {"B"}


def test_dropout_draws_for_every_row_and_the_gradients_follow_it():
    model, task = attached(LoRA(rank=2), dropout=0.5), Toy()
    parameters = loaded(model)
    model.network.train()
    batch = task.collate(rows(), torch.zeros(6, dtype=torch.int64))  # one row, six times
    torch.manual_seed(1)
    losses, found = per_sample_gradients.compute_gradients(
        model, lambda network: task.losses(network, batch), 6, parameters
    )
    assert len(set(losses.tolist())) == 6
    torch.manual_seed(1)
    whole = torch.autograd.grad(task.losses(model.network, batch).sum(), list(parameters.values()))
    for x, y in zip(found.values(), whole):
        torch.testing.assert_close(x.sum(0), y, atol=1e-5, rtol=1e-4)


def test_rows_that_act_on_each_other_are_refused():
    with pytest.raises(
        ValueError, match=r"'norm' is a BatchNorm1d, through which the rows of a batch affect each other"
    ):
        per_sample_gradients.check_row_independence(Tiny(norm=nn.BatchNorm1d(5)))
    model = attached(LoRA(rank=2))
    parameters = loaded(model)
    with pytest.raises(ValueError, match=r"'first' gets 6 inputs of 3 rows"):
        per_sample_gradients.compute_gradients(
            model, lambda network: Toy().losses(network, Toy().collate(rows(), torch.arange(6))), 3, parameters
        )
    odd = Model.attach(Tiny(norm=nn.GroupNorm(1, 5)), LoRA(rank=2), ["first"], ["norm", "classifier"])
    with pytest.raises(ValueError, match=r"'norm' is a GroupNorm, which has no per-sample gradient here"):
        per_sample_gradients.compute_gradients(odd, lambda network: None, 6, loaded(odd))


def test_clipping_is_over_all_leaves_and_never_exceeds_the_bound():
    draws = torch.Generator().manual_seed(0)
    grads = {k: torch.randn((50, *shape), generator=draws) * torch.logspace(-4, 4, 50).view(-1, *[1] * len(shape)) for k, shape in {"a": (3, 4), "b": (5,)}.items()}  # fmt: skip
    grads["a"][7, 0, 0] = math.nan
    grads["b"][8, 0] = math.inf
    by = dp_sgd.clip_factors(grads, 0.7)
    after = {
        k: torch.nan_to_num(x, 0.0, 0.0, 0.0).double() * by.view(-1, *[1] * (x.dim() - 1)) for k, x in grads.items()
    }
    norms = sum(x.flatten(1).square().sum(1) for x in after.values()).sqrt()
    before = sum(x.double().flatten(1).square().sum(1) for x in grads.values()).sqrt()
    assert (norms <= 0.7).all() and norms[7] == norms[8] == 0
    small = before < 0.69
    assert small.any() and torch.equal(by[small], torch.ones(int(small.sum()), dtype=torch.float64))
    assert (norms[before.isfinite() & (before > 0.71)] > 0.69).all()


def trainer(noise, n=6, client=0, rule=None, training=None, key=0, **more):
    model = attached(LoRA(rank=2), **more)
    training = training or Training(local_steps=1, batch_size=3, optimizer="sgd", learning_rate=1.0, momentum=0.0, max_grad_norm=None)  # fmt: skip
    found = dp_sgd.PrivateTrainer(
        model, Toy(), rows(n), Shard(torch.arange(n), torch.arange(0)), training, Turn(2, client, 2, seed=9), 5,
        clip=0.5, noise=noise, stream=Stream(key_of(key)).child("client", client),
    )  # fmt: skip
    rules = model.rules(rule or FedIT(LoRA(rank=2)), lambda dense: FedIT(dense))
    start = model.initial(0)
    draws = torch.Generator().manual_seed(5)
    start = {p: {leaf: x + 0.3 * torch.randn(x.shape, generator=draws) for leaf, x in layer.items()} for p, layer in start.items()}  # fmt: skip
    return found, start, rules


def moved(found, start, rules):
    end = found.fit(start, {p: part.adapter.trainable for p, part in found.model.parts.items()}, rules)
    return torch.cat([(end[p][leaf] - x).double().flatten() for p in sorted(start) for leaf, x in sorted(start[p].items())])  # fmt: skip


def test_a_step_is_the_formula():
    """Without noise: the mean over rate · rows of the clipped gradients of the rows that were drawn."""
    t, start, rules = trainer(0.0, n=40, training=Training(local_steps=1, batch_size=3, accumulation_steps=4, optimizer="sgd", learning_rate=1.0, momentum=0.0, max_grad_norm=None))  # fmt: skip
    change = moved(t, start, rules)
    sample = t.stream.sample(40, 12 / 40, "rows", 2, 0)
    assert 3 < len(sample) < 40, "several pieces of batch_size rows"
    t.model.load(start)
    total = torch.zeros_like(change)
    for i in sample.tolist():
        one = t.task.collate(t.examples, torch.tensor([i]))
        g = t.model.gradient(lambda network, one=one: t.task.loss(network, one))
        g = torch.cat([g[p][leaf].double().flatten() for p in sorted(start) for leaf in sorted(start[p])])
        total += g * min(1.0, 0.5 / float(g.norm()))
    torch.testing.assert_close(change, -total / 12, atol=1e-5, rtol=1e-4)


def test_the_noise_of_a_step_has_the_stated_size_and_is_there_without_rows():
    z = []
    for client in range(60):
        quiet, noisy = (moved(*trainer(s, client=client)) for s in (0.0, 4.0))
        z.append((noisy - quiet) * 3 / (4.0 * 0.5))
    z = torch.cat(z)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * len(z)) + 1e-3


def test_rows_are_drawn_by_themselves_and_by_steps():
    t, *_ = trainer(0.0, n=200)
    sizes = [len(t.stream.sample(200, 0.1, "rows", r, s)) for r in range(20) for s in range(20)]
    mean, var = torch.tensor(sizes).double().mean(), torch.tensor(sizes).double().var()
    assert abs(float(mean) - 20) < 4 * math.sqrt(18 / 400)
    assert 0.7 < float(var) / 18 < 1.4, "binomial, not fixed"


def test_the_same_key_gives_the_same_bits_and_another_client_or_key_does_not():
    first, again = moved(*trainer(1.0)), moved(*trainer(1.0))
    assert torch.equal(first, again)
    assert not torch.equal(first, moved(*trainer(1.0, client=1))) and not torch.equal(
        first, moved(*trainer(1.0, key=1))
    )


def test_one_row_of_no_numbers_spoils_nothing():
    t, start, rules = trainer(0.0, training=Training(local_steps=2, batch_size=6, optimizer="sgd", max_grad_norm=None))
    t.examples.features["x"][2] = math.nan
    assert torch.isfinite(moved(t, start, rules)).all()


def test_rows_without_numbers_do_not_stop_a_private_turn():
    """Whether a turn ends may not depend on the rows: no noise would cover that."""
    t, start, rules = trainer(1.0, training=Training(local_steps=2, batch_size=6, optimizer="sgd", max_grad_norm=None))
    t.examples.features["x"][:] = math.nan
    assert torch.isfinite(moved(t, start, rules)).all() and t.loss == 0.0


def test_a_method_that_looks_at_rows_before_it_trains_is_stopped():
    t, start, _ = trainer(1.0)
    with pytest.raises(ValueError, match="has no example-level guarantee"):
        t.gradient(start)
    assert Local.sums  # nothing is sent, and what is kept is protected all the same
