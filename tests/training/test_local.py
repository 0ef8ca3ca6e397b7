"""Local training within a budget of tokens, and what it reads from the device."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fedlora.methods.fedit import FedIT
from fedlora.methods.hetlora import HetLoRA
from fedlora.security.privacy import Stream
from fedlora.security.privacy.dp_sgd import PrivateTrainer
from fedlora.tasks._base import Shard
from fedlora.training.local import LocalTrainer, Training
from fedlora.training.prefetch import prefetch
from fedlora.types import Turn
from tests.fixtures.federation import TABLE
from tests.fixtures.token_rows import TASKS, token_model, token_rows

BUDGETS = [1, 60]


def moved_tree(model):
    """The model's first tree, with leaves that are nowhere zero."""
    draws = torch.Generator().manual_seed(1)
    return {
        path: {leaf: x + 0.3 * torch.randn(x.shape, generator=draws) for leaf, x in layer.items()}
        for path, layer in model.initial(0).items()
    }


def trainer_of(name, budget, kind=LocalTrainer, steps=3, **options):
    """A client of 20 rows, and the tree that it starts from."""
    task = TASKS[name]
    model = token_model(task)
    own = {key: options.pop(key) for key in ("clip", "noise", "stream") if key in options}
    settings = {"local_steps": steps, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1, **options}
    training = Training(max_tokens=budget, max_grad_norm=None, **settings)
    shard = Shard(torch.arange(20), torch.zeros(0, dtype=torch.int64))
    turn = Turn(0, 0, 2, seed=7)
    return kind(model, task, token_rows(task), shard, training, turn, 1, **own), moved_tree(model)


def fit(trainer, start, rule=FedIT):
    rules = {path: rule(part.adapter) for path, part in trainer.model.parts.items()}
    return trainer.fit(start, {path: part.adapter.trainable for path, part in trainer.model.parts.items()}, rules)


def assert_close(tree, other):
    for path, layer in tree.items():
        for leaf, x in layer.items():
            torch.testing.assert_close(x, other[path][leaf], rtol=1e-4, atol=1e-6)


def count_passes(trainer):
    """A list that grows by the rows of every batch that is collated."""
    rows, collate = [], trainer._collate

    def counted(part, draws):
        rows.append(len(part))
        return collate(part, draws)

    trainer._collate = counted
    return rows


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", TASKS)
def test_the_gradient_of_the_parts_is_that_of_the_batch(name, budget):
    whole, start = trainer_of(name, None)
    parts, _ = trainer_of(name, budget)
    passes = count_passes(parts)
    gradient = whole.gradient(start)
    assert_close(parts.gradient(start), gradient)
    assert len(passes) > 1 and sum(passes) == 8
    assert all(bool(x.any()) for layer in gradient.values() for x in layer.values())


@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 2}, {"optimizer": "adamw", "keep_optimizer": True}])
@pytest.mark.parametrize("name", TASKS)
def test_a_turn_in_parts_is_the_turn(name, options):
    whole, start = trainer_of(name, None, **options)
    parts, _ = trainer_of(name, 60, **options)
    passes = count_passes(parts)
    trained = fit(whole, start)
    assert_close(fit(parts, start), trained)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert len(passes) > 3 * options.get("accumulation_steps", 1)
    assert whole.training.keep_optimizer == bool(parts.state)
    for key, moments in (parts.state or {}).items():
        assert float(moments["step"]) == 3, "one step a batch, not one a part"
        torch.testing.assert_close(moments["exp_avg"], whole.state[key]["exp_avg"], rtol=1e-3, atol=1e-7)


def test_a_mean_over_parts_of_unequal_weight_would_be_another_gradient(monkeypatch):
    whole, start = trainer_of("causal-lm", None)
    parts, _ = trainer_of("causal-lm", 60)
    monkeypatch.setattr(type(parts.task), "loss_terms", lambda task, batch: 1)
    with pytest.raises(AssertionError):
        assert_close(parts.gradient(start), whole.gradient(start))


def test_a_penalty_is_added_once_a_batch():
    def rule(adapter):
        return HetLoRA(adapter, decay=0.5, tail_penalty=0.5)

    whole, start = trainer_of("causal-lm", None)
    parts, _ = trainer_of("causal-lm", 1)
    with_penalty = fit(whole, start, rule)
    assert_close(fit(parts, start, rule), with_penalty)
    with pytest.raises(AssertionError):
        assert_close(fit(whole, start), with_penalty)


def test_a_batch_within_the_budget_has_the_same_bits():
    whole, start = trainer_of("causal-lm", None)
    parts, _ = trainer_of("causal-lm", 8 * 24)
    trained, other = fit(whole, start), fit(parts, start)
    assert all(torch.equal(x, other[path][leaf]) for path, layer in trained.items() for leaf, x in layer.items())
    assert parts.loss == whole.loss


@pytest.mark.parametrize("name", ["causal-lm", "text-classification"])
def test_dp_sgd_in_parts_is_dp_sgd(name):
    def private(budget):
        trainer, start = trainer_of(
            name, budget, PrivateTrainer, clip=0.1, noise=0.5, stream=Stream(b"k" * 32), accumulation_steps=2
        )
        passes = count_passes(trainer)
        return fit(trainer, start), passes, trainer.loss

    (whole, few, loss), (parts, many, other) = private(None), private(60)
    assert_close(parts, whole)
    assert other == pytest.approx(loss, rel=1e-5)
    assert len(many) > len(few) and sum(many) == sum(few)


class HostReads(TorchDispatchMode):
    """Counts operations whose result the host needs: on a GPU, it would wait for them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, indices = func._schema.name, args[1] if len(args) > 1 else None
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::masked_select"):
            self.count += 1
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):  # by a mask, whose sum is the result's size
            self.count += any(x is not None and x.dtype == torch.bool for x in indices)
        return func(*args, **(kwargs or {}))


@contextmanager
def count_reads(trainer, monkeypatch):
    """Count the reads of a turn, but not of what works on the CPU, nor those inside a Transformers network of text."""

    def leave_out(owner, name):
        function = getattr(owner, name)

        def apart(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, apart)

    for name in ("_micro_batches", "split", "_collate"):
        leave_out(trainer, name)
    if isinstance(trainer, PrivateTrainer):
        leave_out(Stream, "sample")
    if trainer.model.network.config.model_type != "vit":  # whether a mask leaves out anything
        leave_out(trainer.model.network, "forward")
    with HostReads() as reads:
        yield reads


def image_trainer(steps, **options):
    from fedlora.runs.config import build

    settings = {"local_steps": steps, "batch_size": 4, **options}
    f = build({**TABLE, "training": settings}).federation()
    training = f.training
    trainer = LocalTrainer(f.model, f.task, f.data.train, f.shards[0], training, f.turn(0, 0), 1)
    return trainer, f.model.initial(0)


@pytest.mark.parametrize(
    "make",
    [
        lambda steps: image_trainer(steps),
        lambda steps: image_trainer(steps, optimizer="sgd", accumulation_steps=2),
        lambda steps: trainer_of("text-classification", 60, steps=steps),
        lambda steps: trainer_of("seq2seq", None, steps=steps),
        lambda steps: trainer_of(
            "text-classification", 60, PrivateTrainer, steps, clip=0.1, noise=0.5, stream=Stream(b"k" * 32)
        ),
    ],
    ids=["images, AdamW and clipping", "images, SGD", "text in parts", "seq2seq", "DP-SGD"],
)
def test_the_host_waits_once_a_turn_not_once_a_step(make, monkeypatch):
    counts = []
    for steps in (2, 6):
        trainer, start = make(steps)
        with count_reads(trainer, monkeypatch) as reads:
            fit(trainer, start)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0, "the loss and the weights are checked at the end"


def test_the_count_sees_what_makes_the_host_wait():
    x = torch.arange(4.0)
    with HostReads() as reads:
        float(x[0]), bool(x[1] > 0), x[x > 1], x.nonzero()
        assert reads.count == 4
        x[1:] + x.sum()
    assert reads.count == 4


def test_prefetched_items_are_in_order_and_errors_are_raised():
    assert list(prefetch(iter(range(20)))) == list(range(20))
    assert list(prefetch(iter([None, None]))) == [None, None]

    def failing():
        yield 1
        raise ValueError("no row")

    batches = prefetch(failing())
    assert next(batches) == 1
    with pytest.raises(ValueError, match="no row"):
        next(batches)


def test_an_item_is_made_while_the_one_before_is_used():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield number

    batches = prefetch(items())
    next(batches)
    for _ in range(1000):  # the thread needs a moment
        if made == [0, 1]:
            break
        torch.rand(1000).sum()
    assert made == [0, 1]
    batches.close()
