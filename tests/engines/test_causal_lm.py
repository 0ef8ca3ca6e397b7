"""Whole runs of a causal language model: by role, with every way of combining; on Flower's grid; exported."""

import gzip
import json
from collections import Counter

import pytest
import torch

import fedlora
from fedlora.export.peft import export_model
from fedlora.runs.build import attach_adapters
from fedlora.runs.config import build
from fedlora.runs.folder import RunFolder
from fedlora.schema import apply_overrides
from tests.fixtures.federation import same


@pytest.fixture(scope="module")
def roles(shared, tmp_path_factory):
    """The lines of the three roles that speak most: some to train on, and a few to test."""
    folder, there = tmp_path_factory.mktemp("roles"), shared / "data" / "shakespeare_roles"
    rows = {}
    for split in ("train", "test"):
        with gzip.open(there / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows[split] = [json.loads(line) for line in file]
    most = [role for role, _ in Counter(row["role"] for row in rows["train"]).most_common(3)]
    for split, count in (("train", 45), ("test", 8)):
        some = [row for role in most for row in [row for row in rows[split] if row["role"] == role][:count]]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(shared, roles):
    def made(*overrides):
        table = {
            "rounds": 2,
            "model": {"name": str(shared / "models" / "stories260k-llama")},
            "task": {"name": "causal-lm", "data": str(roles), "text": "text", "max_length": 48},
            "clients": {"count": 3, "partition": {"name": "column", "column": "role"}},
            "adapter": {"name": "lora", "rank": 2, "alpha": 4},
            "training": {"local_steps": 3, "learning_rate": 5e-3, "batch_size": 4},
        }  # fmt: skip
        return build(apply_overrides(table, list(overrides)))

    return made


pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def by_role(config, tmp_path_factory):
    """``by_role(method)``: a run in which each client is a role, made once."""
    folder, runs = tmp_path_factory.mktemp("by role"), {}

    def run(name):
        if name not in runs:
            own = ("rounds=3", "training.local_steps=8", "evaluation.every=1")
            runs[name] = fedlora.run(config(f"method.name={name}", *own), folder / name)
        return runs[name]

    return run


@pytest.mark.xdist_group("by role")
@pytest.mark.parametrize("name", ["fedit", "fedsa-lora", "flora"])
def test_by_role(by_role, tmp_path, name):
    run = by_role(name)
    perplexities = [record["clients"]["mean"] for record in run.records]
    assert perplexities[-1] < 0.95 * perplexities[0], "it learns"
    assert run.summary["metric"] == {"name": "perplexity", "higher": False}
    worst = run.summary["final"]["clients"]
    assert worst["worst"] == max(worst["each"]) and len(set(worst["each"])) == 3
    assert ("global" in run.summary["final"]) == (name != "fedsa-lora")
    told = run.summary["notes"]
    assert len(told) == 2 and "training rows were cut to 48 tokens on the right" in told[0]
    if name == "flora":
        assert run.summary["base_updates"] == 3
    found = export_model(RunFolder.open(run.folder), tmp_path / "out", 1 if name == "fedsa-lora" else None)
    assert found["difference"] < 1e-4


@pytest.mark.xdist_group("by role")
def test_the_export_is_what_peft_loads_by_itself(by_role, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    run = RunFolder.open(by_role("fedit").folder)
    export_model(run, tmp_path / "out")
    export_model(run, tmp_path / "merged", merged=True)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(run.config.model.name).eval()
    model = attach_adapters(run.config, run.network())
    model.load(run.tree(None))
    ids = run.config.task.preprocessor(run.config.model.name)("To be", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mine = model.network.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, mine, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(whole(ids).logits, mine, atol=1e-4, rtol=1e-4)
        assert (base(ids).logits - mine).abs().max() > 0.05
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "AutoModelForCausalLM.from_pretrained(" in card and "num_labels" not in card and "| perplexity, global" in card
    )
    assert (tmp_path / "merged" / "tokenizer.json").exists()


@pytest.mark.parametrize("name,settings", [("fedsa-lora", ["task.packing=true"]), ("flora", ["training.gradient_checkpointing=true"])])  # fmt: skip
def test_the_grid_has_the_bits_of_one_process(config, tmp_path, name, settings):
    pytest.importorskip("flwr", reason="needs the flower extra")
    from tests.fixtures.flower import World, records_agree

    made = config(f"method.name={name}", *settings)
    here, world = fedlora.run(made), World(tmp_path, made=made)
    rounds = world.run()
    assert same(rounds[-1].shared, here.shared)
    assert records_agree(rounds, here.records)
    assert torch.isfinite(torch.tensor(list(here.records[-1]["loss"].values()))).all()


def test_every_party_may_bring_its_own_rows(config, tmp_path, capsys):
    pytest.importorskip("flwr", reason="needs the flower extra")
    from fedlora.flower.client_messages import load_base
    from fedlora.flower.deploy.node_config import apply_node_config

    made = config("clients.partition={name='own'}")
    with pytest.raises(ValueError, match="every client has its own data on its own machine"):
        made.federation()
    assert made.federation(combines=True).data is None
    rows = [{"who": "a", "says": "My lord. " * 60}, {"who": "b", "says": "Good night."}] * 3
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {key: value for key, value in made.table["task"].items() if key != "text"}
    node = {"client": 1, "task.data": str(tmp_path), "task.prompt": "{who}:", "task.response": " {says}"}
    own = apply_node_config({**made.table, "task": table}, node)
    party = load_base(json.dumps(own), 1).federation
    assert len(party.shards[1].train) == 6 and party.label_names == ()
    assert "fedlora: 3 of 6 training rows were cut to 48 tokens" in capsys.readouterr().err


def test_what_was_cut_is_said_on_stderr(config, commands, tmp_path):
    from fedlora.schema import dumps

    (tmp_path / "my.toml").write_text(dumps(config("rounds=1", "training.local_steps=1").table))
    found = commands.call(["fedlora", "run", "my.toml", "--json"], tmp_path)
    assert found.returncode == 0, found.stderr
    notes = json.loads(found.stdout)["notes"]
    assert found.stderr.splitlines() == notes and len(notes) == 2


def test_a_comparison_says_it_once(capsys):
    from fedlora.engines.loop import Event
    from fedlora.runs.comparison import Cell
    from fedlora.runs.progress import Cells

    cells = [Cell(label, 0, {}, None, {"notes": ["one", "two"]}) for label in ("fedit", "flora")]
    with Cells(2, 1) as progress:
        progress.watch(cells[0], Event("note", 0, text="one"))
        for cell in cells:
            progress.finish(cell)
    assert capsys.readouterr().err.splitlines() == ["one", "two"]
