"""The sum is the plain weighted mean of those who sent their vectors, whoever drops out when."""

from types import GeneratorType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.security.secure_aggregation import (
    PHASES,
    ProtocolError,
    SecureClient,
    SecureServer,
    SessionTerms,
    TooFewClientsError,
    default_threshold,
    masks,
    simulate,
)
from tests.fixtures.secure_aggregation import Round

SIZE = 257


def drawn(K, seed, size=SIZE, largest=16.0):
    g = torch.Generator().manual_seed(1000 * K + seed)
    weights = torch.rand(K, generator=g).double() + 0.05
    numbers = (torch.randperm(5 * K, generator=g)[:K]).tolist()
    values = {n: largest * (2 * torch.rand(size, generator=g) - 1) for n in numbers}
    return values, dict(zip(numbers, (weights / weights.sum()).tolist()))


def plain(values, weights, numbers):
    """The weighted mean in numpy's long doubles, from the values alone."""
    w = np.array([weights[n] for n in numbers], np.longdouble)
    x = np.stack([values[n].numpy().astype(np.longdouble) for n in numbers])
    return (w[:, None] * x).sum(0) / w.sum()


def check(values, weights, dropouts, found):
    gone = {n for phase in PHASES[:3] for n in dropouts.get(phase, ())}
    alive = sorted(weights.keys() - gone)
    assert found.numbers == tuple(alive)
    assert found.weight == pytest.approx(sum(weights[n] for n in alive))
    error = np.abs(found.mean.numpy().astype(np.longdouble) - plain(values, weights, alive)).max()
    assert error <= found.bound < 1e-5
    assert found.mean.dtype == torch.float32


# Every phase with a few clients, and every number of clients with dropouts in all phases.
THIRDS = [(K, "all") for K in (3, 4, 12, 25)] + [(7, phase) for phase in (None, *PHASES, "all")]
MANY = [pytest.param(50, phase, marks=pytest.mark.slow) for phase in (None, *PHASES, "all")]


@pytest.mark.parametrize(("K", "phase"), THIRDS + MANY)
def test_a_third_drops_out(K, phase):
    values, weights = drawn(K, 0)
    gone = list(weights)[: K // 3]
    dropouts = {} if phase is None else {phase: gone}
    if phase == "all":
        dropouts = {name: gone[i::4] for i, name in enumerate(PHASES)}
    check(values, weights, dropouts, simulate(values, weights, dropouts, threshold=K - K // 3))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_whoever_drops_out_whenever(seed):
    rng = np.random.default_rng(seed)
    K = int(rng.integers(3, 10))
    values, weights = drawn(K, seed, size=int(rng.integers(1, 40)), largest=float(10.0 ** rng.integers(-5, 1)))
    threshold = int(rng.integers(K // 2 + 1, K + 1))
    gone = rng.permutation(list(weights))[: K - threshold].tolist()
    at = rng.integers(0, 4, len(gone))
    dropouts = {phase: [n for n, i in zip(gone, at) if PHASES[i] == phase] for phase in PHASES}
    check(values, weights, dropouts, simulate(values, weights, dropouts, threshold))


@pytest.mark.parametrize("phase", PHASES)
def test_below_the_threshold_there_is_no_sum(phase):
    values, weights = drawn(7, 0)
    gone = list(weights)[:3]
    with pytest.raises(TooFewClientsError, match=f"4 of 7 clients sent their '{phase}' message; the session needs 5"):
        simulate(values, weights, {phase: gone})


def test_the_threshold_that_goes_without_saying():
    assert [default_threshold(K) for K in (3, 4, 7, 12, 25, 50)] == [3, 3, 5, 9, 17, 34]
    assert SecureServer.open(dict.fromkeys(range(12), 1 / 12), 5).session.threshold == 9


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weights": {0: 0.5, 1: 0.5}}, "needs 3 or more"),
        ({"threshold": 2}, "The threshold is 2 of 4"),
        ({"threshold": 5}, "The threshold is 5 of 4"),
        ({"weights": {0: 0.5, 1: 0.5, 2: 0.5}}, "sum to 1.5"),
        ({"weights": {0: 0.5, 1: 0.5, 2: 0.0}}, "positive share"),
        ({"weights": {0: 0.5, 1: 1.0, 2: -0.5}}, "positive share"),
        ({"weights": {0: 0.5, 1: float("nan"), 2: 0.5}}, "positive share"),
        ({"weights": {0: 0.5, 1: 0.25, -1: 0.25}}, "count from 0"),
        ({"size": 0}, "0 numbers"),
        ({"range": float("nan")}, "The range is"),
    ],
)
def test_terms_that_do_not_fit(change, text):
    terms = {"weights": dict.fromkeys(range(4), 0.25), "size": 3, **change}
    with pytest.raises(ValueError, match=text):
        SecureServer.open(**terms)


def test_shapes_are_flattened_and_a_large_vector_spans_chunks():
    values = {n: torch.randn(3, 50_001, generator=torch.Generator().manual_seed(n)) for n in range(3)}
    found = simulate(values, dict.fromkeys(range(3), 1 / 3))
    exact = sum(x.double() for x in values.values()).flatten() / 3
    assert (found.mean.double() - exact).abs().max() <= found.bound


def test_another_phase_to_drop_out_at():
    with pytest.raises(ValueError, match="no phase 'training'"):
        simulate(*drawn(3, 0), {"training": [0]})


@pytest.mark.parametrize("phase", [*PHASES, "done"])
def test_every_party_survives_being_saved(phase):
    """The parties' states before and after any phase; the round goes on from the bytes to the same sum."""
    round = Round(5, threshold=3)
    for name in PHASES:
        if name == phase:
            saved(round)
        round.step(silent=[4] if name == "mask" else [])
    saved(round)
    torch.testing.assert_close(round.server.outcome().mean, torch.full((8,), 0.15))


def saved(round):
    for n, client in round.clients.items():
        round.clients[n] = SecureClient.from_bytes(client.to_bytes())
        assert round.clients[n] == client
    server = SecureServer.from_bytes(round.server.to_bytes())
    assert server.to_bytes() == round.server.to_bytes()
    round.server = server


def test_what_is_saved_is_plain():
    round = Round().until("unmask")
    assert SessionTerms.of(round.server.session.record()).id == round.id
    for message in round.sent["share"].values():
        assert {type(x) for x in message.record().values()} <= {str, int, bytes}
    with pytest.raises(ValueError, match="another kind"):
        SecureServer.from_bytes(round.clients[0].to_bytes())
    with pytest.raises(ValueError, match="no saved client"):
        SecureClient.from_bytes(b"\x80\x04pickle")


def test_a_client_that_has_answered_keeps_no_secret():
    round = Round().until("unmask")
    secrets = [round.clients[0].seed, round.clients[0].masking.private, *round.clients[0].held.values()]
    round.step()
    state = round.clients[0].to_bytes()
    assert not any(secret.hex().encode() in state for secret in secrets)


def test_there_is_no_sum_before_the_end():
    round = Round().until("unmask")
    with pytest.raises(ProtocolError, match="still masked"):
        round.server.outcome()
    round.step()
    with pytest.raises(ProtocolError, match="closed already"):
        round.server.close()


def wrong_sign(pairwise):
    return lambda *given: (pairwise(*given)[0], 1)


def other_session(pairwise):
    return lambda session, number, *rest: pairwise(bytes([number]) + session[1:], number, *rest)


@pytest.mark.parametrize("bug", [wrong_sign, other_session])
def test_the_sum_would_show_masks_that_do_not_cancel(bug, monkeypatch):
    monkeypatch.setattr(masks, "pairwise", bug(masks.pairwise))
    values, weights = drawn(4, 0)
    with pytest.raises(AssertionError):
        check(values, weights, {}, simulate(values, weights))


def test_the_sum_would_show_masks_of_the_dropped_left_in(monkeypatch):
    opposite = masks.opposite  # the server gives it a generator for each client that dropped out
    monkeypatch.setattr(masks, "opposite", lambda m: () if isinstance(m, GeneratorType) else opposite(m))
    values, weights = drawn(4, 0)
    gone = {"mask": list(weights)[:1]}
    with pytest.raises(AssertionError):
        check(values, weights, gone, simulate(values, weights, gone))
