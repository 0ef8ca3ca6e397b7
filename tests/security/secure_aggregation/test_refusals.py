"""Replayed, altered and cut messages, steps out of order, and requests that would bare a client are refused."""

import dataclasses

import pytest
import torch

from fedlora.security.secure_aggregation import (
    PHASES,
    Message,
    ProtocolError,
    SecureClient,
    SecureServer,
    TooFewClientsError,
)
from fedlora.security.secure_aggregation.keys import Address, KeyPair, seal, unseal
from fedlora.security.secure_aggregation.messages import REPLIES, pack_table, unpack_table
from fedlora.security.secure_aggregation.session import KEY, SERVER
from fedlora.security.secure_aggregation.shamir import SHARE
from tests.fixtures.secure_aggregation import Round

replace = dataclasses.replace


def altered(message, at, mask=1):
    body = bytearray(message.body)
    body[at] ^= mask
    return replace(message, body=bytes(body))


def regions(body):
    """Every byte of a short message; of a long one both ends and every 97th between."""
    return range(len(body)) if len(body) < 200 else [*range(80), *range(80, len(body), 97), *range(-20, 0)]


def refuses(receive, message, text=None):
    with pytest.raises(ProtocolError, match=text):
        receive(message)


def takes(round, phase, n=0):
    """How client ``n`` takes in the server's message before ``phase``."""
    return lambda message: round.make(n, message)


def forged(round, n, phase, payload):
    """What the server itself could send client ``n``."""
    name = REPLIES[phase]
    public = round.clients[n].sealing.public
    return Message(name, SERVER, n, seal(payload, round.server.key, public, Address(round.id, name, SERVER, n)))


def told(round, phase, n=0):
    """What the server's message to client ``n`` says."""
    address = Address(round.id, REPLIES[phase], SERVER, n)
    public = round.server.session.server_key
    return unseal(round.told[phase][n].body, round.clients[n].sealing, public, address)


@pytest.mark.parametrize("phase", PHASES)
def test_an_altered_byte_anywhere_is_noticed(phase):
    round = Round().until(phase)
    message, before = round.make(0), round.server.to_bytes()
    for at in regions(message.body):
        for mask in (1, 0x80):
            refuses(round.server.receive, altered(message, at, mask))
    assert round.server.to_bytes() == before
    round.server.receive(message)


@pytest.mark.parametrize("phase", PHASES)
def test_a_cut_or_longer_message_is_noticed(phase):
    round = Round().until(phase)
    message = round.make(0)
    for size in {*range(0, len(message.body), 1 + len(message.body) // 100), len(message.body) - 1}:
        refuses(round.server.receive, replace(message, body=message.body[:size]))
    refuses(round.server.receive, replace(message, body=message.body + b"\0"))
    round.server.receive(message)


@pytest.mark.parametrize("phase", PHASES[1:])
def test_the_servers_messages_are_checked_as_well(phase):
    round = Round().until(phase)
    message, before = round.told[phase][0], round.clients[0].to_bytes()
    for at in regions(message.body):
        refuses(takes(round, phase), altered(message, at), "does not open")
    for size in (0, 11, 12, 27, 28, len(message.body) - 1):
        refuses(takes(round, phase), replace(message, body=message.body[:size]), "does not open")
    for changed in ({"sender": 1}, {"receiver": 1}, {"phase": "mask"}):
        refuses(takes(round, phase), replace(message, **changed), "it waits for")
    refuses(takes(round, phase), replace(round.told[phase][1], receiver=0), "does not open")
    assert round.clients[0].to_bytes() == before
    assert round.make(0)


@pytest.mark.parametrize("phase", PHASES)
def test_a_second_message_of_a_phase_is_not_counted(phase):
    round = Round().until(phase)
    message = round.make(0)
    round.server.receive(message)
    before = round.server.to_bytes()
    refuses(round.server.receive, message, "already; the second was left out")
    assert round.server.to_bytes() == before


@pytest.mark.parametrize("phase", PHASES)
def test_another_senders_message_is_not_counted(phase):
    round = Round().until(phase)
    refuses(round.server.receive, replace(round.make(1), sender=0), "does not open")
    refuses(round.server.receive, replace(round.make(2), sender=77), "not, or no longer, part")
    refuses(round.server.receive, replace(round.make(3), receiver=0), "sent client 0")


@pytest.mark.parametrize("phase", PHASES)
def test_another_rounds_message_is_not_counted(phase):
    """Neither between rounds, nor between two sessions of the very same terms."""
    for terms in ({}, {"round": 1}, {"run": "other"}):
        old, new = Round().until(phase), Round(**terms).until(phase)
        refuses(new.server.receive, old.make(0), "does not open")


@pytest.mark.parametrize("phase", PHASES)
def test_a_rounds_message_is_bound_to_the_session_even_with_the_same_keys(phase):
    """With all keys of a round carried over, the session's id alone refuses the old message."""
    old = Round().until(phase)
    new_terms = replace(old.server.session, round=1)
    assert new_terms.id != old.id
    server = SecureServer.from_bytes(old.server.to_bytes())
    server.session = new_terms
    message = old.make(0)
    refuses(server.receive, message, "does not open")
    old.server.receive(message)


@pytest.mark.parametrize("later", PHASES[1:])
@pytest.mark.parametrize("earlier", PHASES)
def test_another_phases_message_is_not_counted(earlier, later):
    if PHASES.index(earlier) >= PHASES.index(later):
        return
    round = Round().until(later)
    refuses(round.server.receive, round.sent[earlier][0], "the server is at")
    refuses(round.server.receive, replace(round.sent[earlier][0], phase=later), "does not open")


def test_one_peers_shares_do_not_pass_for_anothers():
    round = Round().until("mask")
    table = dict(unpack_table(told(round, "mask"), 2 * SHARE + 28))
    reflected = dict(unpack_table(told(round, "mask", 1), 2 * SHARE + 28))[0]  # client 0's own, made for client 1
    for wrong in ({**table, 1: table[2]}, {**table, 1: bytes(len(table[1]))}, {**table, 1: reflected}):
        refuses(takes(round, "mask"), forged(round, 0, "mask", pack_table(wrong)), "from client 1 to client 0 does not")


def test_each_step_is_taken_once_and_in_order():
    round = Round()
    for phase in PHASES:
        for other in PHASES:
            if other != phase:
                given = [] if other == "advertise" else [Message(REPLIES[other], SERVER, 0, b"")]
                given += [torch.zeros(8)] if other == "mask" else []
                with pytest.raises(ProtocolError, match=f"'{phase}' is its next step"):
                    getattr(round.clients[0], other)(*given)
        round.step()
    request = round.told["unmask"][0]
    refuses(round.clients[0].unmask, request, "'done' is its next step")
    refuses(SecureClient.from_bytes(round.clients[0].to_bytes()).unmask, request, "'done' is its next step")


def peers(round):
    return dict(unpack_table(told(round, "share"), 2 * KEY))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t | {0: t[0][:KEY] + KeyPair.new().public}, "other keys for client 0"),
        (lambda t: t | {0: KeyPair.new().public + t[0][KEY:]}, "other keys for client 0"),
        (lambda t: {n: keys for n, keys in t.items() if n}, "other keys for client 0"),
        (lambda t: t | {2: t[1]}, "one public key twice"),
        (lambda t: t | {2: t[0]}, "one public key twice"),
        (lambda t: t | {2: t[2][:KEY] + t[1][KEY:]}, "one public key twice"),
        (lambda t: t | {2: t[2][:KEY] * 2}, "one public key twice"),
        (lambda t: [*t.items(), (2, t[2])], "names a client twice"),
        (lambda t: t | {9: bytes(64)}, "client 9, which is not of the cohort"),
        (lambda t: t | {2: bytes(64)}, "one public key twice"),
        (lambda t: t | {2: bytes(32) + t[2][KEY:]}, "no X25519 key"),
    ],
)
def test_a_wrong_list_of_peers(change, text):
    round = Round(5).until("share")
    refuses(takes(round, "share"), forged(round, 0, "share", pack_table(change(peers(round)))), text)
    refuses(takes(round, "share"), forged(round, 0, "share", pack_table(peers(round))[:-1]), "not made of entries")
    assert round.make(0), "and goes on with the right one"


def test_a_client_takes_part_with_enough_others_only():
    round = Round(7).until("share")
    few = {n: keys for n, keys in peers(round).items() if n < 4}
    with pytest.raises(TooFewClientsError, match="4 clients that advertised keys"):
        round.make(0, forged(round, 0, "share", pack_table(few)))
    round.step()
    table = dict(unpack_table(told(round, "mask"), 2 * SHARE + 28))
    with pytest.raises(TooFewClientsError, match="3 clients that shared"):
        round.make(0, forged(round, 0, "mask", pack_table({n: table[n] for n in (1, 2)})))


@pytest.mark.parametrize("extra", [0, 9])
def test_an_inbox_with_strangers(extra):
    round = Round().until("mask")
    table = dict(unpack_table(told(round, "mask"), 2 * SHARE + 28))
    refuses(takes(round, "mask"), forged(round, 0, "mask", pack_table(table | {extra: table[1]})), f"client {extra}")


KEPT, GONE = b"\1", b"\0"


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ([(n, KEPT) for n in range(5)] + [(3, GONE)], "self mask and for the key of client 3"),
        ([(3, GONE)] + [(n, KEPT) for n in range(5)], "self mask and for the key of client 3"),
        ([(0, KEPT), (0, GONE), *((n, KEPT) for n in range(1, 5))], "self mask and for the key of client 0"),
        ([(n, KEPT) for n in range(6)], "client 5, which shared none here"),
        ([(n, KEPT) for n in range(5)] + [(9, GONE)], "client 9, which shared none here"),
        ([(0, GONE), *((n, KEPT) for n in range(1, 5))], "client 0 sent its vector"),
        ([(n, KEPT) for n in range(1, 5)], "client 0 sent its vector"),
        ([(0, KEPT), (1, KEPT), (2, KEPT), (3, GONE), (4, GONE)], "3 clients that sent their vectors"),
        ([], "sent its vector"),
    ],
)
def test_requests_that_would_bare_a_client(request_, text):
    """Client 5 advertised and shared with nobody."""
    round = Round(6, threshold=4)
    round.step().step(silent=[5]).step()
    before = round.clients[0].to_bytes()
    refuses(takes(round, "unmask"), forged(round, 0, "unmask", pack_table(request_)), f"(?i){text}")
    assert round.clients[0].to_bytes() == before and round.make(0)


def test_values_that_a_client_does_not_send():
    round = Round().until("mask")
    for values, text in [
        (torch.zeros(7), "7 values were given; this session sums 8"),
        (torch.full((8,), float("nan")), "NaN"),
        (torch.full((8,), 17.0), "outside the range of 16"),
    ]:
        with pytest.raises(ValueError, match=text):
            round.clients[0].mask(round.told["mask"][0], values)
    assert round.make(0), "and may still send others"


def test_a_stranger_cannot_join():
    with pytest.raises(ValueError, match="Client 9 is not in this session's cohort"):
        SecureClient(Round().server.session, 9)


def test_a_late_upload_is_not_counted():
    round = Round(threshold=3).until("mask")
    round.step(late=[3])
    refuses(round.server.receive, round.sent["mask"][3], "the server is at 'unmask'")
    round.step(silent=[3])
    assert round.server.outcome().numbers == (0, 1, 2)


def test_a_copied_key_is_refused_at_the_door():
    round = Round()
    round.server.receive(round.make(0))
    round.clients[1].masking = round.clients[0].masking
    refuses(round.server.receive, round.make(1), "a public key that is there already")


def from_client(round, n, phase, payload):
    own = round.clients[n].sealing
    body = seal(payload, own, round.server.key.public, Address(round.id, phase, n, SERVER))
    return Message(phase, n, SERVER, body)


@pytest.mark.parametrize(("phase", "payload"), [("share", bytes(32)), ("mask", bytes(28)), ("unmask", b"")])
def test_well_sealed_nonsense_is_left_out(phase, payload):
    round = Round().until(phase)
    refuses(round.server.receive, from_client(round, 0, phase, payload), "(?i)client 0")


@pytest.mark.parametrize("gone", [[], [3]])
def test_a_wrong_share_does_not_become_a_wrong_sum(gone):
    round = Round(threshold=3).until("mask")
    round.step(silent=gone)
    client = round.clients[1]
    client.held = (
        {n: bytes(reversed(both)) for n, both in client.held.items()}
        if not gone
        else client.held | {3: bytes(2 * SHARE)}
    )
    round.send()
    refuses(lambda _: round.server.close(), None, "secret")
    refuses(lambda _: round.server.outcome(), None, "still masked")


def without_phase(self):
    return replace(self, phase="").session + bytes([self.sender % 256, self.receiver % 256])


def without_sender(self):
    return self.session + self.phase.encode()


@pytest.mark.parametrize(
    ("bug", "check"),
    [
        (without_phase, lambda: test_another_phases_message_is_not_counted("mask", "unmask")),
        (without_sender, test_one_peers_shares_do_not_pass_for_anothers),
        (lambda self: b"", lambda: test_a_rounds_message_is_bound_to_the_session_even_with_the_same_keys("mask")),
    ],
)
def test_the_tests_would_notice_an_address_left_out(bug, check, monkeypatch):
    monkeypatch.setattr(Address, "context", bug)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check()
