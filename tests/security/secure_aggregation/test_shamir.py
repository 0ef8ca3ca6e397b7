"""Shamir's scheme: t shares give the secret, t - 1 give nothing."""

import itertools
import os
from collections import Counter

import pytest

from fedlora.security.secure_aggregation.session import ProtocolError
from fedlora.security.secure_aggregation.shamir import PRIME, combine, evaluate, lagrange_at_zero, split


def test_the_prime_is_one():
    """Miller and Rabin, with 40 bases."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        x = pow(base, odd, PRIME)
        powers = [x := x * x % PRIME if i else x for i in range(twos)]
        assert powers[0] == 1 or PRIME - 1 in powers


@pytest.mark.parametrize(("n", "t"), [(3, 2), (3, 3), (7, 5), (50, 34)])
def test_any_t_shares_give_the_secret(n, t):
    for secret in (os.urandom(32), bytes(32), b"\xff" * 32):
        shares = split(secret, range(n), t)
        for first in range(n - t + 1):
            chosen = {i: shares[i] for i in range(first, first + t)}
            assert combine(chosen, t) == secret


def test_every_subset_of_a_small_one():
    shares = split(b"s" * 32, [4, 0, 2**61, 7, 12], 3)
    for chosen in itertools.combinations(shares, 3):
        assert combine({n: shares[n] for n in chosen}, 3) == b"s" * 32


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5])
def test_another_count_is_refused(count):
    shares = split(os.urandom(32), range(5), 3)
    with pytest.raises(ProtocolError, match="exactly 3"):
        combine(dict(list(shares.items())[:count]), 3)


@pytest.mark.parametrize(("t", "prime"), [(2, 7), (3, 5)])
def test_fewer_shares_leave_every_secret_equally_possible(t, prime):
    """Counted over all polynomials of a small field: what t - 1 holders see is the same for every secret."""
    views = {}
    for secret in range(prime):
        for rest in itertools.product(range(prime), repeat=t - 1):
            seen = tuple(evaluate([secret, *rest], x, prime) for x in range(1, t))
            views.setdefault(secret, Counter())[seen] += 1
    assert all(view == views[0] for view in views.values())
    assert set(views[0].values()) == {1} and len(views[0]) == prime ** (t - 1)


def test_the_count_would_notice_one_share_more():
    seen = {s: {tuple(evaluate([s, a], x, 7) for x in (1, 2)) for a in range(7)} for s in range(7)}
    assert not seen[0] & seen[1]


def test_lagrange_on_a_small_field():
    weights = lagrange_at_zero((1, 3, 4), 7)
    assert sum(w * evaluate([5, 2, 6], x, 7) for w, x in zip(weights, (1, 3, 4))) % 7 == 5


def test_shares_differ_from_call_to_call():
    assert split(bytes(32), range(3), 2) != split(bytes(32), range(3), 2)


def test_shares_of_two_secrets_do_not_pass_for_one():
    one, two = split(os.urandom(32), range(3), 2), split(os.urandom(32), range(3), 2)
    try:
        found = combine({0: one[0], 1: two[1]}, 2)
    except ProtocolError:
        return
    assert found not in (combine({0: one[0], 1: one[1]}, 2), combine({0: two[0], 1: two[1]}, 2))


@pytest.mark.parametrize(
    ("secret", "numbers", "t"), [(b"short", [0, 1], 2), (bytes(32), [0, 0], 2), (bytes(32), [0], 2)]
)
def test_what_cannot_be_shared(secret, numbers, t):
    with pytest.raises(ValueError, match="holders"):
        split(secret, numbers, t)
