"""Clients with their own trainers over Flower's messages: the bits of one process, and what a client refuses."""

import importlib.util
import json
import threading

import pytest
import torch

pytest.importorskip("flwr", reason="needs the flower extra")
pytest.importorskip("peft", reason="needs the peft extra")

import fedlora
from fedlora.engines.model_spec import ModelSpec, RemoteModel
from fedlora.files import load_tree
from fedlora.flower import client_app, server_app
from fedlora.flower.client_store import ClientStore
from fedlora.flower.serve_trainers import TrainersRun, run_trainers_server
from fedlora.flower.trainer_client import _LOADED
from fedlora.schema import ConfigError
from fedlora.security.validation.expected import RefusedError
from tests.fixtures.flower import DiedError, config, dying, same, trained
from tests.fixtures.flower_trainers import (
    build_trainer,
    count_parameters,
    of_other_base,
    of_other_rank,
    of_other_weights,
    untested,
    untouched,
    with_heads,
)
from tests.fixtures.memory_grid import MemoryGrid

pytestmark = [
    pytest.mark.flower,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]
QUICK = {"poll": 0.001, "join_timeout": 2.0, "retry": 0.05, "repair_timeout": 0.3}
EQUAL = ("clients", "loss", "cohort", "round", "quarantined", "robust", "privacy")  # bytes: scoring sends leaves
OPACUS = importlib.util.find_spec("opacus") is not None


class Parties:
    """Clients 0 to K-1 with trainers of their own, each with a state folder, and the server's folder."""

    def __init__(self, folder, make=build_trainer, count=3, post=lambda m: m, **options):
        self.folder, self.events = folder, []
        self.nodes = {
            10 + k: {"client": k, "host": False, "state": str(folder / f"party-{k}"), "engine.threads": 1}
            for k in range(count)
        }
        self.grid = MemoryGrid(client_app(make, **options), self.nodes, post)

    def run(self, method="fedit", rounds=2, clients=3, watch=None, **settings):
        own = {key: settings.pop(key) for key in ("seed", "metric", "keep_optimizer", "schedule") if key in settings}
        sections = {**settings, "flower": {**QUICK, **settings.get("flower", {})}}
        run = TrainersRun(clients, method, rounds, sections=sections, **own)
        return run_trainers_server(run, self.grid, self.folder / "out", watch or self.events.append)

    def restart(self):
        """Every client process ends; the next message starts new ones."""
        for node in self.nodes.values():
            _LOADED.pop(node["state"])

    def kept(self, client, last):
        token = json.loads((self.folder / "out" / "run.json").read_text())["run"]
        store = ClientStore(self.folder / f"party-{client}" / token)
        return trained(store.load(client).resolve_pending(last).kept)

    def texts(self):
        return [event.text for event in self.events if event.text]


def same_run(there, here):
    assert same(there.shared, here.shared)
    for theirs, ours in zip(there.records, here.records, strict=True):
        parts = [{key: record.get(key) for key in EQUAL} for record in (theirs, ours)]
        assert json.dumps(parts[0], sort_keys=True) == json.dumps(parts[1], sort_keys=True)
    return True


def federate(method="fedit", rounds=2, clients=3, make=build_trainer, **settings):
    return fedlora.federate(make, clients, method, rounds, engine={"threads": 1}, **settings)


@pytest.mark.parametrize("method", ["fedit", "fedsa-lora", "flora", "fedex-lora"])
def test_a_run_has_the_bits_of_one_process(method, tmp_path):
    parties = Parties(tmp_path)
    there, here = parties.run(method), federate(method)
    assert same_run(there, here)
    for client, tree in here.kept.items():
        assert same(parties.kept(client, 1), trained(tree))
    assert (tmp_path / "out" / "shared.safetensors").exists()
    assert there.summary["kept"] is False


def test_cohorts_and_kept_moments_have_the_bits_of_one_process(tmp_path):
    clients, options = {"count": 3, "per_round": 2}, {"keep_optimizer": True, "seed": 5}
    there = Parties(tmp_path).run("fedsa-lora", 3, clients, **options)
    assert same_run(there, federate("fedsa-lora", 3, clients, **options))
    assert not same(there.shared, federate("fedsa-lora", 3, clients, seed=5).shared), "moments make a difference"


@pytest.mark.parametrize("method", ["fedsa-lora", "fedex-lora"])
def test_a_server_that_died_and_new_client_processes_go_on_with_the_same_bits(method, tmp_path):
    parties = Parties(tmp_path)
    with pytest.raises(DiedError):
        parties.run(method, 3, watch=dying("turn", 1), keep_optimizer=True)
    parties.restart()
    there = parties.run(method, 3, keep_optimizer=True)
    assert len(there.records) == 3 and there.summary["resumed"] == [1]
    assert same_run(there, federate(method, 3, keep_optimizer=True))


def test_client_processes_that_end_between_two_rounds_go_on(tmp_path):
    parties = Parties(tmp_path)
    there = parties.run("fedex-lora", 3, watch=lambda e: parties.restart() if e.kind == "round" else None)
    assert same_run(there, federate("fedex-lora", 3))


def test_codes_of_eight_bits_have_the_bits_of_one_process(tmp_path):
    coded = {"compression": {"up": "int8", "down": "int8"}}
    there, here = Parties(tmp_path).run(**coded), federate(**coded)
    assert same_run(there, here)
    assert there.records[-1]["bytes"]["up"] != federate().records[-1]["bytes"]["up"]


def test_robust_rules_and_validation_work(tmp_path):
    told = {"robust": {"name": "krum", "attackers": 0}}
    assert same_run(Parties(tmp_path).run(**told), federate(**told))


@pytest.mark.skipif(not OPACUS, reason="needs the dp extra")
def test_client_level_privacy_has_the_bits_of_one_process(tmp_path):
    told = {"privacy": {"level": "client", "noise_multiplier": 0.5, "clip": 0.1}}
    method = {"name": "fedit", "weighting": "uniform"}
    there, here = Parties(tmp_path).run(method, **told), federate(method, **told)
    assert same_run(there, here)
    assert there.records[-1]["privacy"]["epsilon"] == here.records[-1]["privacy"]["epsilon"]


def test_secure_aggregation_ends_near_the_mean_and_shows_no_upload(tmp_path):
    seen = []

    def post(message):
        if message.metadata.src_node_id >= 10 and message.has_content() and "leaves" in message.content:
            seen.append(message)
        return message

    there = Parties(tmp_path, post=post).run(flower={"secure_aggregation": True})
    here = federate()
    for part, layer in here.shared.items():
        for leaf, x in layer.items():
            assert torch.allclose(there.shared[part][leaf], x, atol=1e-4)
    assert not seen
    assert there.records[-1]["loss"].keys() == {0, 1, 2}


def test_a_trainer_without_a_loss_or_test_rows_trains(tmp_path):
    there, here = Parties(tmp_path, untouched).run(), federate(make=untouched)
    assert same_run(there, here)
    assert there.records[-1]["loss"] == {0: None, 1: None, 2: None}
    assert "clients" not in there.records[-1]
    assert "clients" not in Parties(tmp_path / "tested", untested).run().records[-1]


def test_own_metrics_come_from_the_clients_function(tmp_path):
    there = Parties(tmp_path, evaluate=count_parameters).run(metric="size")
    here = federate(evaluate=count_parameters, metric="size")
    assert same_run(there, here)
    assert there.records[-1]["clients"]["mean"] > 0


def test_fedloras_own_adapter_and_a_head_have_the_bits_of_one_process(tmp_path):
    assert same_run(Parties(tmp_path, with_heads).run("ravan"), federate("ravan", make=with_heads))


def test_smaller_ranks_have_the_bits_of_one_process(tmp_path):
    clients = {"count": 3, "ranks": [1, 2, 2]}
    assert same_run(Parties(tmp_path).run("flexlora", 2, clients), federate("flexlora", 2, clients))


# ---------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("make", "client", "reason"),
    [
        (of_other_rank, 2, "its model has LoRA(rank=3"),
        (of_other_base, 1, "in its model's config.json layer_norm_eps is 1e-05, and in the run's its default"),
        (of_other_weights, 1, "its pretrained model has other weights than the run's"),
    ],
)
def test_a_client_with_another_model_is_left_out_with_the_difference(make, client, reason, tmp_path):
    parties = Parties(tmp_path, make)
    result = parties.run()
    assert result.records[-1]["cohort"] == [k for k in range(3) if k != client]
    assert any(f"is left out: client {client}: {reason}" in text for text in parties.texts())


def test_a_client_takes_part_only_in_runs_that_keep_its_requirements(tmp_path):
    parties = Parties(tmp_path, requires={"flower.secure_aggregation": True, "compression.up": "float32"})
    with pytest.raises(ValueError, match="round 1 cannot be finished"):
        parties.run()
    told = "this client requires flower.secure_aggregation = True, and the run has False"
    assert any(told in text for text in parties.texts())
    safe = Parties(tmp_path / "safe", requires={"flower.secure_aggregation": True})
    assert len(safe.run(flower={"secure_aggregation": True}).records) == 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "tests.fixtures.laws:Anything"}, "which would import code here"),
        ({"attack": {"name": "nan", "clients": [1]}}, "the run lets clients attack it"),
    ],
)
def test_a_client_takes_no_code_and_no_attack_from_the_server(settings, reason, tmp_path):
    from fedlora.flower.requirements import RefusedTermsError, check_terms

    table = {"task": {"name": "objects"}, "clients": {"partition": {"name": "own"}}, "method": {"name": "fedit"}}
    check_terms(table, {}, ())
    own = {key: {"name": value} if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(RefusedTermsError, match=reason):
        check_terms({**table, **own}, {}, ())
    check_terms({**table, **own}, {}, ("attack", "tests.fixtures.laws:Anything"))


@pytest.mark.parametrize("table", [{"engine": {}}, {"task": {"name": "glue"}}, {"clients": {"partition": "iid"}}])
def test_a_client_takes_only_settings_of_clients(table):
    from fedlora.flower.requirements import RefusedTermsError, check_terms

    good = {"task": {"name": "objects"}, "clients": {"partition": {"name": "own"}}}
    with pytest.raises(RefusedTermsError):
        check_terms({**good, **table}, {}, ())


def test_apps_of_two_kinds_say_so(tmp_path):
    grid = Parties(tmp_path).grid
    from fedlora.flower.serve import run_server

    events = []
    one = config("clients.partition=own", "task.label_names=['0','1','2','3','4','5','6','7','8','9']", "rounds=1",
                 "flower={join_timeout=0.2, poll=0.001, retry=0.05, repair_timeout=0.1, min_clients=2}",
                 "clients.count=3")  # fmt: skip
    with pytest.raises(ValueError, match="round 1 cannot be finished"):
        run_server(one, grid, tmp_path / "toml", events.append)
    assert any("this client's app has a trainer and no configuration" in event.text for event in events)
    path = tmp_path / "mine.toml"
    path.write_text('[model]\nname = "demo-vit"\n[task]\nname = "image-classification"\ndata = "digits"\n')
    told = []
    nodes = {10: {"client": 0, "host": False, "state": str(tmp_path / "toml-party")}}
    with pytest.raises(ValueError, match="no client described its model"):
        run_trainers_server(
            TrainersRun(1, sections={"flower": {**QUICK, "join_timeout": 0.05}}),
            MemoryGrid(client_app(path), nodes), tmp_path / "other", told.append,
        )  # fmt: skip


def test_a_function_that_no_process_can_import_is_refused_by_its_name():
    def inner(client):
        return build_trainer(client)

    for function, kind in ((lambda client: 1, "a lambda"), (inner, "inside another")):
        with pytest.raises(ConfigError, match=f"tests.flower.test_own_trainers:.*{kind}.*def at the top"):
            client_app(function)
    with pytest.raises(ConfigError, match="give a function"):
        client_app(3)
    with pytest.raises(ConfigError, match="evaluate tests.flower.*a lambda"):
        client_app(build_trainer, evaluate=lambda network, client: {})
    with pytest.raises(ConfigError, match="no section 'privcy'.*privacy"):
        client_app(build_trainer, requires={"privcy.level": "client"})
    with pytest.raises(ConfigError, match="requires has 'privacy'"):
        client_app(build_trainer, requires={"privacy": "client"})
    with pytest.raises(ConfigError, match="belong to a trainer function"):
        client_app("mine.toml", accepts=["attack"])


def test_a_servers_settings_are_checked_before_any_client_comes(tmp_path):
    with pytest.raises(ConfigError, match="no argument 'compresion'"):
        server_app(method="fedit", clients=3, compresion={})
    with pytest.raises(ConfigError, match="a TOML file and settings"):
        server_app("mine.toml", rounds=3)
    with pytest.raises(ConfigError, match="schedule is 'week'"):
        server_app(clients=3, schedule="week")
    with pytest.raises(ConfigError, match="number of clients is None"):
        TrainersRun().with_clients(None)
    assert TrainersRun().with_clients(4).clients == 4 and TrainersRun(3).with_clients(4).clients == 3
    parties = Parties(tmp_path)
    parties.run(rounds=1)
    with pytest.raises(ConfigError, match="holds this run, finished"):
        parties.run(rounds=1)


def test_a_run_without_clients_ends_with_the_reasons(tmp_path):
    parties = Parties(tmp_path, count=1)
    parties.nodes[10]["client"] = 7
    parties.grid = MemoryGrid(client_app(build_trainer), parties.nodes)
    with pytest.raises(ValueError, match="calls itself client 7, and clients are 0 to 2"):
        parties.run(flower={"join_timeout": 0.05})


def test_the_lowest_number_describes_the_model_if_client_0_does_not_come(tmp_path):
    parties = Parties(tmp_path)
    parties.grid.leave(10)
    result = parties.run(flower={"join_timeout": 0.2}, rounds=1)
    assert result.records[0]["cohort"] == [1, 2]


def spec_of(make=build_trainer):
    from fedlora.engines.trainers import Trainers
    from fedlora.flower.trainer_client import describe_trainers

    trainers = Trainers(make, 3, 0)
    return describe_trainers(trainers), trainers.model


def test_a_description_of_a_model_survives_its_journey():
    for make in (build_trainer, with_heads):
        spec, model = spec_of(make)
        again = ModelSpec.from_json(spec.to_json())
        assert again == spec and again.find_difference(spec) is None
        remote = RemoteModel(again, model.first_leaves)
        assert same(remote.initial(3), model.initial(3)) and same(remote.own_start, model.own_start)
        remote.fold({}), remote.unfold()
        assert remote.base_version == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("base"),
        lambda t: t.update(adapters=[]),
        lambda t: t.update(adapters=[{"name": "os:system"}]),
        lambda t: t.update(adapters=[{"name": "lora", "rank": -1}]),
        lambda t: t.update(parts={}),
        lambda t: t.update(parts=[1]),
        lambda t: t.update(parts={"a": [0, False, 2**30, 4]}),
        lambda t: t.update(parts={"a": [9, False, 4, 4]}),
        lambda t: t.update(parts={"a": [0, 1, 4, 4]}),
        lambda t: t.update(parts={"a": [0, True]}),
        lambda t: t.update(parts={str(k): [0, True, 2**24, 2**24] for k in range(200)}),
        lambda t: t.update(name="x" * 1000),
        lambda t: t.update(base="\x1b[2J"),
        lambda t: t.update(settings={"a": 1}),
        lambda t: t.update(training={"local_steps": "many"}),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(change):
    table = json.loads(spec_of()[0].to_json())
    change(table)
    with pytest.raises(RefusedError):
        ModelSpec.from_json(json.dumps(table))


def test_first_leaves_that_do_not_belong_to_the_description_are_refused():
    spec, model = spec_of()
    path = next(iter(model.first_leaves))
    good = model.first_leaves
    for bad in (
        {k: x for k, x in good.items() if k != path},
        {**good, path: {}},
        {**good, path: {leaf: x[:1, :1] for leaf, x in good[path].items()}},
        {**good, path: {leaf: x.double() for leaf, x in good[path].items()}},
        {**good, path: {leaf: x * torch.nan for leaf, x in good[path].items()}},
        {**good, "other": good[path]},
    ):
        with pytest.raises(RefusedError):
            RemoteModel(spec, bad)


def test_a_function_that_cannot_be_pickled_is_refused_by_the_simulation():
    pytest.importorskip("ray", reason="needs the flower-simulation extra")
    lock = threading.Lock()

    def trainer(client):
        assert lock
        return build_trainer(client)

    with pytest.raises(ConfigError, match="cannot be pickled"):
        fedlora.federate(trainer, 3, engine={"name": "flower-simulation"})


@pytest.mark.slow
@pytest.mark.xdist_group("flower")
@pytest.mark.filterwarnings("ignore")  # Ray leaves processes to the garbage collector
def test_the_simulation_has_the_bits_of_one_process():
    pytest.importorskip("ray", reason="needs the flower-simulation extra")
    told = {"rounds": 2, "keep_optimizer": True, "clients": {"count": 3, "per_round": 2}}
    there = fedlora.federate(build_trainer, method="fedex-lora", engine={"name": "flower-simulation"}, **told)
    here = federate("fedex-lora", **told)
    assert same_run(there, here)


def test_the_files_of_a_run_are_those_of_one_process(tmp_path):
    Parties(tmp_path).run()
    federate(out=tmp_path / "here")
    names = [{path.name for path in (tmp_path / place).iterdir()} for place in ("out", "here")]
    assert names[0] - names[1] == {"run.json", "model.safetensors"}
    assert same(load_tree(tmp_path / "out" / "initial.safetensors"), load_tree(tmp_path / "here/initial.safetensors"))
    fedlora.open(tmp_path / "out")
