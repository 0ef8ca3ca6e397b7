"""Each row's own gradient on real networks: a ViT, a BERT with masks, a Llama, with and without checkpoints."""

import pytest
import torch

from fedlora.engines.client_turn import ClientTurn
from fedlora.runs.config import build
from fedlora.schema import apply_overrides, merge_tables
from fedlora.security.privacy import per_sample_gradients
from tests.fixtures.federation import TABLE, WEIGHTS

LEVEL = {
    "privacy": {"level": "example", "noise_multiplier": 1.0},
    "adapter": {"rank": 2},
    "training": {"batch_size": 4, "precision": "float32"},
}


def agree(table, *overrides, rows=4):
    """The gradients of a few rows at once against the gradient of each row alone."""
    f = build(apply_overrides(merge_tables(LEVEL, table), list(overrides))).federation()
    trainer = ClientTurn(f, f.turn(0, 0)).build_trainer()
    draws = torch.Generator().manual_seed(0)
    tree = {p: {leaf: x + 0.05 * torch.randn(x.shape, generator=draws) if leaf in f.model.parts[p].adapter.trainable else x for leaf, x in layer.items()} for p, layer in f.model.initial(0).items()}  # fmt: skip
    f.model.load(tree)
    f.model.network.eval()
    parameters = f.model.select({p: part.adapter.trainable for p, part in f.model.parts.items()})
    some = f.shards[0].train[:rows]
    batch = trainer.batch(some)
    losses, found = per_sample_gradients.compute_gradients(
        f.model, lambda network: f.task.losses(network, batch), rows, parameters
    )
    for i, row in enumerate(some):
        one = trainer.batch(row[None])
        alone = f.model.gradient(lambda network, one=one: f.task.loss(network, one))
        with torch.no_grad():
            torch.testing.assert_close(losses[i].float(), f.task.loss(f.model.network, one), atol=1e-5, rtol=1e-5)
        for (path, leaf), x in found.items():
            torch.testing.assert_close(x[i], alone[path][leaf], atol=1e-5, rtol=1e-4)
    return found


def test_a_vit():
    assert len(agree(TABLE)) == WEIGHTS * 2 + 2


@pytest.mark.shared
@pytest.mark.parametrize("overrides", [(), ("training.gradient_checkpointing=true",)], ids=["plain", "checkpointed"])
def test_a_bert_with_masks(shared, overrides):
    table = {
        "model": {"name": str(shared / "models" / "minilm-l3-h384-v8k")}, "clients": {"count": 2},
        "task": {"name": "text-classification", "data": str(shared / "data" / "banking77"), "train_rows": 40, "test_rows": 20, "max_length": 32},
    }  # fmt: skip
    assert agree(table, *overrides)


@pytest.mark.shared
def test_a_llama_with_rows_of_unequal_length(shared):
    table = {
        "model": {"name": str(shared / "models" / "stories260k-llama")}, "clients": {"count": 2},
        "task": {"name": "causal-lm", "data": str(shared / "data" / "shakespeare_roles"), "text": "text", "max_length": 48, "train_rows": 40, "test_rows": 20},
    }  # fmt: skip
    assert agree(table)
