"""``fedlora.Server``: state dicts in, state dict out, against other implementations and dense arithmetic."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import fedlora
from fedlora.engines.server import RoundError, Server
from fedlora.files import decode_state, encode_state
from fedlora.methods import Method
from fedlora.methods._base import pick
from fedlora.rounds import Received, client_turn, server_turn
from fedlora.seeds import derive_seed
from fedlora.training.peft_state import PeftState
from fedlora.training.recipe import Recipe
from fedlora.types import Turn
from tests.docs import blocks

PART = "base_model.model.h.{}.q"
A, B = (f"{PART.format(0)}.lora_{leaf}.weight" for leaf in "AB")
HEAD = "base_model.model.score.weight"
METHODS = [
    "fedit", "ffa-lora", "rolora", "fedsa-lora", "fedex-lora", "flora", "flora-na", "fedrot-lora", "svd", "flexlora",
    "lora-fair", "hetlora",
]  # fmt: skip
WIDE = {"norm_limit": 1e6, "factor_limit": 1e6}
ALPHA, M, N, R = 8, 7, 6, 3


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def initial(head=False, rank=R, dtype=torch.float32):
    """Two weights, of which the second is larger; ``A`` drawn, ``B`` zero."""
    state = {}
    for i, more in enumerate((0, 2)):
        state[f"{PART.format(i)}.lora_A.weight"] = draw(i, rank, N + more).to(dtype)
        state[f"{PART.format(i)}.lora_B.weight"] = torch.zeros(M + more, rank, dtype=dtype)
    return {**state, HEAD: draw(9, 2, M).to(dtype)} if head else state


def server(method, state=None, **more):
    return Server(method, state or initial(), **{"lora_alpha": ALPHA, "validation": WIDE, **more})


def move(key, x, seed):
    """What training makes of a value, from a seed."""
    return x + 0.1 * draw(derive_seed(seed, key), *x.shape)


def trained(made, client, rank=None):
    """The upload of a client that follows the protocol and knows nothing of fedlora."""
    start, moved = made.client_state(client, rank), set(made.trains)
    assert set(made.sends) <= moved
    return {key: move(key, start[key], 100 * made.round + client) for key in made.sends}


def same(one, other):
    assert list(one) == list(other)
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(other[key])) for key, x in one.items())


# --------------------------------------------------------- against the functions of a round
@dataclass
class Moves:
    """Moves each leaf as ``move`` moves its key."""

    keys: dict
    seed: int

    def gradient(self, start):
        raise AssertionError("no method here asks for it")

    def fit(self, start, trained, rules):
        return {
            part: {k: move(self.keys[part, k], x, self.seed) if k in trained[part] else x for k, x in layer.items()}
            for part, layer in start.items()
        }


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_server_turn_on_the_uploads_of_client_turn(method, head):
    """To the bit, over four rounds, though here the clients apply the method's hooks and there they do not."""
    made, recipe = server(method, initial(head)), Recipe(method, ALPHA)
    shared, kept, rows = PeftState.of(initial(head)), [{}, {}, {}], [120, 40, 80]
    for number in range(4):
        rules, uploads, finished = recipe.rules(shared), [], []
        for k in range(3):
            turn = Turn(number, k, R, derive_seed(0, "turn", number, k))
            sent, kept[k] = client_turn(rules, shared.tree, kept[k], turn, Moves(shared.keys, 100 * number + k))
            uploads.append(Received(turn, rows[k], sent))
            finished.append(trained(made, k))
        served = server_turn(rules, shared.tree, uploads)
        state = made.step(finished, rows, [0, 1, 2])
        assert same(state, shared.to_state_dict(served.shared, made.state))
        assert made.last_base_updates.keys() == served.base_updates.keys()
        for part, factors in served.base_updates.items():
            dense = sum(f.dense() for f in factors)
            torch.testing.assert_close(made.last_base_updates[part].dense(), dense, atol=1e-5, rtol=1e-5)
        shared = PeftState.of(state)
    assert made.round == 4 and not made.quarantine


@pytest.mark.parametrize(
    "method, ranks",
    [*((method, (4, 4, 4)) for method in METHODS), ("svd", (1, 2, 4)), ("flexlora", (1, 2, 4)), ("flora", (1, 2, 4))],
)
def test_a_step_is_a_round_of_flowers_strategy(monkeypatch, method, ranks):
    """To the bit: what ``FedLoRA`` makes of clients with ``receive`` and ``send``, over three rounds of real training."""
    pytest.importorskip("flwr", reason="needs the flower extra")
    pytest.importorskip("peft", reason="needs the peft extra")
    from peft import get_peft_model_state_dict

    from fedlora.flower.strategy.arrays import FOLD
    from tests.fixtures import flower_strategy as flower
    from tests.flower.flowertune_app.after import client_app

    config = {"head": method == "fedsa-lora"}
    nodes = flower.three(**config)
    for node, rank in zip(nodes, ranks):
        nodes[node] |= {"rank": rank}
    world, turns = flower.Federation(monkeypatch, nodes, server=config), []
    fit = client_app.fit

    def watched(model, rows, rate):
        def now():
            return {key: x.detach().clone() for key, x in get_peft_model_state_dict(model).items()}

        began, loss = now(), fit(model, rows, rate)
        turns.append((len(rows), began, now()))
        return loss

    monkeypatch.setattr(client_app, "fit", watched)
    arrays = flower.initial(**config)
    result = world.run(flower.strategy(method, fraction_evaluate=0.0), rounds=3, arrays=arrays)
    assert len(turns) == 9
    made = server(method, {key: torch.tensor(x.numpy()) for key, x in arrays.items()}, lora_alpha=flower.ALPHA)
    for number in range(3):
        ends, rows = [], []
        for node, (count, began, ended) in zip((2, 3, 4), sorted(turns[3 * number :][:3], key=lambda turn: turn[0])):
            start = made.client_state(node, ranks[node - 2])
            stays = set(made.keeps) if number else set()
            assert all(torch.equal(x, began[key]) for key, x in start.items() if key not in stays)
            assert all(torch.equal(x, began[key]) for key, x in ended.items() if key not in made.trains)
            ends, rows = [*ends, {key: ended[key] for key in made.sends}], [*rows, count]
        state = made.step(ends, rows, [2, 3, 4])
        there = {key: torch.tensor(x.numpy()) for key, x in world.arrays[number + 1].items()}
        assert same(state, {key: x for key, x in there.items() if not key.startswith(FOLD)})
        folded = {f"{FOLD}{part}.{side}": x for part, f in made.base_updates.items() for side, x in f._asdict().items()}
        assert same(folded, {key: x for key, x in there.items() if key.startswith(FOLD)})
    assert result.arrays is world.arrays[3]


# ------------------------------------------------------------------------- against dense arithmetic
def product(state, i=0):
    """``s B A`` in float64."""
    a, b = (state[f"{PART.format(i)}.lora_{leaf}.weight"].double().numpy() for leaf in "AB")
    return ALPHA / a.shape[0] * b @ a


def one_round(method, ranks=(R, R, R), **more):
    made = server(method, **more)
    uploads = [trained(made, k, rank) for k, rank in enumerate(ranks)]
    return made, uploads, made.step(uploads, [120, 40, 80], [0, 1, 2])


W = (0.5, 1 / 6, 1 / 3)


def test_fedit_is_the_mean_of_the_factors():
    _, uploads, state = one_round("fedit")
    for key in state:
        expected = sum(w * u[key].double() for w, u in zip(W, uploads))
        torch.testing.assert_close(state[key].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method, ranks", [("svd", (3, 3, 3)), ("flexlora", (3, 3, 3)), ("svd", (1, 2, 3)), ("flexlora", (1, 2, 3))])  # fmt: skip
def test_flexlora_and_svd_serve_the_best_rank_of_the_mean_product(method, ranks):
    made, uploads, state = one_round(method, ranks)
    for i in (0, 1):
        mean = sum(w * product(u, i) for w, u in zip(W, uploads))
        P, S, Q = np.linalg.svd(mean, full_matrices=False)
        best = (P[:, :R] * S[:R]) @ Q[:R]
        np.testing.assert_allclose(product(state, i), best, atol=1e-5)
        short = made.client_state(0, 1)
        if method == "flexlora":
            np.testing.assert_allclose(product(short, i), S[0] * np.outer(P[:, 0], Q[0]), atol=1e-5)


@pytest.mark.parametrize(
    "method, ranks, options",
    [("flora", (3, 3, 3), {}), ("flora", (1, 2, 3), {}), ("fedex-lora", (3, 3, 3), {}), ("svd", (1, 2, 3), {"fold_rest": True})],
)  # fmt: skip
def test_methods_that_change_the_base_end_at_the_mean_product(method, ranks, options):
    """Over three rounds: the base updates and the adapter of a client, against the dense mean of ``W + s B A``."""
    made = server(method, method_options=options)
    base = {i: np.zeros((M + 2 * i, N + 2 * i)) for i in (0, 1)}
    for number in range(3):
        uploads = [trained(made, k, rank) for k, rank in enumerate(ranks)]
        expected = {i: base[i] + sum(w * product(u, i) for w, u in zip(W, uploads)) for i in (0, 1)}
        state = made.step(uploads, [120, 40, 80], [0, 1, 2])
        last = {i: base[i] + made.last_base_updates[f"h.{i}.q"].dense().double().numpy() for i in (0, 1)}
        base = {i: made.base_updates[f"h.{i}.q"].dense().double().numpy() for i in (0, 1)}
        for i in (0, 1):
            np.testing.assert_allclose(base[i] + product(state, i), expected[i], atol=1e-5)
            np.testing.assert_allclose(last[i], base[i], atol=1e-5)
        assert max(error["served"] for error in made.errors.values()) < 1e-5, number


def test_errors_are_those_of_the_mean_product():
    made, uploads, state = one_round("fedit")
    mean = sum(w * product(u) for w, u in zip(W, uploads))
    expected = np.linalg.norm(product(state) - mean) / np.linalg.norm(mean)
    assert made.errors["h.0.q"]["served"] == pytest.approx(expected, rel=1e-4)
    assert one_round("fedit", measure=False)[0].errors == {}
    assert one_round("fedsa-lora")[0].errors == {}, "the server does not know the clients' B"


# ------------------------------------------------------------------------------ protocol of a round
def keys(leaf):
    return [f"{PART.format(i)}.lora_{leaf}.weight" for i in (0, 1)]


def test_the_server_says_what_to_freeze_send_and_keep():
    both = [key for i in (0, 1) for key in (keys("A")[i], keys("B")[i])]
    plain = server("fedit", initial(head=True))
    assert plain.trains == plain.sends == [*both, HEAD] and plain.keeps == []
    personal = server("fedsa-lora", initial(head=True))
    assert personal.trains == [*both, HEAD] and personal.sends == keys("A") and personal.keeps == [*keys("B"), HEAD]
    ffa = server("ffa-lora")
    assert ffa.trains == ffa.sends == keys("B") and ffa.keeps == []
    turns = server("rolora")
    for leaf in "BAB":
        assert turns.trains == turns.sends == keys(leaf)
        turns.step([trained(turns, k) for k in range(2)])


def test_leaves_that_are_not_sent_stay_as_they_are():
    for method, moved in (("ffa-lora", "B"), ("fedsa-lora", "A")):
        _, _, state = one_round(method)
        for key, x in initial().items():
            assert torch.equal(x, state[key]) == (f"lora_{moved}" not in key)


def test_flora_draws_every_turn_from_the_clients_number_and_the_round():
    made = server("flora")
    one, other, again = made.client_state(0), made.client_state(1), made.client_state(0)
    assert same(one, again) and not torch.equal(one[A], other[A]) and not one[B].any()
    made.step([trained(made, k) for k in range(2)], clients=[0, 1])
    assert not torch.equal(one[A], made.client_state(0)[A])
    assert not torch.equal(one[A], server("flora", seed=1).client_state(0)[A])


def test_order_does_not_count_where_clients_have_numbers():
    ends = []
    for order in ([0, 1, 2], [2, 0, 1]):
        made = server("svd")
        uploads = [trained(made, k) for k in range(3)]
        ends.append(made.step([uploads[k] for k in order], [[120, 40, 80][k] for k in order], order))
    assert same(*ends)


def test_weights_are_equal_without_any_and_may_be_fractions_or_numpys():
    ends = []
    for weights in (None, [0.5, 0.5, 0.5], np.array([7, 7, 7])):
        made = server("fedit")
        ends.append(made.step([trained(made, k) for k in range(3)], weights))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_and_keys_stay(dtype):
    state = {key.replace(".weight", ".default.weight"): x for key, x in initial(dtype=dtype).items()}
    made = server("svd", state)
    found = made.step([trained(made, k) for k in range(3)])
    assert list(found) == list(state) and {x.dtype for x in found.values()} == {dtype}


def test_numpy_in_and_numpy_out():
    state = {key: x.numpy().astype(np.float16) for key, x in initial().items()}
    made = server("fedrot-lora", state)
    uploads = [{k: x + np.float16(0.01 * (c + 1)) for k, x in state.items()} for c in range(3)]
    found = made.step(uploads, [1, 1, 1])
    assert {type(x) for x in found.values()} == {np.ndarray} and {x.dtype for x in found.values()} == {np.dtype("f2")}
    tensors = server("fedrot-lora", {key: torch.tensor(x) for key, x in state.items()})
    assert same(found, tensors.step([{key: torch.tensor(x) for key, x in u.items()} for u in uploads], [1, 1, 1]))


def test_nothing_outside_can_change_the_state():
    state = initial()
    made = server("fedit", state)
    state[B] += 1
    made.state[B].add_(1)
    made.client_state()[B].add_(1)
    assert not made.state[B].any()


# ------------------------------------------------------------------------------- what is refused
@dataclass(frozen=True)
class Mixes(Method):
    """Sends ``A`` turned by the ``B`` that it keeps."""

    title = "Mixes"

    def send(self, work, turn):
        return {"A": work.end["A"] + work.end["B"].sum()}


@dataclass(frozen=True)
class Notes(Method):
    """Keeps a note for its next turn."""

    title = "Notes"

    def keep(self, work, sent, turn):
        return {"_seen": torch.ones(1)}


@dataclass(frozen=True)
class Asks(Method):
    """Trains the side with the larger gradient."""

    title = "Asks"

    def trains(self, start, turn, gradient):
        return frozenset(max(gradient().items(), key=lambda item: float(item[1].norm()))[0])


@dataclass(frozen=True)
class Blends(Method):
    """Starts halfway between its own ``B`` and the shared one."""

    title = "Blends"

    def receive(self, shared, kept, turn):
        return {**shared, **{leaf: (x + shared[leaf]) / 2 for leaf, x in kept.items()}}

    def send(self, work, turn):
        return pick(work.end, self.adapter.inputs)


@dataclass(frozen=True)
class Halves(Method):
    """A method that needs nothing at the client, from outside the package."""

    title = "Halves"

    def combine(self, shared, uploads):
        outcome = super().combine(shared, uploads)
        return replace(outcome, layer={leaf: x / 2 for leaf, x in outcome.layer.items()})


HERE = "tests.engines.test_server"


def test_a_method_of_another_package_serves():
    halved, plain = (server(method) for method in (f"{HERE}:Halves", "fedit"))
    one, other = (made.step([trained(made, k) for k in range(2)]) for made in (halved, plain))
    assert same(one, {key: x / 2 for key, x in other.items()})


@pytest.mark.parametrize(
    "method, more, words",
    [
        ("fedits", {}, "there is no method 'fedits'; did you mean 'fedit'?"),
        ("ravna", {}, "the nearest, 'ravan', trains an adapter of kind MultiHead"),
        ("local", {}, "Local cannot be served to clients without fedlora: its clients send nothing; take another"),
        ("hetlora", {"method_options": {"decay": 0.5}}, "its clients shorten their own factors"),
        (f"{HERE}:Mixes", {}, "compute what they send from leaves that they keep"),
        (f"{HERE}:Notes", {}, "keep notes of their own between rounds"),
        (f"{HERE}:Asks", {}, "ask for a gradient before they train"),
        (f"{HERE}:Blends", {}, "start from a mixture of what they keep and what they are sent"),
        (f"{HERE}:draw", {}, "is not a fedlora.methods.Method"),
        ("svd", {"method_options": {"gage": "anchor"}}, "there is no setting 'method_options.gage'"),
        ("fedit", {"lora_alpha": 0}, "lora_alpha is 0"),
        ("fedit", {"min_clients": 0}, "min_clients is 0"),
        ("fedit", {"robust": "krumm"}, "did you mean 'krum'"),
        ("fedit", {"validation": {"norm_limit": 0.5}}, "validation.norm_limit is 0.5"),
    ],
)
def test_servers_that_cannot_be(method, more, words):
    with pytest.raises(ValueError, match=".") as error:
        server(method, **more)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop(B), "do not fit together"),
        (lambda s: s.clear(), "hold no LoRA factors"),
        (lambda s: s.update({B: s[B] * torch.nan}), f"'{B}' holds values that are NaN or infinite"),
        (lambda s: s.update({B: s[B].long()}), "holds torch.int64 where floats are needed"),
        (lambda s: s.update({B: [1.0]}), "holds a list where a tensor or a numpy array is needed"),
        (lambda s: s.update({"base_model.model.h.0.q.base_layer.weight": s[A]}), "a base model's weight"),
    ],
)
def test_first_states_that_cannot_be(change, words):
    state = initial()
    change(state)
    with pytest.raises(ValueError, match=".") as error:
        Server("fedit", state, lora_alpha=ALPHA)
    assert words in str(error.value)


def test_a_start_that_flora_would_lose():
    state = {key: x + 1 for key, x in initial().items()}
    with pytest.raises(ValueError, match="begins every turn afresh and would lose the update"):
        server("flora", state)


@pytest.mark.parametrize(
    "count, weights, clients, words",
    [
        (0, None, None, "there are no uploads"),
        (2, [1], None, "there are 2 uploads and 1 weights"),
        (2, [1, -3], None, "a weight is -3"),
        (2, [1, 0], None, "a weight is 0"),
        (2, [1, float("nan")], None, "a weight is nan"),
        (2, [1, "2"], None, "a weight is '2'"),
        (2, None, [0], "there are 2 uploads and 1 clients"),
        (2, None, [0, 0], "client 0 is named twice"),
        (2, None, [0, "b"], "a client is 'b'"),
        (2, None, [0, -1], "a client is -1"),
    ],
)
def test_steps_that_cannot_be(count, weights, clients, words):
    made = server("fedit")
    with pytest.raises(ValueError, match=".") as error:
        made.step([trained(made, k) for k in range(count)], weights, clients)
    assert words in str(error.value) and made.round == 0 and same(made.state, initial())


FAULTS = {
    "missing": (lambda u: u.pop(B), f"it lacks '{B}'"),
    "foreign": (lambda u: u.update({HEAD: draw(0, 2, 2)}), f"it sent '{HEAD}'"),
    "rank": (lambda u: u.update({A: u[A][:2], B: u[B][:, :2]}), "is needed"),
    "shape": (lambda u: u.update({B: u[B][:1]}), "is needed"),
    "nan": (lambda u: u.update({B: u[B] * torch.nan}), "NaN or infinite"),
    "huge": (lambda u: u.update({B: u[B] + 1e6}), "no finite numbers, or no plain ones"),
    "whole numbers": (lambda u: u.update({B: u[B].int()}), "where floats are needed"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("named", [False, True])
def test_a_bad_upload_is_left_out_and_the_others_share_its_weight(fault, named):
    change, words = FAULTS[fault]
    made, other = server("fedex-lora"), server("fedex-lora")
    uploads = [trained(made, k) for k in range(3)]
    clients, rest = ([4, 5, 6], [4, 6]) if named else (None, None)
    expected = other.step([uploads[0], uploads[2]], [120, 80], rest)
    change(uploads[1])
    assert same(made.step(uploads, [120, 40, 80], clients), expected)
    assert list(made.quarantine) == [1] and list(made.quarantine[1]) == [5 if named else 1]
    assert words in next(iter(made.quarantine[1].values()))
    assert made._guard.conduct.get("strikes", {}) == ({"5": 1} if named else {})


def test_an_upload_that_is_left_out_is_logged(caplog):
    made = server("fedit")
    uploads = [trained(made, client) for client in range(3)]
    del uploads[1][A]
    made.step(uploads, clients=[4, 5, 6])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("round 1: client 5 is left out, its upload is quarantined: ") and A in line


@pytest.mark.parametrize(
    "method, state, more, words",
    [
        (None, None, {}, "the method is None; give its name"),
        ("fedit", "adapter", {}, "the initial state is a str; give what PEFT's get_peft_model_state_dict returns"),
        ("fedit", None, {"lora_alpha": "8"}, "lora_alpha is '8'; give the number"),
    ],
)
def test_arguments_of_another_kind(method, state, more, words):
    with pytest.raises(ValueError, match=words):
        server(method, state, **more)


def test_weights_that_are_no_list():
    made = server("fedit")
    with pytest.raises(ValueError, match="weights is 3; give a list with one weight an upload"):
        made.step([trained(made, 0)], weights=3)


def test_an_upload_that_is_no_state_dict():
    made = server("fedit")
    made.step([trained(made, 0), [1, 2]])
    assert made.quarantine == {1: {1: "it is a list where a state dict is needed"}}


def test_leaves_that_a_method_does_not_send_are_refused_by_name():
    made = server("fedsa-lora")
    upload = trained(made, 0)
    with pytest.raises(RoundError, match=r"lora_B.weight' and 1 more, which the method does not send in this round"):
        made.step([{**upload, **{key: made.state[key] for key in made.keeps}}])


def test_too_few_good_uploads_leave_the_state_and_the_round_can_be_done_again():
    made = server("rolora", min_clients=2)
    uploads = [trained(made, k) for k in range(2)]
    broken = {key: x * torch.nan for key, x in uploads[1].items()}
    with pytest.raises(
        RoundError, match=r"round 1 has 1 good uploads of 2, and 2 are needed \(min_clients\); upload 1"
    ):
        made.step([uploads[0], broken])
    assert made.round == 0 and same(made.state, initial()) and made.sends == keys("B")
    made.step(uploads)
    assert made.round == 1 and made.sends == keys("A")


def test_a_client_may_send_again_what_it_sent_in_a_round_that_failed():
    """And one that makes a round fail again and again is excluded in the end: each attempt counts."""
    made = server("fedit", min_clients=2, validation={**WIDE, "strikes": 2})
    good, bad = trained(made, 0), {key: x * torch.nan for key, x in trained(made, 1).items()}
    for attempt in (1, 2):
        with pytest.raises(RoundError, match="round 1 has 1 good uploads of 2"):
            made.step([good, bad], clients=[0, 1])
        assert made.exclusions == (frozenset() if attempt == 1 else {1})
    made.step([good, trained(made, 2)], clients=[0, 2])
    assert made.round == 1 and made.quarantine == {1: {1: f"'{A}' holds values that are NaN or infinite"}}


def test_an_absurd_upload_is_quarantined_and_its_client_excluded():
    made = server("fedit", validation={"strikes": 2})

    def uploads():
        found = [trained(made, k) for k in range(5)]
        return [*found[:4], {key: 100 * x for key, x in found[4].items()}]

    for number in (1, 2):
        made.step(uploads(), clients=range(5))
        assert "above validation.norm_limit" in made.quarantine[number][4]
    assert made.exclusions == {4}
    good = [trained(made, k) for k in range(5)]
    other = server("fedit", made.state)
    assert same(made.step(good, clients=range(5)), other.step(good[:4]))
    assert made.quarantine[3] == {4: "it was quarantined in too many rounds (validation.strikes)"}
    made.step([trained(made, k) for k in range(5)])
    assert 4 not in made.quarantine, "without numbers, the fifth upload may be anyone's"
    unnamed = server("fedit", validation={"strikes": 1})
    for _ in range(2):
        unnamed.step(uploads())
    assert unnamed.exclusions == frozenset() and list(unnamed.quarantine) == [1, 2]


def test_a_robust_rule_outvotes_a_turned_upload_and_needs_three():
    made, plain = (server("fedit", robust=robust) for robust in ("krum", None))
    uploads = [trained(made, 0), *({k: x + 0.001 * c for k, x in trained(made, 0).items()} for c in (1, 2, 3))]
    turned = {key: -3 * x for key, x in trained(made, 5).items()}
    state = made.step([*uploads, turned], clients=range(5))
    assert any(same(state, plain_state) for plain_state in uploads)
    assert not same(state, plain.step([*uploads, turned], clients=range(5)))
    with pytest.raises(RoundError, match="round 2 cannot be combined: a robust rule needs 3 good uploads"):
        made.step(uploads[:2])
    with pytest.raises(ValueError, match="weights of its own"):
        server("hetlora", robust="clip")


def test_a_result_too_large_for_its_precision():
    state = {key: x.half() for key, x in initial().items()}
    made = server("flexlora", state)
    uploads = [
        {key: (6e4 * draw(i + k, *x.shape)).clamp(-6e4, 6e4) for i, (key, x) in enumerate(state.items())}
        for k in (0, 1)
    ]
    with pytest.raises(RoundError, match="is too large for torch.float16; send the adapter in float32"):
        made.step(uploads)
    assert same(made.state, state)


@pytest.mark.parametrize("method, rank, words", [("fedit", 2, "one rank for all clients"), ("svd", 4, "needs 1 to 3"), ("svd", 0, "needs 1 to 3")])  # fmt: skip
def test_ranks_that_cannot_be(method, rank, words):
    with pytest.raises(ValueError, match=words):
        server(method).client_state(0, rank)


# ------------------------------------------------------------------------- in another engine
@dataclass
class FLModel:
    """NVFLARE's value of the same name, as far as the page needs it."""

    params: dict
    meta: dict
    current_round: int = 0
    total_rounds: int = 0


class ModelController:
    """Stands in for NVFLARE's: three sites, which train as ``move`` does."""

    def __init__(self, persistor_id):
        assert persistor_id == ""

    def sample_clients(self):
        return ["site-2", "site-1", "site-3"]

    def send_model_and_wait(self, targets, data):
        assert isinstance(data, FLModel) and set(targets) == set(self.sample_clients())
        results = []
        for site in self.sample_clients():
            moved = {
                key: move(key, torch.tensor(data.params[key]), data.current_round + ord(site[-1])).numpy()
                for key in data.meta["sends"]
            }
            results.append(FLModel(moved, {"NUM_STEPS_CURRENT_ROUND": int(site[-1]), "client_name": site}))
        return results

    def info(self, text):
        assert "left out {}" in text


@pytest.mark.parametrize("method", ["fedit", "rolora", "fedsa-lora"])
def test_the_manuals_controller_for_nvflare(tmp_path, monkeypatch, method):
    """The page's class on a stand-in of NVFLARE's interface, stopped after a round and started again."""
    names = {
        "nvflare.app_common.abstract.fl_model": FLModel,
        "nvflare.app_common.workflows.model_controller": ModelController,
    }
    for name, kind in names.items():
        module = ModuleType(name)
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)
        for i in range(1, name.count(".") + 1):
            monkeypatch.setitem(sys.modules, name.rsplit(".", i)[0], ModuleType("package"))
    page = Path(__file__).parents[2] / "docs" / "server-only.md"
    (block,) = (b for b in blocks.blocks(page, page.parent) if "class LoRAController" in b.text)
    space: dict = {}
    exec(block.text, space)
    state = {key: x.numpy() for key, x in initial().items()}
    save_file(state, tmp_path / "initial.safetensors")
    for rounds in (1, 3):
        space["LoRAController"](method, str(tmp_path / "initial.safetensors"), ALPHA, str(tmp_path), rounds).run()
    made = server(method, state, validation=None)
    for number in range(3):
        uploads = [
            {key: move(key, torch.tensor(made.state[key]), number + ord(k)) for key in made.sends} for k in "123"
        ]
        made.step(uploads, [1, 2, 3], [0, 1, 2])
    assert same(load_file(tmp_path / "adapter_model.safetensors"), made.state)


# ------------------------------------------------------------------------------------------ on disk
@pytest.mark.parametrize("method, rounds", [*((method, 3) for method in METHODS), ("fedex-lora", 19)])
def test_a_restart_goes_on_with_the_same_bits(tmp_path, method, rounds):
    """19 rounds: more base updates than are kept one by one."""
    made = server(method, initial(head=True), validation={**WIDE, "strikes": 2}, seed=3)

    def go_on(some):
        uploads = [trained(some, k) for k in range(3)]
        uploads[1] = uploads[1] if some.round else {**uploads[1], "base_model.model.other.weight": torch.ones(1)}
        some.step(uploads, [120, 40, 80], [0, 1, 2])

    for _ in range(rounds):
        go_on(made)
    assert len(made._log.entries) <= 16 and bool(made._log.prefix) == (rounds > 16)
    made.save(tmp_path / "server.safetensors")
    loaded = Server.load(tmp_path / "server.safetensors")
    for number in range(3):
        assert loaded.round == made.round == rounds + number
        assert same(loaded.state, made.state) and loaded.errors == made.errors and loaded.quarantine == made.quarantine
        assert loaded.last_base_updates.keys() == made.last_base_updates.keys()
        for now, there in (
            (loaded.base_updates, made.base_updates),
            (loaded.last_base_updates, made.last_base_updates),
        ):
            assert all(torch.equal(x, y) for part, f in there.items() for x, y in zip(f, now[part]))
        assert loaded._guard.conduct == made._guard.conduct and made._guard.conduct["strikes"] == {"1": 1}
        go_on(made)
        go_on(loaded)


def test_settings_and_numpy_are_restored(tmp_path):
    state = {key: x.numpy() for key, x in initial().items()}
    made = Server(
        "svd", state, lora_alpha=4, use_rslora=True, alpha_pattern={"h.1.q": 6}, method_options={"gauge": "rotation"},
        seed=5, validation={"strikes": 1}, robust={"name": "krum", "attackers": 0.2}, min_clients=3, measure=False,
    )  # fmt: skip
    made.save(tmp_path / "s")
    loaded = Server.load(tmp_path / "s")
    assert loaded.recipe == made.recipe and loaded._guard.limits == made._guard.limits
    assert (
        loaded._guard.rule == made._guard.rule
        and loaded._guard.seed == 5
        and (loaded.min_clients, loaded.measure) == (3, False)
    )
    assert {type(x) for x in loaded.state.values()} == {np.ndarray} and same(loaded.state, state)


def test_files_that_are_no_server(tmp_path):
    made = server("fedit")
    path = tmp_path / "s"
    made.save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is no saved server: it was cut off or edited"):
        Server.load(path)
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(ValueError, match="is no saved server"):
        Server.load(path)
    path.write_bytes(encode_state({"state": {"x": torch.ones(1)}}, {"form": 1}))
    with pytest.raises(ValueError, match="is no saved server"):
        Server.load(path)
    made.save(path)
    tree, about = decode_state(path.read_bytes())
    path.write_bytes(encode_state(tree, {**about, "round": 7}))
    with pytest.raises(ValueError, match="is no saved server"):
        Server.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        Server.load(tmp_path / "none")
    assert json.dumps(about)


def test_it_is_public():
    assert fedlora.Server is Server and fedlora.RoundError is RoundError
