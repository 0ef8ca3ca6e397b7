"""One copy of a pretrained base for all networks that a process loads."""

import peft
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, PreTrainedModel

from fedlora.training.shared_base import SharedBases, clone_network
from tests.fixtures.own_trainers import bert, lora


def test_a_second_network_has_the_tensors_of_the_first(tmp_path, monkeypatch):
    bert().save_pretrained(tmp_path)
    reads, load = [], PreTrainedModel._load_pretrained_model

    def counted(*args, **settings):
        reads.append(args)
        return load(*args, **settings)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(counted))
    original, bases = PreTrainedModel.__dict__["from_pretrained"], SharedBases()
    with bases.share_loads():
        one = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        two = AutoModelForSequenceClassification.from_pretrained(str(tmp_path))
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        other = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert PreTrainedModel.__dict__["from_pretrained"] is original, "given back after the block"
    assert len(reads) == 2, "once for each type of the weights"
    for network in (two, again):
        assert network is not one and type(network) is BertForSequenceClassification
        assert [x.data_ptr() for x in network.parameters()] == [x.data_ptr() for x in one.parameters()]
    assert other.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(
            one(torch.ones(1, 3, dtype=torch.long)).logits, two(torch.ones(1, 3, dtype=torch.long)).logits
        )


def test_the_first_network_may_get_an_adapter_before_the_second_is_made(tmp_path):
    bert().save_pretrained(tmp_path)
    with SharedBases().share_loads():
        first = peft.get_peft_model(BertForSequenceClassification.from_pretrained(tmp_path), lora())
        second = BertForSequenceClassification.from_pretrained(tmp_path)
    assert not any("lora" in name for name, _ in second.named_parameters()), "modules are each network's own"
    assert first.get_base_model().bert.pooler.dense.weight is second.bert.pooler.dense.weight


def test_modules_are_copied_and_tensors_are_not():
    network = bert()
    copied = clone_network(network)
    assert all(a is b for a, b in zip(network.parameters(), copied.parameters()))
    assert not any(a is b for a, b in zip(network.modules(), copied.modules()))


def test_the_loader_comes_back_after_an_error(tmp_path):
    original = PreTrainedModel.__dict__["from_pretrained"]
    try:
        with SharedBases().share_loads():
            BertForSequenceClassification.from_pretrained(tmp_path / "nothing")
    except OSError:
        pass
    assert PreTrainedModel.__dict__["from_pretrained"] is original
