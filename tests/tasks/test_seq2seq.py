"""A tiny T5, made here: its loss, its answers, its training, and what an export of it is."""

import json
import random

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from fedlora.adapters import LoRA
from fedlora.api import run
from fedlora.export.peft import export_model
from fedlora.runs.config import build
from fedlora.runs.folder import RunFolder
from fedlora.tasks import seq2seq
from fedlora.tasks.metrics.answers import answer_f1, exact_match
from fedlora.tasks.metrics.scores import compute_metrics
from fedlora.tasks.seq2seq import Seq2Seq
from fedlora.training.model import Model

WORDS = [
    "classify",
    "question",
    ":",
    "context",
    "red",
    "blue",
    "green",
    "warm",
    "cold",
    "car",
    "sky",
    "grass",
    "fire",
    "ice",
    "the",
    "of",
]
KINDS = {"fire": "warm red", "ice": "cold blue", "grass": "green"}
EVERYWHERE = ["q", "k", "v", "o", "wi", "wo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A T5 of two layers with random weights and a tokenizer of words, as a folder."""
    folder = tmp_path_factory.mktemp("t5")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    own = Tokenizer(models.WordLevel(words, "<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def rows(count: int, seed: int):
    draws = random.Random(seed)
    for _ in range(count):
        kind = draws.choice(sorted(KINDS))
        around = draws.sample(["car", "sky", "the", "of"], draws.randint(1, 4))
        yield {"text": " ".join([*around, kind]), "answer": KINDS[kind], "kind": kind}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), list(rows(180, 0)), list(rows(40, 1)))


def write(folder, train, test=None):
    for name, some in (("train", train), ("test", test or train)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(folder)


def task(data, **settings) -> Seq2Seq:
    return Seq2Seq(data, **{"source": "classify : {text}", "target": "answer", "max_new_tokens": 4, **settings})


def test_a_batch_is_padded_on_both_sides_of_the_arrow(model, data):
    one = task(data)
    train = one.load(model, 0).train
    some = torch.tensor([0, 1, 2, 3, 4, 5])
    batch = one.collate(train, some)
    own = seq2seq.load_tokenizer(model)
    texts = [train.texts[i] for i in range(6)]
    expected = own([t["source"] for t in texts], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    labels = own([t["golds"][0] for t in texts], padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(batch["labels"], labels.masked_fill(labels == 0, -100)) and (batch["labels"] == -100).any()
    assert texts[0]["source"].startswith("classify : ")


def test_the_loss_is_the_mean_over_target_tokens(model, data):
    one = task(data)
    train, network = one.load(model, 0).train, one.network(model, 0, 0).eval()
    batch = one.collate(train, torch.arange(7))
    with torch.no_grad():
        loss, sums = one.loss(network, batch), one.outputs(network, batch).sum(0)
        by_hand, tokens = 0.0, 0
        for i in range(7):  # alone, without any padding, token by token
            single = one.collate(train, torch.tensor([i]))
            said = single["labels"][0].tolist()
            before = torch.tensor([[0, *said[:-1]]])
            logits = network(input_ids=single["input_ids"], decoder_input_ids=before).logits[0].double()
            by_hand -= sum(float(logits[t].log_softmax(-1)[token]) for t, token in enumerate(said))
            tokens += len(said)
    assert float(loss) == pytest.approx(by_hand / tokens, rel=1e-5)
    assert sums.tolist() == pytest.approx([by_hand, tokens], rel=1e-5)
    assert network(**batch).loss.item() == pytest.approx(float(loss), rel=1e-6), "as transformers has it"


def test_answers_are_the_likeliest_tokens_whatever_they_are_batched_with(model, data):
    one = task(data)
    train, network = one.load(model, 0).train, one.network(model, 0, 0).eval()
    together = one.answers(network, one.collate(train, torch.arange(8)))
    for i, text in enumerate(together):
        batch, said = one.collate(train, torch.tensor([i])), [0]
        while len(said) <= 4 and said[-1] != 1:
            with torch.no_grad():
                logits = network(input_ids=batch["input_ids"], decoder_input_ids=torch.tensor([said])).logits
            said.append(int(logits[0, -1].argmax()))
        assert text == seq2seq.load_tokenizer(model).decode(said, skip_special_tokens=True).strip()


def test_graded_rows_become_figures(model, data, monkeypatch):
    one = task(data)
    found, network = one.load(model, 0), one.network(model, 0, 0).eval()
    right = [t["golds"][0] for t in found.test.texts]
    said = [right[0], "the " + right[1].upper() + "!", f"{right[2]} car", "sky"]
    monkeypatch.setattr(Seq2Seq, "answers", lambda self, network, batch: said)
    outputs = one.evaluate(network, found.test, torch.arange(4), torch.device("cpu"))
    values = compute_metrics(one.scores(outputs, found.test.labels[:4]))
    words = len(right[2].split())
    assert values["exact_match"] == 0.5
    assert values["answer_f1"] == pytest.approx((2 + 2 * words / (2 * words + 1)) / 4)
    assert values["nll"] > 0 and values["perplexity"] > 1
    quiet = task(data, metric="nll")
    assert quiet.evaluate(network, found.test, torch.arange(4), torch.device("cpu")).shape == (4, 2)


def test_query_and_value_of_both_halves_are_adapted_and_no_head(model, data):
    attached = Model.attach(task(data).network(model, 0, 0), LoRA(2, 4.0))
    wanted = [f"encoder.block.{i}.layer.0.SelfAttention.{x}" for i in (0, 1) for x in "qv"]
    for i in (0, 1):
        wanted += [
            f"decoder.block.{i}.layer.{j}.{kind}Attention.{x}"
            for j, kind in enumerate(("Self", "EncDec"))
            for x in "qv"
        ]
    assert sorted(attached.parts) == sorted(wanted), "nothing is trained in full: the head is pretrained, and tied"


@pytest.mark.parametrize("key", ["targets", "head"])
def test_a_tied_head_cannot_be_changed_alone(model, data, key):
    with pytest.raises(
        ValueError, match=rf"model.{key} names 'lm_head', whose weight is also that of 'shared' \(tied\)"
    ):
        Model.attach(task(data).network(model, 0, 0), LoRA(2, 4.0), **{key: ["lm_head"]})


def config(model, data, name="fedit", rounds=3, **more):
    return build(
        {
            "rounds": rounds,
            "model": {"name": model, "targets": EVERYWHERE},
            "task": {"name": "seq2seq", "data": data, "source": "classify : {text}", "target": "answer", "label": "kind",
                     "max_new_tokens": 4},
            "clients": {"count": 3, "partition": {"name": "dirichlet", "alpha": 0.5}},
            "adapter": {"name": "lora", "rank": 8, "alpha": 16},
            "method": {"name": name},
            "training": {"local_steps": 15, "learning_rate": 1e-2},
            "evaluation": {"every": rounds},
            **more,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(config(model, data), folder)
    return RunFolder.open(folder)


def test_a_federation_learns_to_answer(finished, model, data):
    one = finished.config.task
    found = one.load(model, 0)
    before = compute_metrics(one.scores(one.evaluate(one.network(model, 0, 0).eval(), found.test, torch.arange(40), torch.device("cpu")), found.test.labels))  # fmt: skip
    assert before["exact_match"] < 0.5
    final = finished.summary["final"]
    assert final["global"]["exact_match"] == 1.0 and final["global"]["answer_f1"] == 1.0
    assert finished.summary["metric"]["name"] == "exact_match" and final["global"]["nll"] < before["nll"] / 5


def test_a_client_has_the_kinds_that_its_split_gave_it(model, data):
    federation = config(model, data).federation()
    train = federation.data.train
    assert sorted(set(train.partition_labels.tolist())) == [0, 1, 2]
    shares = [torch.bincount(train.partition_labels[s.train], minlength=3) / len(s.train) for s in federation.shards]
    assert max(float((a - b).abs().max()) for a in shares for b in shares) > 0.2, "skewed by task.label"


def test_an_export_is_an_adapter_that_peft_generates_with(finished, model, tmp_path):
    found = export_model(finished, tmp_path / "out")
    assert found["difference"] < 1e-4
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM" and settings["modules_to_save"] is None
    theirs = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(model), tmp_path / "out").eval()
    own = seq2seq.load_tokenizer(model)
    asked = own(["classify : the car fire", "classify : ice"], padding=True, return_tensors="pt")
    said = theirs.generate(**asked, max_new_tokens=4)
    assert own.batch_decode(said, skip_special_tokens=True) == ["warm red", "cold blue"]


def test_a_merged_model_needs_nothing_else(finished, tmp_path):
    assert export_model(finished, tmp_path / "out", merged=True)["difference"] < 1e-4
    theirs, own = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out"), seq2seq.load_tokenizer(str(tmp_path / "out"))
    said = theirs.generate(**own("classify : sky grass", return_tensors="pt"), max_new_tokens=4)
    assert own.decode(said[0], skip_special_tokens=True) == "green"


def test_base_updates_reach_a_t5(model, data):
    found = run(config(model, data, "flora", 1, training={"local_steps": 2, "learning_rate": 1e-2}))
    assert found.summary["base_updates"] == 1 and found.records[0]["global"]["nll"] > 0


QUESTION = {"question": "what is red", "context": "fire is red"}


@pytest.mark.parametrize(
    "row, settings, source, golds",
    [
        ({**QUESTION, "answers": {"text": ["fire", "the fire"], "answer_start": [0, 0]}}, {}, "question: what is red context: fire is red", ["fire", "the fire"]),
        ({**QUESTION, "answers": ["fire"]}, {}, "question: what is red context: fire is red", ["fire"]),
        ({**QUESTION, "answers": {"text": [], "answer_start": []}}, {"source": "question", "target": "answers"}, "what is red", [""]),
        ({"source": "a", "target": "b"}, {}, "a", ["b"]),
        ({"text": "a", "label": 1}, {"label_names": ["cold", "warm"]}, "a", ["warm"]),
        ({"text": "a", "label": 1}, {}, "a", ["1"]),
        ({"a": "x {y}", "b": 3}, {"source": "{a} of {b}", "target": "{b}: {a}"}, "x {y} of 3", ["3: x {y}"]),
    ],
)  # fmt: skip
def test_sources_and_golds(tmp_path, model, row, settings, source, golds):
    found = Seq2Seq(write(tmp_path, [row]), **settings).load(model, 0)
    assert found.test.texts == ({"source": source, "golds": tuple(golds)},)
    assert found.label_names == ()


@pytest.mark.parametrize(
    "row, settings, said",
    [
        ({"a": "x"}, {}, "no source and target among a; set task.source and task.target"),
        ({"a": "x", "b": "y"}, {"source": "a"}, "task.source is set without task.target"),
        ({"a": "x", "b": "y"}, {"source": "{a", "target": "b"}, "braces do not match"),
        ({"a": "x", "b": "y"}, {"source": "{c}", "target": "b"}, r"no column 'c' \(task.source\)"),
        ({"a": ["x"], "b": "y"}, {"source": "a", "target": "b"}, "which is not text"),
        ({"a": "x", "b": 1.5}, {"source": "a", "target": "b"}, "holds 1.5; it needs text, or a list of texts"),
        ({"a": "x", "b": " "}, {"source": "a", "target": "b"}, "empty text"),
        ({"a": "x", "b": 2}, {"source": "a", "target": "b", "label_names": ["n", "m"]}, "holds 2 in the training rows, which matches no label; .* positions, 0 = n, 1 = m"),
        ({"a": "x", "b": "M"}, {"source": "a", "target": "b", "label_names": ["n", "m"]}, r"\(task.target\) holds 'M' in the training rows, which matches no label; did you mean 'm'"),
        ({"a": "x", "b": "m"}, {"source": "a", "target": "{b}", "label_names": ["n", "m"]}, "task.target is a template; keep one"),
        ({"a": "x", "b": "m"}, {"source": "a", "target": "b", "label_names": ["m", "m"]}, "task.label_names has 'm' twice"),
        ({"a": "x", "b": "red " * 9}, {"source": "a", "target": "b", "max_target_length": 5}, "the longest 10; raise it"),
        ({"a": "x", "b": "y"}, {"source": "a", "target": "b", "metric": "accuracy"}, "task.metric is 'accuracy'; here it is 'exact_match'"),
        ({"a": "x", "b": "y"}, {"source": "a", "target": "b", "max_new_tokens": 0}, "task.max_new_tokens is 0"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path, model, row, settings, said):
    with pytest.raises(ValueError, match=said):
        Seq2Seq(write(tmp_path, [row]), **settings).load(model, 0)


def test_a_model_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="of the kind 'vit', which AutoModelForSeq2SeqLM does not load"):
        Seq2Seq("none").network(str(tmp_path), 0, 0)


def test_long_sources_are_cut_before_their_end_token_and_that_is_said(tmp_path, model):
    folder = write(tmp_path, [{"source": "car " * 20, "target": "red"}, {"source": "car", "target": "red"}])
    found = Seq2Seq(folder, max_source_length=6).load(model, 0)
    assert found.train.lengths.tolist() == [6, 2]
    assert found.train.features["source"][:6].tolist() == [
        seq2seq.load_tokenizer(model).convert_tokens_to_ids("car")
    ] * 5 + [1]
    assert found.notes[0] == "1 of 2 training sources were cut to 6 tokens."


@pytest.mark.parametrize(
    "text, golds, match, f1",
    [
        ("The Eiffel Tower!", ["eiffel tower"], True, 1.0),
        ("tower", ["Eiffel Tower", "a big tower"], False, 2 / 3),
        ("red car", ["blue sky"], False, 0.0),
        ("a cat sat, a cat", ["cat cat dog"], False, 2 / 3),
        ("", [""], True, 1.0),
        ("", ["fire"], False, 0.0),
        ("the", [""], True, 1.0),
    ],
)  # fmt: skip
def test_squads_measures(text, golds, match, f1):
    assert exact_match(text, golds) is match and answer_f1(text, golds) == pytest.approx(f1)


def test_rows_that_teach_nothing_are_dropped_and_counted(tmp_path, model):
    rows = [{"input": "fire", "target": "warm red"}, {"input": "ice", "target": "cold blue"}] * 2
    odd = [{"input": "grass"}, {"input": "grass", "target": " "}, {"input": " ", "target": "green"},
           {"input": "grass", "target": "green " * 9}]  # fmt: skip
    for name, some in (("train", [rows[0], *odd, *rows[1:]]), ("test", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    found = Seq2Seq(str(tmp_path), max_target_length=8, drop_unlearnable=True).load(model, 0)
    assert [row["golds"] for row in found.train.texts] == [("warm red",), ("cold blue",)] * 2
    assert found.notes == ("4 of 8 training rows were left out: nothing is left to learn in them.",)
    for row, sentence in zip(odd, ("missing", "empty text", "empty source", "a target of more than")):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*rows, row]))
        with pytest.raises(ValueError, match=sentence):
            Seq2Seq(str(tmp_path), max_target_length=8).load(model, 0)


def test_a_template_without_any_value_is_no_target(tmp_path, model):
    rows = [{"a": "fire", "b": "warm"}, {"a": "ice", "b": ""}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows * 5))
    with pytest.raises(ValueError, match=r"task.target is empty in \d of \d rows; fill or drop these rows, or set"):
        Seq2Seq(str(tmp_path / "train.jsonl"), source="a", target="{b}").load(model, 0)
