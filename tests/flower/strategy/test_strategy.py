"""What the strategy makes of real training, against means of the clients' own weights written out in full."""

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the flower extra")
pytest.importorskip("peft", reason="needs the peft extra")

import torch
from flwr.app import ArrayRecord
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel

from fedlora.flower import load
from fedlora.flower.strategy.arrays import FOLD, MARK, encode_base_updates
from fedlora.flower.wire import record_to_tree
from fedlora.training.peft_keys import strip_wrappers
from fedlora.training.peft_state import PeftState
from fedlora.training.recipe import list_peft_methods
from fedlora.types import Factors
from tests.fixtures.flower_strategy import Federation, gap, initial, mean, strategy, three, weights
from tests.flower.flowertune_app import task


def keys(message):
    return {key for record in message.content.array_records.values() for key in record}


def factors(record, leaf):
    return {key: record[key].numpy() for key in record if f"lora_{leaf}" in key}


@pytest.mark.parametrize(
    "method, head",
    [
        ("ffa-lora", True),
        ("rolora", True),
        ("fedex-lora", True),
        ("flora", True),
        ("rolora", False),
        ("ffa-lora", False),
    ],
)
def test_exact_methods_end_every_round_at_the_mean_of_the_clients_weights(monkeypatch, method, head):
    """The oracle is the dense weighted mean of ``W + scaling B A``, base updates included, of each client after training."""
    config = {"head": head}
    world = Federation(monkeypatch, three(**config), server=config)
    world.run(strategy(method), rounds=3, arrays=initial(**config))
    assert len(world.trained) == 9
    for round in (1, 2, 3):
        turns = world.trained[3 * (round - 1) : 3 * round]
        expected = mean([after for _, _, after in turns], [rows for rows, _, _ in turns])
        assert gap(expected, world.served[round]) <= 1e-5
        moved = gap(world.served[round], world.served[round - 1])
        assert moved > 1e-3, "or the test would show nothing"
        if round < 3:
            for _, before, _ in world.trained[3 * round : 3 * round + 3]:
                assert gap(before, world.served[round]) <= 1e-5, "every client starts at the global model"


@pytest.mark.parametrize("method, options", [("svd", {"fold_rest": True}), ("flora", {})])
def test_unequal_ranks_and_scales_of_clients(monkeypatch, method, options):
    """Ranks 1, 2, 4 with alphas of their own: every client's own scaling counts, and the mean is still exact."""
    nodes = three()
    for node, rank, alpha in ((2, 1, 3), (3, 2, 8), (4, 4, 5)):
        nodes[node] |= {"rank": rank, "alpha": alpha}
    world = Federation(monkeypatch, nodes)
    world.run(strategy(method, method_options=options, r=4, fraction_evaluate=0.0), rounds=2)
    for round in (1, 2):
        turns = world.trained[3 * (round - 1) : 3 * round]
        expected = mean([after for _, _, after in turns], [rows for rows, _, _ in turns])
        assert gap(expected, world.served[round]) <= 1e-5


def test_flexlora_serves_the_best_approximation_and_each_client_its_leading_part(monkeypatch):
    nodes = three()
    for node, rank in ((2, 1), (3, 2), (4, 4)):
        nodes[node] |= {"rank": rank, "alpha": 3 * rank}
    world = Federation(monkeypatch, nodes)
    world.run(strategy("flexlora", weighted_by_key="num-examples", fraction_evaluate=0.0), rounds=2)
    turns = world.trained[:3]
    base = {path: m.base_layer.weight for path, m in task.get_model().named_modules() if isinstance(m, LoraLayer)}
    expected = mean([after for _, _, after in turns], [rows for rows, _, _ in turns])
    ranks = {3: 1, 5: 2, 7: 4}  # rows -> rank of the three clients
    for path, W in base.items():
        P, S, Q = torch.linalg.svd((expected[path] - W).double(), full_matrices=False)
        best = {r: (W + (P[:, :r] * S[:r]) @ Q[:r]).float() for r in (1, 2, 4)}
        assert float((world.served[1][path] - best[4]).abs().max()) <= 1e-5
        for rows, before, _ in world.trained[3:]:
            assert float((before[path] - best[ranks[rows]]).abs().max()) <= 1e-5


def test_hetlora_prunes_a_client_and_pads_it_for_its_model(monkeypatch):
    world = Federation(monkeypatch, three())
    world.run(strategy("hetlora", method_options={"decay": 0.5}, fraction_evaluate=0.0), rounds=4)
    shapes = {a.shape for m in world.sent_up() for key, a in m.content["arrays"].items() if "q_proj.lora_A" in key}
    assert shapes <= {(4, 16), (2, 16), (1, 16)}
    assert all(bool(torch.isfinite(x).all()) for x in world.served[4].values())


def test_ffa_never_moves_a_and_never_sends_it(monkeypatch):
    world = Federation(monkeypatch, three())
    start = initial()
    result = world.run(strategy("ffa-lora"), rounds=3, arrays=start)
    for key, A in factors(start, "A").items():
        np.testing.assert_array_equal(A, result.arrays[key].numpy())
    assert {key for m in world.sent_up() for key in keys(m)} == {*factors(start, "B"), MARK}


def test_rolora_sends_b_and_a_in_turn(monkeypatch):
    world, start = Federation(monkeypatch, three()), initial()
    world.run(strategy("rolora"), rounds=3, arrays=start)
    sent = [keys(m) - {MARK} for m in world.sent_up()]
    assert sent == [set(factors(start, leaf)) for leaf in "BAB" for _ in range(3)]


def test_fedsa_keeps_b_and_the_head_at_the_node(monkeypatch):
    """Every message that crossed is searched, under every key, and each node finds its own ``B`` again."""
    config = {"head": True}
    world = Federation(monkeypatch, three(**config), server=config)
    start = initial(**config)
    world.run(strategy("fedsa-lora"), rounds=3, arrays=start)
    allowed = {*factors(start, "A"), MARK}
    private = [key for key in start if key not in factors(start, "A")]
    for message in world.messages:
        if message.metadata.dst_node_id == 1:
            assert keys(message) <= allowed
        else:
            assert all((message.content["arrays"][k].numpy() == start[k].numpy()).all() for k in private)
    for one in range(3):  # B of a node begins each turn where its last one ended
        rows = 3 + 2 * one
        turns = [turn for turn in world.trained if turn[0] == rows]
        heads = [(before, after) for _, before, after in turns]
        head = next(key for key in heads[0][0] if "modules_to_save" in key)
        own = [turn for row, *turn in world.factors if row == rows]
        for (_, ended), (began, _) in pairwise(own):
            assert all(torch.equal(ended[key], began[key]) and bool(began[key].any()) for key in began)
        for (_, ended), (began, _) in pairwise(heads):
            assert torch.equal(ended[head], began[head])
            assert not torch.equal(began[head], heads[0][0][head])
    kept = record_to_tree(world.grid._contexts[2].state["fedlora.kept"])
    assert {leaf for layer in kept.values() for leaf in layer} == {"B", "weight"}


def test_fedrot_sends_the_same_product_in_other_factors(monkeypatch):
    world = Federation(monkeypatch, three())
    world.run(strategy("fedrot-lora", fraction_evaluate=0.0), rounds=2)
    base = {p: m.base_layer.weight for p, m in task.get_model().named_modules() if isinstance(m, LoraLayer)}
    by_rows = {rows: after for rows, _, after in world.trained[3:]}
    for message in world.sent_up()[3:]:
        arrays = {key: torch.tensor(a.numpy()) for key, a in message.content["arrays"].items() if key != MARK}
        after = by_rows[message.content["metrics"]["num-examples"]]
        for path, W in base.items():
            product = 2.0 * arrays[f"{path}.lora_B.weight"] @ arrays[f"{path}.lora_A.weight"]
            assert float((W + product - after[path]).abs().max()) <= 1e-6


@pytest.mark.parametrize("method", ["fedex-lora", "flora"])
def test_a_node_that_was_away_catches_up(monkeypatch, method):
    """Node 4 does not get rounds 2 and 3; messages tell it what it lacks, and no node is sent a fold twice."""
    away, world = set(), None

    def lose(message):
        down = message.metadata.dst_node_id
        lost = down == 4 and message.content["fedlora"]["round"] in away
        return None if lost else message

    world = Federation(monkeypatch, three(), post=lose)
    away |= {1, 2}
    world.run(strategy(method, fraction_evaluate=0.0), rounds=4)
    assert len(world.trained) == 3 + 2 + 2 + 3
    for _, before, _ in world.trained[-3:]:
        assert gap(before, world.served[3]) <= 1e-5
    told = {m.metadata.dst_node_id: m.content["fedlora"] for m in world.sent_down()[-3:]}
    assert [(told[n]["first"], told[n]["last"]) for n in (2, 3, 4)] == [(2, 3), (2, 3), (0, 3)]


def test_a_lost_reply_does_not_fold_twice(monkeypatch):
    lost = []

    def lose(message):
        up = message.metadata.dst_node_id == 1 and message.metadata.message_type == "train"
        if up and message.metadata.src_node_id == 4 and len(lost) < 2 and len(world.trained) > 5:
            lost.append(message)
            return None
        return message

    world = Federation(monkeypatch, three(), post=lose)
    world.run(strategy("fedex-lora", fraction_evaluate=0.0), rounds=4)
    assert len(lost) == 2
    for _, before, _ in world.trained[-3:]:
        assert gap(before, world.served[3]) <= 1e-5


def test_a_node_that_lost_its_state_reports_and_is_sent_everything(monkeypatch):
    world, gone = Federation(monkeypatch, three()), []

    def forget(message):
        if message.metadata.dst_node_id == 3 and message.content["fedlora"]["round"] == 2 and not gone:
            gone.append(world.grid._contexts[3].state.clear())
        return message

    world.post = forget
    world.run(strategy("flora", fraction_evaluate=0.0), rounds=4)
    assert [m.error.reason for m in world.messages if m.has_error()] == [
        "ValueError: this node holds 0 base updates, and the message begins after 1; it has lost what it kept, and the server "
        "will send all of them next time."
    ]
    assert len(world.trained) == 3 + 3 + 2 + 3
    for _, before, _ in world.trained[-3:]:
        assert gap(before, world.served[3]) <= 1e-5


def test_a_model_that_lives_on_between_rounds_is_folded_once(monkeypatch):
    model = task.get_model()
    monkeypatch.setattr("tests.flower.flowertune_app.after.client_app.get_model", lambda config: model)
    world = Federation(monkeypatch, three())
    world.run(strategy("fedex-lora"), rounds=3)
    for round in (1, 2, 3):
        turns = world.trained[3 * (round - 1) : 3 * round]
        expected = mean([after for _, _, after in turns], [rows for rows, _, _ in turns])
        assert gap(expected, world.served[round]) <= 1e-5


def test_a_result_starts_another_run_where_it_ended(monkeypatch):
    world = Federation(monkeypatch, three())
    result = world.run(strategy("fedex-lora", fraction_evaluate=0.0), rounds=2)
    ended = world.served[2]
    world.trained.clear()
    world.run(strategy("fedex-lora", fraction_evaluate=0.0), rounds=1, arrays=result.arrays)
    assert gap(world.served[0], ended) <= 1e-6
    for _, before, _ in world.trained:
        assert gap(before, ended) <= 1e-5


def test_load_gives_one_model_that_merges_to_plain_weights(monkeypatch):
    world = Federation(monkeypatch, three())
    result = world.run(strategy("fedex-lora", fraction_evaluate=0.0), rounds=2)
    assert any(key.startswith(FOLD) for key in result.arrays)
    rows = task.load_rows(0)
    with torch.no_grad():
        model = load(task.get_model(), result.arrays).eval()
        whole = model(input_ids=rows).logits
        merged = model.merge_and_unload()(input_ids=rows).logits
        half = load(task.get_model().bfloat16(), result.arrays).eval()(input_ids=rows).logits
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half.float(), whole, atol=0.05, rtol=0.05)


def test_a_base_that_keeps_its_weights_transposed(monkeypatch):
    """GPT-2's layers hold (inputs, outputs); a fold must be turned for them."""
    from peft import LoraConfig, get_peft_model

    def gpt2(node_config=None):
        torch.manual_seed(7)
        base = GPT2LMHeadModel(
            GPT2Config(vocab_size=task.VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=task.LENGTH, bos_token_id=0,
                       eos_token_id=0)
        )  # fmt: skip
        lora = LoraConfig(r=2, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        return get_peft_model(base, lora)

    def turned(model):
        return {
            path: (m.base_layer.weight + (m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight).T)
            .detach().clone() for path, m in model.named_modules() if isinstance(m, LoraLayer)
        }  # fmt: skip

    monkeypatch.setattr("tests.flower.flowertune_app.after.client_app.get_model", gpt2)
    monkeypatch.setattr(task, "get_model", gpt2)
    monkeypatch.setattr("tests.fixtures.flower_strategy.weights", turned)
    world = Federation(monkeypatch, three())
    world.run(strategy("fedex-lora", fraction_evaluate=0.0), rounds=2)
    turns = world.trained[3:6]
    assert gap(mean([after for _, _, after in turns], [rows for rows, _, _ in turns]), world.served[2]) <= 1e-5


def test_only_methods_for_lora_are_offered():
    assert {"fedit", "flora", "fedex-lora", "svd"} <= set(list_peft_methods())
    assert not {"fed-sb", "ravan", "feddpa"} & set(list_peft_methods())
    assert weights(task.get_model())


class Compiled(torch.nn.Module):
    """What ``torch.compile`` makes of a network's names, without the compiler."""

    def __init__(self, network):
        super().__init__()
        self._orig_mod = network


def test_a_model_that_was_compiled_first_is_the_same_model():
    """``torch.compile`` before PEFT puts ``_orig_mod.`` into every key, of which other parties know nothing."""
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    settings = {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "fan_in_fan_out": True}

    def model(compiled, seed):
        torch.manual_seed(0)
        base = GPT2LMHeadModel(config)
        made = get_peft_model(Compiled(base) if compiled else base, LoraConfig(**settings))
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, x in made.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    x.add_(torch.randn(x.shape, generator=g))
        return made

    plain, compiled = model(False, 1), model(True, 2)
    key = "transformer.h.0.attn.c_attn"
    arrays = ArrayRecord(get_peft_model_state_dict(plain))
    base_updates = {key: Factors(torch.ones(24, 1), torch.ones(1, 8))}
    load(compiled, ArrayRecord({**arrays, **encode_base_updates(base_updates)}))
    load(plain, ArrayRecord({**arrays, **encode_base_updates(base_updates)}))
    mine, theirs = (
        {strip_wrappers(key): x for key, x in made.state_dict().items() if "original_module" not in key}
        for made in (compiled, plain)
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[key]) for key, x in mine.items())
    own = PeftState.of(get_peft_model_state_dict(compiled))
    assert own.adapted == {key} and own.tree.keys() == PeftState.of(get_peft_model_state_dict(plain)).tree.keys()
