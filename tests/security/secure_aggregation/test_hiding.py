"""What the server sees of one client is uniform modulo 2^32, whatever the client's values are.

Evidence against uniformity is the smallest p-value of three tests (bytes by chi-square, numbers by Kolmogorov-Smirnov,
each of the 32 bits); a hidden vector keeps it above 1e-9, and one that is not must fall below 1e-12.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from fedlora.security.secure_aggregation import SecureClient, masks
from fedlora.security.secure_aggregation.keys import Address, unseal
from fedlora.security.secure_aggregation.messages import unpack_table
from fedlora.security.secure_aggregation.session import KEY, SERVER
from fedlora.security.secure_aggregation.shamir import SHARE, combine
from tests.fixtures.secure_aggregation import Round

SIZE = 20_000
VALUES = {
    "zeros": torch.zeros(SIZE),
    "constant": torch.full((SIZE,), 3.25),
    "normal": torch.randn(SIZE, generator=torch.Generator().manual_seed(0)),
    "everywhere": 32 * torch.rand(SIZE, generator=torch.Generator().manual_seed(1)) - 16,
}


def evidence(vector):
    counts = np.bincount(np.ascontiguousarray(vector).view(np.uint8), minlength=256)
    ones = np.unpackbits(np.ascontiguousarray(vector)[:, None].view(np.uint8), axis=1).sum(0)
    bits = 2 * stats.norm.sf(np.abs(ones - len(vector) / 2) / np.sqrt(len(vector) / 4))
    apart = stats.kstest(vector / 2.0**32, "uniform").pvalue
    return min(stats.chisquare(counts).pvalue, apart, bits.min())


def hidden(vector):
    return evidence(vector) > 1e-9


def bared(vector):
    return evidence(vector) < 1e-12


def started(x, K=4, **terms):
    return Round(K, SIZE, values=dict.fromkeys(range(K), x), **terms)


def seen(round, n):
    """What the server reads in client ``n``'s upload."""
    address = Address(round.id, "mask", n, SERVER)
    payload = unseal(round.sent["mask"][n].body, round.server.key, round.server.keys[n][:KEY], address)
    return np.frombuffer(payload, "<u4").copy()


def encoded(round, n):
    session = round.server.session
    return session.encoding.encode(round.values[n], session.weight(n))


def without(vector, found):
    masks.add(vector, masks.opposite(found))
    return vector


@pytest.mark.parametrize("kind", VALUES)
def test_an_upload_is_uniform(kind):
    round = started(VALUES[kind]).until("unmask")
    uploads = [seen(round, n) for n in range(4)]
    assert all(hidden(y) for y in uploads)
    assert hidden(uploads[0] - uploads[1]), "two clients of the same values"
    assert bared(encoded(round, 0)), "the tests would see it unmasked"


@pytest.mark.parametrize("kind", VALUES)
def test_the_same_values_in_two_sessions_have_nothing_in_common(kind):
    first, second = (started(VALUES[kind]).until("unmask") for _ in range(2))
    one, two = seen(first, 0), seen(second, 0)
    assert hidden(one - two) and hidden(one + two)
    assert abs(np.corrcoef(one, two)[0, 1]) < 7 / np.sqrt(SIZE)
    again = one.copy()
    assert bared(one - again), "a mask used twice would show"


@pytest.mark.parametrize("kind", VALUES)
def test_a_late_upload_stays_hidden(kind):
    """Client 3's upload comes after the others have given away its key: its self mask still covers it."""
    round = started(VALUES[kind], threshold=3).until("mask")
    seed = round.clients[3].seed
    round.step(late=[3])
    late, own = seen(round, 3), round.clients.pop(3).masking
    round.send()
    table = {n: dict(answers(round, n)) for n in range(3)}
    recovered = combine({n: shares[3] for n, shares in table.items()}, 3)
    assert recovered == own.private
    pairwise = [masks.pairwise(round.id, 3, own, n, round.server.keys[n][KEY:]) for n in range(3)]
    left = without(late, pairwise)
    assert hidden(left)
    bare = without(left, [masks.own(round.id, 3, seed)])
    assert np.array_equal(bare, encoded(round, 3)) and bared(bare), "and nothing else did"


def answers(round, n):
    return unpack_table(round.server.received[n], SHARE)


@pytest.mark.parametrize("kind", VALUES)
def test_all_but_one_other_client_with_the_server_see_nothing(kind):
    """Clients 2, 3 and 4 lay their keys open and client 0's self mask is known: client 1's mask covers it."""
    round = started(VALUES[kind], K=5, threshold=5).until("unmask")
    zero = round.clients[0]
    known = [masks.own(round.id, 0, zero.seed)]
    known += [masks.pairwise(round.id, 0, zero.masking, n, round.server.keys[n][KEY:]) for n in (2, 3, 4)]
    left = without(seen(round, 0), known)
    assert hidden(left)
    last = masks.pairwise(round.id, 0, zero.masking, 1, round.server.keys[1][KEY:])
    assert bared(without(left, [last]))


def test_a_client_that_forgot_its_self_mask_would_show(monkeypatch):
    monkeypatch.setattr(masks, "own", lambda *_: (bytes(32), 1))
    round = started(VALUES["normal"], threshold=3).until("mask")
    round.step(late=[3])
    pairwise = [masks.pairwise(round.id, 3, round.clients[3].masking, n, round.server.keys[n][KEY:]) for n in range(3)]
    assert bared(without(seen(round, 3), [*pairwise, (bytes(32), 1)]))


def test_a_client_that_forgot_all_masks_would_show(monkeypatch):
    monkeypatch.setattr(masks, "add", lambda *_: None)
    round = started(VALUES["normal"]).until("mask")
    round.send()
    assert bared(seen(round, 0))


def test_what_the_server_is_told_does_not_hold_a_secret():
    """Seeds and keys go nowhere in the clear, and one client's sealed shares open for nobody else."""
    round = Round(4).until("unmask")
    told = b"".join(m.body for sent in round.sent.values() for m in sent.values())
    for client in round.clients.values():
        assert client.seed not in told and client.masking.private not in told and client.sealing.private not in told


def test_colluders_below_the_threshold_hold_too_few_shares():
    round = Round(5, threshold=3).until("unmask")
    held = {n: round.clients[n].held[0][:SHARE] for n in (1, 2)}
    other = {**held, 3: bytes(SHARE)}
    assert combine(other, 3) != round.clients[0].seed
    assert combine({**held, 3: round.clients[3].held[0][:SHARE]}, 3) == round.clients[0].seed


def test_clients_do_not_share_secrets_across_sessions():
    one, two = Round().clients[0], Round().clients[0]
    assert isinstance(one, SecureClient)
    assert len({one.seed, two.seed, one.masking.private, two.masking.private, one.sealing.private}) == 5
