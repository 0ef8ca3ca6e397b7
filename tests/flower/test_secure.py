"""Secure aggregation over Flower's messages: the mean of the plain run, and no upload that could be read."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("flwr", reason="needs the flower extra")

from fedlora.flower.node_registry import TooFewError
from fedlora.flower.wire import from_vector, to_vector, vector_size
from fedlora.methods import METHODS
from fedlora.rounds import shares
from fedlora.security.secure_aggregation import PHASES, ProtocolError
from tests.fixtures.federation import REFERENCE
from tests.fixtures.flower import HIDDEN, QUICK, TRAIN_ONLY, World, config, overrides

SUMS = [name for name in METHODS.names() if METHODS.load(name).sums]
SHORT = ("training.local_steps=1", TRAIN_ONLY)


def close(a, b, bound):
    return all((x - b[p][leaf]).abs().max() <= bound for p in a for leaf, x in a[p].items())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(f"grid of {n}")) for n in SUMS])
def test_a_round_is_the_plain_round_within_the_stated_error(name, tmp_path, grid):
    world = World(tmp_path, *overrides(name), *REFERENCE, network=HIDDEN)
    a, b = grid(name).rounds[0], next(world.server.run(world.federation))
    assert a.record["loss"] == b.record["loss"]
    assert close(a.shared, b.shared, 3 * 2**-26 + 16 * 2**-23), "K 2^-(f+1) over the whole weight, and float32"
    assert "weights" not in b.record
    assert not list(tmp_path.rglob("*.secret")), "the keys are gone when the round is over"


@pytest.mark.parametrize("score", ["random", "weight", "gradient"])
def test_clients_that_train_different_heads_are_averaged_head_by_head(score, tmp_path):
    settings = [*overrides("ravan"), f"method.score={score}", "clients.ranks=1", "rounds=1", "clients.count=4", *SHORT]
    plain, masked = World(tmp_path / "plain", *settings), World(tmp_path / "mask", *settings, network=HIDDEN)
    a, b = plain.run(), masked.run()
    assert close(a[0].shared, b[0].shared, 1e-5)
    names = {leaf for layer in a[0].shared.values() for leaf in layer if leaf.startswith("H")}
    assert names == {"H0", "H1"}


def seen_by_the_server(messages):
    return [m for m in messages if m.metadata.src_node_id >= 10 and m.has_content()]


def test_nothing_that_a_client_sends_can_be_read(tmp_path):
    messages = []

    def post(message):
        messages.append(message)
        return message

    world = World(tmp_path, "rounds=1", "clients.count=4", network=HIDDEN, post=post)
    uploads = {}
    train = type(world.node(type("C", (), {"node_config": {"client": 0}}), "x")).train

    def spied(self, *rest):
        answer = train(self, *rest)
        uploads[self.client] = answer.sent
        return answer

    import fedlora.flower.client as node

    original, node.Node.train = node.Node.train, spied
    try:
        world.run()
    finally:
        node.Node.train = original
    sent = seen_by_the_server(messages)
    assert all("leaves" not in m.content for m in sent)
    bodies = [
        m.content["response"]["body"]
        for m in sent
        if "response" in m.content and m.content["response"]["phase"] == "mask"
    ]
    assert len(bodies) == 4
    for tree in uploads.values():
        for layer in tree.values():
            for x in layer.values():
                assert all(x.numpy().tobytes() not in body for body in bodies)
    big = torch.frombuffer(bytearray(b"".join(bodies)), dtype=torch.uint8)
    counts = torch.bincount(big.long(), minlength=256).double()
    expected = len(big) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * (2 * 255) ** 0.5, "bytes as good as random"


@pytest.mark.parametrize("phase", ["advertise", "share", "mask", "unmask"])
def test_a_client_that_drops_out_at_any_step_is_named_and_the_others_are_averaged(phase, tmp_path):
    def post(message):
        gone = message.metadata.src_node_id == 12 and message.has_content() and "response" in message.content
        return None if gone and message.content["response"]["phase"] == phase else message

    network = replace(HIDDEN, round_timeout=0.05, secure_threshold=3)
    settings = ["rounds=1", "clients.count=5", "clients.partition={name='iid'}", *SHORT]
    masked = World(tmp_path / "mask", *settings, network=network, post=post)
    plain = World(tmp_path / "plain", *settings, network=replace(QUICK, join_timeout=0.02))
    if phase != "unmask":
        plain.grid.leave(12)
    [a], [b] = plain.run(), masked.run()
    there = [0, 1, 2, 3, 4] if phase == "unmask" else [0, 1, 3, 4]
    assert b.record["cohort"] == there
    assert set(b.record.get("absent", {})) == {2}
    assert close(a.shared, b.shared, 1e-5)


def test_below_the_threshold_the_round_begins_again(tmp_path):
    lost = []

    def post(message):
        masked = (
            message.has_content() and "response" in message.content and message.content["response"]["phase"] == "mask"
        )
        if masked and message.metadata.src_node_id in (11, 12) and len(lost) < 2:
            lost.append(message)
            return None
        return message

    network = replace(HIDDEN, round_timeout=0.05)
    world = World(tmp_path / "a", "rounds=1", "clients.count=4", *SHORT, network=network, post=post)
    [done] = world.run()
    assert done.record["cohort"] == [0, 1, 2, 3]
    texts = [e.text for e in world.events if e.kind == "waiting"]
    assert len(texts) == 2 and "2 of 4 clients sent their 'mask' message" in texts[0]
    assert "2 of 4 clients can take part, and it needs 3" in texts[1]
    plain = World(tmp_path / "b", "rounds=1", "clients.count=4", *SHORT).run()[0]
    assert close(plain.shared, done.shared, 1e-5)


def test_a_replayed_and_an_altered_message_are_refused(tmp_path):
    kept = {}

    def post(message):
        if not (message.has_content() and "response" in message.content and message.metadata.src_node_id == 11):
            return message
        phase, said = message.content["response"]["phase"], message.content["response"]
        again = kept.get(phase)
        kept.setdefault(phase, dict(said))
        if again is not None and phase == "mask":  # round 2 gets round 1's vector
            for key, value in again.items():
                said[key] = value
        return message

    network = replace(HIDDEN, round_timeout=0.05, secure_threshold=3)
    world = World(tmp_path, "rounds=2", "clients.count=4", *SHORT, network=network, post=post)
    rounds = world.run()
    assert rounds[0].record["cohort"] == [0, 1, 2, 3]
    assert rounds[1].record["cohort"] == [0, 2, 3]
    assert "altered" in rounds[1].record["absent"][1] or "session" in rounds[1].record["absent"][1]


def test_the_vector_and_its_layout_come_back():
    layout = {"a.b/A": (2, 3), "a.b/B": (4,), "c/s": ()}
    sent = {"a.b": {"A": torch.randn(2, 3)}, "c": {"s": torch.tensor(2.0)}}
    x = to_vector(layout, sent)
    assert x.numel() == vector_size(layout) == 6 + 4 + 1 + 3
    back = from_vector(layout, x * 0.25, 0.25)
    assert back["a.b"].keys() == {"A"} and torch.allclose(back["a.b"]["A"], sent["a.b"]["A"])
    with pytest.raises(ValueError, match="not in the round's layout"):
        to_vector({"a.b/A": (2, 3)}, {"a.b": {"A": torch.ones(3, 2)}})


@pytest.mark.parametrize("name", [n for n in METHODS.names() if n not in SUMS])
def test_a_method_whose_server_must_see_factors_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match="server must see every client's factors; take one of .*fedit"):
        config(*overrides(name), "flower.secure_aggregation=true")


@pytest.mark.parametrize(
    "settings", [["clients.count=2"], ["flower.secure_threshold=1"], ["flower.secure_threshold=9"]]
)
def test_too_few_clients_or_a_wrong_threshold_are_said_at_once(settings):
    with pytest.raises(ValueError, match="needs 3 clients, and a threshold above half of them"):
        config("flower.secure_aggregation=true", *settings)


def test_every_method_that_claims_to_sum_combines_as_the_mean_does():
    from fedlora.methods._base import Method

    for name in SUMS:
        kind = METHODS.load(name)
        assert kind.combine is Method.combine and kind.combine_all is Method.combine_all, name
    assert shares(METHODS.load("ravan")(), [3, 1]) == [0.5, 0.5]


def test_a_party_that_hides_its_uploads_sends_none_in_the_clear(tmp_path):
    """A server whose configuration says otherwise, or that leaves the protocol out, gets nothing."""
    from fedlora.flower.server import FlowerLoop

    world = World(tmp_path, "rounds=1", "clients.count=4", network=HIDDEN)
    world.server = FlowerLoop(
        world.events.append, federation=world.federation, network=replace(QUICK, retry=100.0), grid=world.grid
    )
    world.server.at = world.server.begin(world.federation)
    world.server._begin_turns(world.server.at)
    world.server._ask([0, 1, 2, 3], set())
    assert not world.server.replies
    assert all("ValueError" in why for why in world.server.absent.values()) and len(world.server.absent) == 4


@pytest.mark.parametrize("terms", [{"secure_threshold": 3}, {"secure_range": 8.0}])
def test_a_party_holds_the_server_to_its_own_terms(terms, tmp_path):
    world = World(tmp_path, "rounds=1", "clients.count=5", "clients.partition={name='iid'}", *SHORT, network=HIDDEN)
    world.server.network = replace(HIDDEN, **terms)
    world.server.at = world.server.begin(world.federation)
    world.server._begin_turns(world.server.at)
    with pytest.raises(ValueError, match="0 of 5 clients sent their 'advertise' message"):
        world.server._run_session(world.federation, world.server.at, [0, 1, 2, 3, 4])


def test_fewer_than_the_threshold_are_waited_for(tmp_path):
    network = replace(HIDDEN, secure_threshold=4, join_timeout=0.02)
    world = World(tmp_path, "rounds=1", "clients.count=5", "clients.partition={name='iid'}", *SHORT, network=network)
    world.grid.leave(10)
    world.grid.leave(11)

    def watch(event):
        world.events.append(event)
        if event.kind == "waiting":
            world.grid.join(40, {"client": 0})

    world.server.watch = watch
    [done] = world.run()
    assert done.record["cohort"] == [0, 2, 3, 4]
    assert any("3 of at least 4 clients are connected" in e.text for e in world.events)


def test_a_second_sum_of_a_round_over_other_clients_is_refused_by_the_parties(tmp_path):
    """Two sums that differ by one client would show what it sent; the same sum again is harmless."""
    settings = ("rounds=1", "clients.count=5", "clients.partition={name='iid'}", *SHORT, "evaluation.every=1")
    world = World(tmp_path, *settings, network=replace(HIDDEN, secure_threshold=3))
    f, server = world.federation, world.server
    server.at = server.begin(f)
    server._begin_turns(server.at)
    server._run_session(f, server.at, [0, 1, 2, 3, 4])
    first = server.mean.tree
    server._run_session(f, server.at, [0, 1, 2, 3, 4])
    assert close(first, server.mean.tree, 1e-6)
    with pytest.raises(ValueError, match="0 of 4 clients sent their 'unmask' message"):
        server._run_session(f, server.at, [0, 1, 2, 4])


def test_fewer_clients_than_the_threshold_needs_are_said_to_be_void_at_the_start(tmp_path):
    world = World(tmp_path, "method.name=fedit", network=HIDDEN)
    world.run()
    (note,) = [event for event in world.events if event.kind == "note"]
    assert note.round == 0 and "flower.min_clients is 2" in note.text and "needs 3 clients" in note.text


def silent(phase, *clients):
    """A postman who loses what these clients say in a phase, always."""

    def post(message):
        said = message.has_content() and "response" in message.content and message.content["response"]["phase"] == phase
        return None if said and message.metadata.src_node_id - 10 in clients else message

    return post


@pytest.mark.parametrize("phase", PHASES)
def test_a_round_that_cannot_be_summed_ends_instead_of_beginning_anew_for_ever(phase, tmp_path):
    network = replace(HIDDEN, round_timeout=0.05, repair_timeout=0.3)
    world = World(tmp_path, "rounds=1", *SHORT, network=network, post=silent(phase, 2))
    with pytest.raises(
        TooFewError,
        match="2 of 3 clients can take part, and it needs 3; left out: client 2 .no answer within 0.05 seco",
    ):
        world.run()
    texts = [e.text for e in world.events if e.kind == "waiting"]
    assert len(texts) == len(set(texts)), "each thing is said once"


@pytest.mark.parametrize("phase", PHASES[:3])
def test_the_next_session_of_a_round_is_without_the_clients_that_failed(phase, tmp_path):
    """Two of five are silent, and four are needed to the end: the other three can have a session of their own."""
    network = replace(HIDDEN, round_timeout=0.05, repair_timeout=30.0)
    settings = ("rounds=1", "clients.count=5", "clients.partition={name='iid'}", *SHORT)
    [done] = World(tmp_path / "a", *settings, network=network, post=silent(phase, 1, 4)).run()
    assert done.record["cohort"] == [0, 2, 3]
    world = World(tmp_path / "b", *settings)
    world.grid.leave(11)
    world.grid.leave(14)
    world.server.network = replace(QUICK, join_timeout=0.02)
    assert close(world.run()[0].shared, done.shared, 1e-5)


def test_a_session_that_fails_without_a_culprit_ends_the_run_too(tmp_path, monkeypatch):
    def outcome(server):
        raise ProtocolError("The shares do not fit together.")

    monkeypatch.setattr("fedlora.security.secure_aggregation.SecureServer.outcome", outcome)
    network = replace(HIDDEN, repair_timeout=0.2)
    with pytest.raises(TooFewError, match="0 of 3 clients can take part, and it needs 3"):
        World(tmp_path, "rounds=1", *SHORT, network=network).run()
