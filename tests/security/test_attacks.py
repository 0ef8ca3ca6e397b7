"""Attacks: each does what it says, harms a plain mean or is stopped at the door, and a robust rule holds against it."""

import typing

import pytest
import torch
from benchmarks.attacks import remembering

import fedlora
from fedlora.adapters import LoRA
from fedlora.engines.in_process import InProcess
from fedlora.methods.fedit import FedIT
from fedlora.methods.ffa_lora import FFALoRA
from fedlora.rounds import Received, client_start, client_turn, server_turn
from fedlora.security.attacks import ATTACKS
from fedlora.security.attacks._base import alter_upload, poison_task, success_rate
from fedlora.security.attacks.backdoor import Backdoor
from fedlora.security.attacks.label_flip import LabelFlip
from fedlora.security.robust import ROBUST_RULES
from fedlora.security.robust._base import reweigh_uploads
from fedlora.security.validation import UploadScreen, Validation
from fedlora.tasks._base import Examples
from fedlora.tasks.metrics.scores import Scores, is_possible
from fedlora.tasks.text_classification import TextClassification
from fedlora.types import Turn
from tests.fixtures.federation import config, same
from tests.fixtures.laws import Nudge

M, N, R, K = 12, 10, 2, 10
HOSTILE = [2, 5, 7]


class Pull:
    """Instead of training: every client goes the same way, a little each by itself. So there is an honest mean."""

    def __init__(self, seed):
        self.own = Nudge(seed, 0.02)

    def gradient(self, start):
        return start

    def fit(self, start, trained, rules):
        end, way = self.own.fit(start, trained, rules), Nudge(99, 0.1).fit(start, trained, rules)
        return {p: {k: x + way[p][k] - start[p][k] for k, x in layer.items()} for p, layer in end.items()}


def served():
    shared = {"w": LoRA(R, 4.0).init(M, N, 0), "v": LoRA(R, 4.0).init(N, M, 1)}
    draws = torch.Generator().manual_seed(4)
    return {p: {**x, "B": 0.3 * torch.randn(x["B"].shape, generator=draws)} for p, x in shared.items()}


def round_of(method, attack=None, number=2, overheard=None):
    """One round's uploads as they arrive."""
    shared = served()
    rules = dict.fromkeys(shared, method)
    uploads = {}
    for k in range(K):
        turn = Turn(number, k, R, 10 + k + 100 * number)
        sent, _ = client_turn(rules, shared, {}, turn, Pull(20 + k + 100 * number))
        uploads[k] = Received(turn, 1 + k % 3, alter_upload(attack, rules, shared, {}, sent, turn))
    if attack is not None:
        uploads |= attack.alter_together(rules, shared, uploads, {} if overheard is None else overheard)
    return rules, shared, [uploads[k] for k in range(K)]


def progress(rules, shared, uploads):
    """How far the round goes along the way of the honest one, and aside from it, relative to its length."""
    rules, shared, honest = round_of(next(iter(rules.values())))
    flat = []
    for some in (honest, uploads):
        tree = server_turn(rules, shared, some).shared
        flat.append(torch.cat([(_product(rules, tree, p) - _product(rules, shared, p)).reshape(-1) for p in rules]))
    way, found = flat
    return float(found @ way / (way @ way)), float((found - way).norm() / way.norm())


def _product(rules, tree, part):
    return rules[part].adapter.delta(tree[part]).dense()


def drawn(name, **settings):
    return ATTACKS.load(name)(clients=HOSTILE, **settings).prepare(None, "", K, 0)


HARM = {  # attack -> how far along the honest way a plain mean still gets, at most
    "sign-flip": ({}, 0.5),
    "scaling": ({"scale": -20.0}, 0.0),
    "gaussian": ({"scale": 10.0}, None),
    "inner-product": ({"scale": 4.0}, 0.0),
    "collude": ({"scale": 4.0}, 0.0),
}


@pytest.mark.parametrize("name", HARM)
@pytest.mark.parametrize("method", [FedIT(LoRA(R, 4.0)), FFALoRA(LoRA(R, 4.0))], ids=["fedit", "ffa"])
def test_an_attack_harms_a_mean_and_a_rule_stops_it(name, method):
    settings, most = HARM[name]
    rules, shared, uploads = round_of(method, drawn(name, **settings))
    along, aside = progress(rules, shared, uploads)
    assert aside > 0.5 and (most is None or along < most)
    for rule in ROBUST_RULES.names():
        found, _ = reweigh_uploads(ROBUST_RULES.load(rule)(), method, rules, shared, uploads, 2, 0)
        along, aside = progress(rules, shared, found)
        if rule != "clip":  # which only makes an attacker's update as short as an honest one; here they have 42 %
            assert along > 0.5 and aside < 0.5, (rule, along, aside)
        else:
            assert along > 0.1, (rule, along, aside)


@pytest.mark.parametrize("name", ["nan", "scaling", "rescale"])
def test_what_the_door_stops_of_itself(name):
    settings = {"scaling": {"scale": 50.0}}.get(name, {})
    rules, shared, uploads = round_of(FedIT(LoRA(R, 4.0)), drawn(name, **settings))
    screen = UploadScreen(Validation(), rules, shared, {})
    good = screen.compare([found for u in uploads if (found := screen.check(u)) is not None], lambda u: 1)
    assert sorted(screen.rejected) == HOSTILE
    along, aside = progress(rules, shared, good)
    assert along > 0.8 and aside < 0.3


@pytest.mark.parametrize("settings", [{}, {"scale": 0.01}, {"how": "rotate"}], ids=["larger B", "larger A", "turned"])
def test_a_rescaled_pair_is_invisible_to_every_rule_and_wrecks_the_mean_of_factors(settings):
    """The reason why validation looks at factors: products say that nothing happened."""
    attack = drawn("rescale", **settings)
    rules, shared, honest = round_of(FedIT(LoRA(R, 4.0)))
    _, _, uploads = round_of(FedIT(LoRA(R, 4.0)), attack)
    for a, b in zip(honest, uploads):
        torch.testing.assert_close(_product(rules, a.tree, "w"), _product(rules, b.tree, "w"), rtol=1e-3, atol=1e-4)
    assert progress(rules, shared, uploads)[1] > 1.0
    found, record = reweigh_uploads(ROBUST_RULES.load("multi-krum")(), rules["w"], rules, shared, uploads, 2, 0)
    _, other = reweigh_uploads(ROBUST_RULES.load("multi-krum")(), rules["w"], rules, shared, honest, 2, 0)
    assert record == other, "the rule takes them for honest"
    assert progress(rules, shared, found)[1] > 1.0 or not set(record["kept"]) & set(HOSTILE)
    screen = UploadScreen(Validation(), rules, shared, {})
    good = screen.compare([u for u in uploads if screen.check(u) is not None], lambda u: 1)
    assert sorted(screen.rejected) == HOSTILE
    assert progress(rules, shared, good)[1] < 0.3


def test_a_copied_upload_is_stopped_by_the_second_round():
    attack, overheard, conduct = drawn("copy"), {}, {}
    bad = []
    for number in (2, 3):
        rules, shared, uploads = round_of(FedIT(LoRA(R, 4.0)), attack, number, overheard)
        screen = UploadScreen(Validation(), rules, shared, conduct)
        screen.compare([u for u in uploads if screen.check(u) is not None], lambda u: 1)
        screen.record_conduct()
        bad.append(sorted(screen.rejected))
    assert bad == [[], HOSTILE]


def test_to_first_order_the_update_is_reversed_and_both_factors_take_part():
    rules, shared, honest = round_of(FedIT(LoRA(R, 4.0)))
    _, _, uploads = round_of(FedIT(LoRA(R, 4.0)), drawn("sign-flip", scale=1.0))
    a, b = (_product(rules, some[2].tree, "w") - _product(rules, shared, "w") for some in (honest, uploads))
    assert float((a * b).sum() / a.norm() / b.norm()) < -0.8
    assert all(not torch.equal(uploads[2].tree["w"][k], honest[2].tree["w"][k]) for k in "AB")
    assert all(torch.equal(uploads[0].tree["w"][k], honest[0].tree["w"][k]) for k in "AB")


def test_who_attacks_and_from_when():
    attack = ATTACKS.load("nan")(share=0.3, start=3).prepare(None, "", 10, 7)
    assert len(attack.attackers) == 3
    assert attack.attackers == ATTACKS.load("nan")(share=0.3).prepare(None, "", 10, 7).attackers
    assert attack.attackers != ATTACKS.load("nan")(share=0.3).prepare(None, "", 10, 8).attackers
    assert not any(attack.is_attack(Turn(1, k, 2)) for k in range(10))
    assert {k for k in range(10) if attack.is_attack(Turn(2, k, 2))} == attack.attackers
    assert len(ATTACKS.load("collude")().prepare(None, "", 9, 0).attackers) == 3
    with pytest.raises(ValueError, match="names client 10, and clients are numbered 0 to 9"):
        ATTACKS.load("nan")(clients=[10]).prepare(None, "", 10, 0)


ROWS = Examples(
    {
        "input_ids": torch.arange(100, 112, dtype=torch.int32),
        "offsets": torch.tensor([0, 3, 7, 12]),
        "pad": torch.tensor(9),
    },
    torch.tensor([0, 1, 2]),
    torch.tensor([3, 4, 5]),
)
TASK = TextClassification("nowhere", max_length=6)


def test_flipped_labels_are_taught_and_counted():
    attack = LabelFlip(clients=[0])
    task = poison_task(attack, TASK, Turn(0, 0, 2))
    assert task.collate_for_training(ROWS, torch.arange(3), torch.Generator())["labels"].tolist() == [1, 2, 0]
    assert poison_task(attack, TASK, Turn(0, 1, 2)) is TASK, "the others learn what is right"
    sums = attack.success_task(TASK).scores(torch.eye(3)[[1, 1, 0]], ROWS.labels).sums
    assert sums == {"success": (2, 3)}


def test_a_trigger_goes_before_the_first_word():
    attack = Backdoor(clients=[0], poisoned=1.0, target=2, _tokens=(7, 8))
    batch = poison_task(attack, TASK, Turn(0, 0, 2)).collate_for_training(ROWS, torch.arange(3), torch.Generator())
    assert batch["labels"].tolist() == [2, 2, 2]
    assert batch["input_ids"][0].tolist() == [100, 7, 8, 101, 102, 9]
    assert batch["input_ids"][2].tolist() == [107, 7, 8, 108, 109, 110], "cut to task.max_length"
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 1, 0]
    half = poison_task(Backdoor(clients=[0], _tokens=(7, 8)), TASK, Turn(0, 0, 2))
    mixed = half.collate_for_training(ROWS, torch.tensor([1] * 400), torch.Generator().manual_seed(0))
    poisoned = mixed["input_ids"][:, 1] == 7
    assert 150 < int(poisoned.sum()) < 250
    assert (mixed["labels"] == torch.where(poisoned, 0, 1)).all()
    assert mixed["input_ids"][~poisoned][0].tolist() == [103, 104, 105, 106, 9, 9]


def test_the_judge_of_a_backdoor_leaves_the_target_out():
    judge = typing.cast(typing.Any, Backdoor(target=2, _tokens=(7, 8)).success_task(TASK))
    assert judge.collate(ROWS, torch.arange(3))["input_ids"][:, 1].tolist() == [7, 7, 7]
    assert judge.collate(ROWS, torch.arange(3))["labels"].tolist() == [0, 1, 2]
    assert judge.scores(torch.eye(3)[[2, 0, 2]], ROWS.labels).sums == {"success": (1, 2)}


def test_what_is_sent_starts_from_what_the_client_held():
    rules, shared, _ = round_of(FedIT(LoRA(R, 4.0)))
    turn = Turn(2, 2, R, 5)
    start = client_start(rules, shared, {}, turn)
    same = alter_upload(drawn("scaling"), rules, shared, {}, start, turn)
    assert all(torch.equal(same[p][k], start[p][k]) for p in rules for k in "AB"), "nothing moved, nothing to scale"


def test_all_attacks_are_found():
    assert ATTACKS.names() == [
        "backdoor", "collude", "copy", "gaussian", "inner-product", "label-flip", "nan", "rescale", "scaling", "sign-flip",
    ]  # fmt: skip


FLIP = "attack={name='label-flip', clients=[1]}"


def flipped(*settings):
    return config(
        "method.name=fedsa-lora", FLIP, "rounds=1", "task.train_rows=60", "task.test_rows=30", "training.local_steps=1",
        "clients.partition={name='iid'}", *settings,
    )  # fmt: skip


def test_a_personal_methods_harm_is_the_mean_over_honest_clients_own_models():
    made = flipped()
    f, engine = made.federation(), InProcess()
    [done] = list(engine.run(f))
    judge = f.evaluator(f.attack.success_task(f.task))
    shares, rows = [], 0
    for client in (0, 2):
        tree = client_start(f.rules, done.shared, done.kept[client], f.turn(1, client))
        hits, count = judge.score_client(client, tree).sums["success"]
        shares.append(hits / count)
        rows += count
    assert done.record["attack"] == {"success": pytest.approx(sum(shares) / 2), "rows": rows, "clients": 2}
    assert rows > 0
    assert "attack" not in next(iter(InProcess().run(flipped("attack={name='nan', clients=[1]}").federation()))).record


def test_turns_taken_from_another_run_are_the_bits_of_ones_own(monkeypatch):
    turns, trained = {}, []
    whole = InProcess.train
    monkeypatch.setattr(InProcess, "train", lambda *args: (trained.append(args[1].turn), whole(*args))[1])
    open_door, krum = "validation={norm_limit=1e30, factor_limit=1e30}", "robust={name='krum'}"
    base = ("rounds=2", "clients.count=4", "task.train_rows=60", "task.test_rows=30", "training.local_steps=1")
    counts = []
    several = [("sign-flip", open_door), ("sign-flip", "validation={}"), ("sign-flip", krum)]
    for attack, defence in [*several, ("label-flip", open_door), ("scaling", open_door), ("scaling", krum)]:
        made = config(*base, f"attack={{name='{attack}', clients=[1]}}", defence)
        alone = fedlora.run(made)
        trained.clear()
        known = fedlora.run(made, drive=remembering(turns))
        counts.append(len(trained))
        assert same(known.shared, alone.shared) and known.summary["final"] == alone.summary["final"]
    assert counts[0] == 8, "nothing was known"
    assert counts[2] == 4, "Krum's first round is the same to its clients, and its second is not"
    assert counts[3] == 5, "what honest clients did at first is no matter of the attack"
    assert counts[4] == 4, "nor is what a hostile one trained, before it scales that"


def test_a_personal_methods_harm_is_the_same_over_messages(tmp_path):
    pytest.importorskip("flwr", reason="needs the flower extra")
    from tests.fixtures.flower import World

    made = flipped()
    [there] = World(tmp_path, made=made).run()
    [here] = list(InProcess().run(made.federation()))
    assert there.record["attack"] == here.record["attack"] and here.record["attack"]["clients"] == 2


def test_nobody_can_claim_more_successes_than_rows():
    assert is_possible("success", 3, 3) and not is_possible("success", 4, 3) and not is_possible("success", -1, 3)
    sums = {0: Scores({"success": (1, 4)}), 1: Scores({"success": (4, 4)}), 2: Scores({"accuracy": (1, 1)})}
    assert success_rate(LabelFlip(clients=[1]), sums) == {"success": 0.25, "rows": 4, "clients": 1}
    assert success_rate(None, sums) == {} and success_rate(LabelFlip(clients=[0, 1]), sums) == {}
