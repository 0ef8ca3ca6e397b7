"""Talking with finished runs, by the library and on the command line."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fedlora
from fedlora.cli import app
from fedlora.export.peft import export_model
from fedlora.runs.chat import Chat
from fedlora.runs.config import build
from fedlora.runs.folder import RunFolder
from fedlora.schema import merge_tables
from fedlora.tasks.networks.generation import GenerationSettings
from tests.fixtures.federation import TINY_VIT

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
SHORT = GenerationSettings(12)

pytestmark = pytest.mark.shared


def write(folder, rows):
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def table(shared, data, **task):
    return {
        "rounds": 1,
        "model": {"name": str(shared / "models" / "stories260k-llama")},
        "task": {"name": "causal-lm", "data": data, **task},
        "clients": {"count": 2},
        "adapter": {"name": "lora", "rank": 2, "alpha": 4},
        "training": {"local_steps": 6, "learning_rate": 0.1, "batch_size": 4, "optimizer": "sgd"},
    }


@pytest.fixture(scope="module")
def runs(shared, tmp_path_factory):
    """Folders of small runs: FLoRA on questions, FedSA-LoRA on plain text, FedIT on messages, and one of digits."""
    place = tmp_path_factory.mktemp("runs")
    asked = [
        {"instruction": f"Say {w}", "context": "", "response": f"{w} {w} {w}"}
        for w in ("dog", "cat", "ball", "sun") * 3
    ]
    plain = [{"text": f"The {w} was big. The {w} was red."} for w in ("dog", "cat", "ball", "sun") * 3]
    talked = [
        {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yes, yes."}]}
        for i in range(12)
    ]
    sets = {
        name: write(place / f"{name}-data", rows)
        for name, rows in (("asked", asked), ("plain", plain), ("talked", talked))
    }
    tables = {
        "asked": merge_tables(table(shared, sets["asked"]), {"method": {"name": "flora"}}),
        "plain": merge_tables(table(shared, sets["plain"], text="text"), {"method": {"name": "fedsa-lora"}}),
        "talked": table(shared, sets["talked"], chat_template=CHAT),
        "digits": {"rounds": 1, "model": {"name": str(TINY_VIT)}, "clients": {"count": 2}, "training": {"local_steps": 1},
                   "task": {"name": "image-classification", "data": "digits", "train_rows": 60, "test_rows": 40}},
    }  # fmt: skip
    for name, own in tables.items():
        fedlora.run(build(own), place / name)
    return place


def by_transformers(folder, prompt, special=True):
    """Greedy, by transformers alone, with a merged export."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=special)["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(SHORT.max_new_tokens):
            ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) == 2:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize(
    "name,client,text,prompt",
    [
        ("asked", None, "Say sun", "### Instruction:\nSay sun\n\n### Response:\n"),
        ("plain", 0, "The cat", "The cat"),
        ("plain", 1, "The cat", "The cat"),
        ("talked", None, "Hi", "<user>Hi</s><assistant>"),
    ],
)
def test_it_says_what_the_exported_model_says(runs, tmp_path, name, client, text, prompt):
    run = RunFolder.open(runs / name)
    export_model(run, tmp_path / "out", client, merged=True)
    said = Chat.open(run, client).say(text, SHORT)
    assert said == by_transformers(tmp_path / "out", prompt, special=name != "talked")
    base = run.config.model.name
    assert said != by_transformers(base, prompt, special=name != "talked"), "something was learnt"


def test_a_conversation_is_remembered_where_the_template_knows_turns(runs):
    chat = Chat.open(RunFolder.open(runs / "talked"), system="Be kind")
    first = chat.say("Hi", SHORT)
    turns = [*chat.turns, {"role": "user", "content": "More"}]
    assert chat.prompt(turns) == f"<system>Be kind</s><user>Hi</s><assistant>{first}</s><user>More</s><assistant>"
    chat.say("More", SHORT)
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    alone = Chat.open(RunFolder.open(runs / "asked"))
    alone.say("Say dog", SHORT)
    assert alone.turns == []


def test_draws_differ_from_turn_to_turn_and_come_again_with_the_seed(runs):
    writing, found = GenerationSettings(12, temperature=1.5), []
    for seed in (0, 0, 5):
        chat = Chat.open(RunFolder.open(runs / "plain"), 0, seed=seed)
        found.append([chat.say("The", writing) for _ in range(2)])
    assert found[0] == found[1] != found[2] and found[0][0] != found[0][1]


def test_mistakes(runs, tmp_path):
    plain = RunFolder.open(runs / "plain")
    for run, options, sentence in (
        (plain, {}, "a model for each client and none for all; name one with --client K"),
        (plain, {"client": 9}, "there is no client 9"),
        (plain, {"client": 0, "system": "x"}, "--system is part of a chat template"),
        (RunFolder.open(runs / "digits"), {}, "a run of 'image-classification', but only a causal"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Chat.open(run, **options)
    with pytest.raises(ValueError, match="the answer may have 600, but the model reads at most 512"):
        Chat.open(plain, 0).say("x", GenerationSettings(600))


def test_the_command(runs, commands, tmp_path):
    options = ("--client", 1, "--max-new-tokens", 12)
    chat = Chat.open(RunFolder.open(runs / "plain"), 1)
    expected = [chat.say(text, SHORT) for text in ("The dog", "A cat")]
    arguments = [str(x) for x in ("chat", runs / "plain", *options)]
    once = CliRunner().invoke(app, [*arguments, "--prompt", "The dog"])
    assert (once.exit_code, once.stdout) == (0, expected[0] + "\n"), once.output
    lines = CliRunner().invoke(app, arguments, input="The dog\nA cat\n")
    assert (lines.exit_code, lines.stdout) == (0, "".join(text + "\n" for text in expected)), lines.output
    refused = commands.call(["fedlora", "chat", str(runs / "digits"), "--prompt", "x"], tmp_path)
    assert (
        refused.returncode == 2 and refused.stderr.count("\n") == 1 and "only a causal language model" in refused.stderr
    )


def test_typing(runs, monkeypatch, capsys):
    from fedlora.cli import chat as chatting

    typed = iter(["The dog", "", "x " * 600, "A cat"])

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    chatting.chat_command(runs / "plain", client=1, max_new_tokens=12, stop=None)
    found = capsys.readouterr()
    chat = Chat.open(RunFolder.open(runs / "plain"), 1)
    assert found.out == "".join(chat.say(text, SHORT) + "\n" for text in ("The dog", "A cat"))
    assert "the model reads at most 512" in found.err, "a prompt that is too long ends nothing"
