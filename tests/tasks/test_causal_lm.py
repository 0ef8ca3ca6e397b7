"""Causal language models: what is learnt of a row, how it is cut, and the loss against a loop over rows."""

import gzip
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fedlora.tasks._base import Examples, Shard
from fedlora.tasks.causal_lm import CausalLM, check_packing
from fedlora.tasks.data.templates import fill
from fedlora.tasks.data.tokens import IGNORED, encode, flatten_tokens, pack_batch, pad_batch, truncate_rows
from fedlora.tasks.metrics.scores import compute_metrics, pool
from fedlora.training.device import checkpoint_activations
from fedlora.training.evaluation import Evaluation, Evaluator
from fedlora.training.model import Model

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
ROWS = [
    {"ask": f"Tell me about the {what}.", "say": f"The {what} is {how}.", "kind": kind, "n": number}
    for number, (what, how, kind) in enumerate(
        [("dog", "big and brown", "a"), ("cat", "happy", "b"), ("red ball that Tom had", "lost", "a"), ("sun", "up", "b")] * 5
    )
]  # fmt: skip

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def model(shared):
    return str(shared / "models" / "stories260k-llama")


@pytest.fixture(scope="module")
def network(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def write(folder, rows, test=None):
    for split, some in (("train", rows), ("test", test or rows[:6])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return str(folder)


def task(folder, rows=ROWS, **settings):
    own = {"prompt": "Q: {ask}\nA:", "response": " {say}"} if "ask" in rows[0] else {}
    return CausalLM(write(folder, rows, settings.pop("test", None)), **{**own, **settings})


def learnt(examples, row, model):
    """A row's text, and what of it is learnt."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = pad_batch(examples, torch.tensor([row]))
    mask = batch["labels"][0] != IGNORED
    return tokenizer.decode(batch["input_ids"][0]), tokenizer.decode(batch["input_ids"][0][mask])


def test_only_the_response_and_the_end_are_learnt(tmp_path, model):
    found = task(tmp_path).load(model, 0)
    assert learnt(found.train, 1, model) == (
        "<s> Q: Tell me about the cat.\nA: The cat is happy.</s>",
        "The cat is happy.</s>",
    )
    assert found.label_names == () and found.notes == ()


def test_the_loss_is_that_of_a_loop_over_rows(tmp_path, model, network):
    """Each row by itself, tokenised and masked here, through transformers' own loss."""
    made = task(tmp_path)
    examples = made.load(model, 0).train
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, sums, count, right = torch.tensor([0, 1, 2, 3, 6]), [], [], []
    for i in rows.tolist():
        ids = tokenizer(f"Q: {ROWS[i]['ask']}\nA: {ROWS[i]['say']}")["input_ids"] + [2]
        start = len(tokenizer(f"Q: {ROWS[i]['ask']}\nA:")["input_ids"])
        labels = torch.tensor([[IGNORED] * start + ids[start:]])
        with torch.no_grad():
            out = network(input_ids=torch.tensor([ids]), labels=labels)
            logits = out.logits[0].double().log_softmax(-1)
        told = [(logits[at - 1, ids[at]], logits[at - 1].argmax() == ids[at]) for at in range(start, len(ids))]
        sums.append(-float(sum(x for x, _ in told)))
        right.append(int(sum(hit for _, hit in told)))
        count.append(len(told))
        assert float(out.loss) == pytest.approx(sums[-1] / count[-1], rel=1e-5), "transformers agrees with the loop"
    batch = made.collate(examples, rows)
    assert made.loss(network, batch).item() == pytest.approx(sum(sums) / sum(count), rel=1e-5)
    with torch.no_grad():
        outputs = made.outputs(network, batch)
    assert outputs.tolist() == [[pytest.approx(s, rel=1e-5), c, r] for s, c, r in zip(sums, count, right)]
    scores = compute_metrics(made.scores(outputs, examples.labels[rows]))
    assert torch.equal(made.evaluate(network, examples, rows, torch.device("cpu")), outputs)
    assert scores["perplexity"] == pytest.approx(torch.tensor(sum(sums) / sum(count)).exp().item(), rel=1e-5)
    assert scores["token_accuracy"] == pytest.approx(sum(right) / sum(count))


@pytest.mark.parametrize("width", [72, 100, 512])
def test_packing_changes_no_loss_and_no_gradient(tmp_path, model, network, width):
    examples = task(tmp_path).load(model, 0).train
    rows, found = torch.arange(16), {}
    for name, batch in (("padded", pad_batch(examples, rows)), ("packed", pack_batch(examples, rows, width))):
        network.zero_grad()
        loss = CausalLM("unread").loss(network, batch)
        loss.backward()
        weight = network.model.layers[0].self_attn.q_proj.weight
        found[name] = (loss.detach(), weight.grad.clone(), (batch["labels"] != IGNORED).sum(), batch["input_ids"].shape)
    torch.testing.assert_close(found["packed"][:3], found["padded"][:3], atol=1e-6, rtol=1e-5)
    assert found["packed"][3][0] < 16 and found["packed"][3][1] <= width
    if width == 72:
        assert found["packed"][3][0] > 2


def test_packed_rows_do_not_see_each_other(tmp_path, model, network):
    examples = task(tmp_path).load(model, 0).train
    batch = pack_batch(examples, torch.tensor([0, 1]), 512)
    assert batch["input_ids"].shape[0] == 1
    (begin,) = (batch["position_ids"][0] == 0).nonzero()[1:, 0].tolist()
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
        before = network(**inputs, use_cache=False).logits[0, begin:]
        other = inputs | {"input_ids": inputs["input_ids"].clone()}
        other["input_ids"][0, 1:begin] = 77
        assert torch.equal(network(**other, use_cache=False).logits[0, begin:], before)


def test_a_first_token_is_learnt_from_nothing_and_so_not_at_all(model, network):
    """Without a start token, as with many tokenizers: else packing would learn it from the row before."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = encode([[("", False), (f"Number {i} is here.", True)] for i in range(4)], tokenizer, special=False)
    assert all(
        row.ids[0] != tokenizer.bos_token_id and row.learnt == [False] + [True] * (len(row.ids) - 1) for row in rows
    )
    cut_rows, _ = truncate_rows(rows, 6, "left", tokenizer.bos_token_id)
    assert all(row.learnt == [False] + [True] * 5 for row in cut_rows)
    features, lengths = flatten_tokens(rows, 0)
    examples = Examples(features, torch.zeros(4, dtype=torch.int64), lengths)
    losses = [
        CausalLM("x").loss(network, batch(examples, torch.arange(4))).item()
        for batch in (pad_batch, lambda e, r: pack_batch(e, r, 99))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_network_that_would_mix_packed_rows_is_refused(network, monkeypatch):
    check_packing(network)
    check_packing(
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1))
    )
    forward = type(network).forward
    monkeypatch.setattr(
        type(network), "forward", lambda self, input_ids, position_ids=None, **more: forward(self, input_ids, **more)
    )
    with pytest.raises(ValueError, match=r"see each other in LlamaForCausalLM; set task.packing = false"):
        check_packing(network)
    monkeypatch.setattr(type(network), "forward", lambda self, input_ids, use_cache: forward(self, input_ids))
    with pytest.raises(ValueError, match="see each other"):
        check_packing(network)


def test_networks_that_do_not_look_at_positions_are_refused():
    """Mamba carries a state over the rows; BLOOM's attention goes by distance, and as drawn hardly by anything."""
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    for small in (
        MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)),
        BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)),
    ):
        with pytest.raises(ValueError, match=f"see each other in {type(small).__name__}"):
            check_packing(small)


def test_plain_text_is_learnt_whole(tmp_path, model):
    rows = [{"text": f"Once upon a time number {i}."} for i in range(8)]
    for made in (task(tmp_path, rows), task(tmp_path, rows, text="text")):
        whole, told = learnt(made.load(model, 0).train, 3, model)
        assert whole == "<s> Once upon a time number 3.</s>" and told == "Once upon a time number 3.</s>"


@pytest.mark.parametrize(
    "row,text,told",
    [
        ({"instruction": "Do it", "context": "", "response": "Done"},
         "<s> ### Instruction:\nDo it\n\n### Response:\nDone</s>", "Done</s>"),
        ({"instruction": "Do it", "context": "Here", "response": "Done"},
         "<s> ### Instruction:\nDo it\n\n### Context:\nHere\n\n### Response:\nDone</s>", "Done</s>"),
        ({"instruction": "Do it", "input": "", "output": "Done"},
         "<s> ### Instruction:\nDo it\n\n### Response:\nDone</s>", "Done</s>"),
        ({"question": "Who?", "equation": "1", "answer": 5.0}, "<s> Question: Who?\nAnswer: 5</s>", "5</s>"),
        ({"prompt": "a\n", "completion": "b"}, "<s> a\nb</s>", "b</s>"),
        ({"task": "t", "input": "x", "target": "(A)"}, "<s> Q: x\nA: (A)</s>", "(A)</s>"),
    ],
)  # fmt: skip
def test_usual_columns(tmp_path, model, row, text, told):
    found = learnt(task(tmp_path, [row] * 6).load(model, 0).train, 0, model)
    assert found == (text, told)


def test_templates():
    assert fill("{a}\n\n{b}", {"a": "", "b": "x"}) == "x"
    assert fill("A\n\n{a} and {b}\n\n{{{b}}}", {"a": "1", "b": ""}) == "A\n\n1 and \n\n"


def test_chat_messages(tmp_path, model):
    rows = [
        {"messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": f"Hi {i}"},
                      {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "More"},
                      {"role": "assistant", "content": "Bye"}, {"role": "user", "content": "unanswered"}]}
        for i in range(6)
    ]  # fmt: skip
    whole, told = learnt(task(tmp_path, rows, chat_template=CHAT).load(model, 0).train, 2, model)
    whole, told = whole.replace("</s> \n", "</s>\n"), told.replace("</s> \n", "</s>\n")  # how it is decoded
    assert (
        whole
        == "<|system|>Be kind</s>\n<|user|>Hi 2</s>\n<|assistant|>Hello</s>\n<|user|>More</s>\n<|assistant|>Bye</s>\n"
    )
    assert told == "Hello</s>\nBye</s>\n"
    whole, told = learnt(task(tmp_path, rows, chat_template=CHAT.replace("</s>", "")).load(model, 0).train, 2, model)
    assert told == "Hello\nBye\n</s>", "the template ends no turn, so the end is added"


@pytest.mark.parametrize(
    "messages,template,sentence",
    [
        ([{"role": "assistant", "content": "x"}], None, "has no chat template.*set task.chat_template, or set task.prompt"),
        ([{"role": "user", "content": "x"}], CHAT, "nothing is left to learn in any of the 6 training rows.*give the rows answers by 'assistant'"),
        ("x", CHAT, "is no list of messages; each needs a role and a content"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}], "{{ raise_exception('roles must alternate') }}", "does not take row 0.*roles must"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 2, "{{ messages[-1].content }}",
         "writes earlier turns of row 0.*otherwise"),
    ],
)  # fmt: skip
def test_chat_mistakes(tmp_path, model, messages, template, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(tmp_path, [{"messages": messages}] * 6, chat_template=template).load(model, 0)


def test_what_is_cut_is_said(tmp_path, model):
    rows = [
        *ROWS[:4],
        {"ask": "Why? " * 12, "say": "No.", "kind": "a"},
        {"ask": "Why?", "say": "No. " * 30, "kind": "a"},
    ]
    settings = {"rows": rows, "test": ROWS[:2], "max_length": 48}
    with pytest.raises(
        ValueError, match=r"nothing is left to learn in 1 of 6 training rows within task.max_length = 48"
    ):
        task(tmp_path, **settings).load(model, 0)
    found = task(tmp_path, truncation_side="left", **settings).load(model, 0)
    assert found.notes == (
        "2 of 6 training rows were cut to 48 tokens on the left: the prompt in 2, the response in 1.",
    )
    assert found.train.lengths.max() == 48
    whole, told = learnt(found.train, 4, model)
    assert whole.startswith("<s>") and whole.endswith("\nA: No.</s>") and told == "No.</s>"
    rows = [*ROWS[:4], rows[5]]
    right = task(tmp_path, rows, test=ROWS[:2], max_length=48).load(model, 0)
    assert right.notes == (
        "1 of 5 training rows were cut to 48 tokens on the right: the prompt in 0, the response in 1.",
    )


def test_more_than_the_model_reads(tmp_path, model):
    rows = [*ROWS[:4], {"ask": "Why? " * 300, "say": "No.", "kind": "a"}]
    with pytest.raises(
        ValueError,
        match="reads at most 512 tokens, and 1 of 5 training rows would have more; set task.max_length to 512",
    ):
        task(tmp_path, rows, test=ROWS[:2], max_length=5000).load(model, 0)
    with pytest.raises(ValueError, match="task.max_new_tokens is 600, but the model reads at most 512"):
        task(tmp_path, metric="exact_match", answer="text", max_new_tokens=600).load(model, 0)


def test_splits_go_by_a_category(tmp_path, model):
    found = task(tmp_path, label="kind").load(model, 0, "n")
    assert found.train.partition_labels.tolist() == [0, 1] * 10 and found.test.partition_labels.tolist() == [0, 1] * 3
    assert found.train.groups[:2] == ("0", "1") and found.train.labels.unique().tolist() == [0]


@pytest.mark.parametrize("split", ["dirichlet", "pathological"])
def test_a_split_by_label_needs_one(tmp_path, model, split):
    from fedlora.engines.clients import Clients

    clients = Clients(2, partition={"name": split})
    with pytest.raises(
        ValueError, match=f"'{split}', which partitions by label, but all rows have the same; set task.label"
    ):
        clients.shards(task(tmp_path).load(model, 0), 0)
    shards = clients.shards(task(tmp_path, label="kind").load(model, 0), 0)
    assert sum(len(shard.train) for shard in shards) == len(ROWS)


def test_checkpointed_activations_change_nothing(tmp_path, model):
    made = task(tmp_path)
    examples, grads = made.load(model, 0).train, []
    for checkpointed in (False, True):
        network = made.network(model, 0, 0)
        if checkpointed:
            checkpoint_activations(network)
        network.train()
        made.loss(network, made.collate(examples, torch.arange(4))).backward()
        grads.append(network.model.layers[1].self_attn.v_proj.weight.grad)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


ANSWERS = [{"question": f"What is {i} and {i}?", "answer": f"{i} and {i} is {2 * i}.\n#### {2 * i}", "final": str(2 * i)} for i in range(20)]  # fmt: skip


class Oracle(torch.nn.Module):
    """A network whose most likely text is the right answer, in some rows."""

    def __init__(self, network, tokenizer, replies):
        super().__init__()
        self.network, self.tokenizer, self.replies = network, tokenizer, replies
        self.config, self.generation_config = network.config, network.generation_config
        self.seen = []

    def get_input_embeddings(self):
        return self.network.get_input_embeddings()

    def forward(self, **inputs):
        return self.network(**inputs)

    def generate(self, input_ids, attention_mask, **more):
        prompts = [self.tokenizer.decode(x[m.bool()]) for x, m in zip(input_ids, attention_mask)]
        self.seen += prompts
        said = [self.tokenizer(self.replies(p), add_special_tokens=False)["input_ids"] for p in prompts]
        width = max(map(len, said))
        return torch.cat([input_ids, torch.tensor([x + [0] * (width - len(x)) for x in said])], 1)


def last_question(prompt):
    return int(prompt.rpartition("What is ")[2].split()[0])


@pytest.mark.parametrize("shots", [0, 2])
def test_exact_match(tmp_path, model, network, shots):
    made = task(tmp_path, ANSWERS, metric="exact_match", shots=shots, max_new_tokens=20)
    data = made.load(model, 0)
    tokenizer = made.preprocessor(model)
    oracle = Oracle(
        network,
        tokenizer,
        lambda p: f" so {2 * last_question(p) + last_question(p) % 2}." + "\n\nQuestion: 7" * (shots > 0),
    )
    rows = torch.arange(6)
    with torch.no_grad():
        found = made.evaluate(oracle, data.test, rows, torch.device("cpu"))
    assert found[:, 3].tolist() == [1, 0, 1, 0, 1, 0]
    assert compute_metrics(made.scores(found, data.test.labels))["exact_match"] == 0.5
    assert found.shape == (6, 4) and oracle.seen[3].endswith("Question: What is 3 and 3?\nAnswer:")
    assert [p.count("####") for p in oracle.seen] == [shots] * 6
    again = made.load(model, 1)
    assert (again.test.texts[0]["prompt"] == data.test.texts[0]["prompt"]) == (shots == 0), (
        "the seed draws the examples"
    )


def test_exact_match_of_the_last_answer_of_a_conversation(tmp_path, model, network):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 9"},
                      {"role": "user", "content": f"What is {i} and {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]}
        for i in range(6)
    ]  # fmt: skip
    made = task(tmp_path, rows, metric="exact_match", chat_template=CHAT)
    data = made.load(model, 0)
    assert data.test.texts[2]["gold"].startswith("It is 4.")
    assert data.test.texts[2]["prompt"].endswith(
        "<|assistant|>Hello 9</s>\n<|user|>What is 2 and 2?</s>\n<|assistant|>"
    )
    oracle = Oracle(
        network, made.preprocessor(model), lambda p: f"It is {2 * last_question(p)}." if last_question(p) else "9"
    )
    with torch.no_grad():
        assert made.evaluate(oracle, data.test, torch.arange(6), torch.device("cpu"))[:, 3].tolist() == [
            0,
            1,
            1,
            1,
            1,
            1,
        ]
    with pytest.raises(ValueError, match="leave it out with messages"):
        task(tmp_path, rows, metric="exact_match", chat_template=CHAT, shots=1).load(model, 0)


def test_more_shots_than_rows(tmp_path, model):
    with pytest.raises(ValueError, match=r"but there are only \d+ training rows; lower task.shots\.$"):
        task(tmp_path, metric="exact_match", answer="text", shots=1000).load(model, 0)


def test_shots_come_from_the_rows_own_category(tmp_path, model):
    made = task(tmp_path, metric="exact_match", answer="text", shots=3, label="kind")
    for row, found in zip(ROWS, made.load(model, 0).test.texts):
        topics = ("dog", "red ball") if row["kind"] == "a" else ("cat", "sun")
        assert sum(found["prompt"].count(f"the {t}") for t in topics) >= 4
        assert not any(f"the {t}" in found["prompt"] for t in {"dog", "red ball", "cat", "sun"} - set(topics))
    with pytest.raises(ValueError, match="there are only 10 training rows of the same task.label"):
        task(tmp_path, metric="exact_match", answer="text", shots=11, label="kind").load(model, 0)


def test_prompts_that_do_not_fit_lose_their_beginning_and_that_is_said(tmp_path, model):
    found = task(tmp_path, metric="exact_match", answer="text", shots=8, max_new_tokens=400).load(model, 0)
    assert found.notes == ("6 of 6 prompts were longer than 112 tokens and lost their beginning.",)
    tokens = found.test.features["prompt_offsets"].diff()
    assert tokens.tolist() == [112] * 6
    assert found.test.features["prompts"][found.test.features["prompt_offsets"][:-1]].tolist() == [1] * 6


@pytest.mark.parametrize(
    "settings,sentence",
    [
        (
            {"answer_column": "final"},
            r"column 'final' .* has no number in 1 of 3 test rows, first in row 2: 'many'; correct",
        ),
        ({"answer_column": "lost"}, "no column 'lost'"),
        (
            {"response": " {final}", "prompt": "{question}"},
            r"the response has no number in 1 of 3 test rows, first in row 2: 'many'",
        ),
    ],
)
def test_answers_without_a_number(tmp_path, model, settings, sentence):
    test = [*ANSWERS[:2], ANSWERS[2] | {"final": "many"}]
    with pytest.raises(ValueError, match=sentence):
        task(tmp_path, ANSWERS, test=test, metric="exact_match", **settings).load(model, 0)


@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({"prompt": "a"}, "task.prompt is set without task.response"),
        ({"text": "a", "messages": "b"}, "task.messages and task.text are both set"),
        ({"max_length": 1}, "at least 2"),
        ({"shots": -1}, "task.shots is -1"),
        ({"metric": "accuracy"}, "'perplexity' or 'token_accuracy' or 'exact_match'"),
        ({"metric": "exact_match", "text": "a"}, "plain text asks nothing"),
        ({"messages": "a", "shots": 2}, "leave it out with messages"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_settings_that_contradict(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        CausalLM("x", **settings)


@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({"prompt": "{lost}", "response": "{say}"}, r"no column 'lost' \(task.prompt\)"),
        ({"prompt": "{ask", "response": "{say}"}, "braces do not match"),
        ({"prompt": "ask", "response": "nothing {{x}}"}, "names no column"),
        ({"prompt": None, "response": None}, "no prompt and response were found among ask, say, kind, n"),
    ],
)
def test_columns_that_are_not_there(tmp_path, model, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(tmp_path, **settings).load(model, 0)


def test_empty_responses(tmp_path, model):
    with pytest.raises(ValueError, match="task.response is empty in 1 of 5 rows"):
        task(tmp_path, [*ROWS[:4], ROWS[4] | {"say": " "}]).load(model, 0)


def test_models_of_another_kind(shared):
    with pytest.raises(ValueError, match="of the kind 'vit', which AutoModelForCausalLM does not load"):
        CausalLM("x").network(str(shared / "models" / "vit-mini-cifar10"), 0, 0)
    with pytest.raises(ValueError, match="lacks .* weights of BertLMHeadModel"):
        CausalLM("x").network(str(shared / "models" / "minilm-l3-h384-v8k"), 0, 0)


def test_pooled_perplexity_is_that_of_all_tokens(tmp_path, model):
    from fedlora.adapters import LoRA

    made = task(tmp_path)
    data = made.load(model, 0)
    attached = Model.attach(made.network(model, 0, 0), LoRA(2, 4))
    assert not any("lm_head" in path for path in attached.parts) and len(attached.parts) == 10
    shards = [Shard(torch.arange(2), torch.tensor(rows)) for rows in ([0], [1, 2, 3, 4, 5])]
    evaluator, tree = Evaluator(attached, made, data.test, shards, Evaluation(batch_size=4)), attached.initial(0)
    each = [evaluator.score_client(k, tree) for k in (0, 1)]
    everyone = evaluator.score_all(tree)
    assert compute_metrics(pool(each))["perplexity"] == pytest.approx(compute_metrics(everyone)["perplexity"], rel=1e-9)
    assert compute_metrics(pool(each))["perplexity"] != pytest.approx(
        sum(compute_metrics(s)["perplexity"] for s in each) / 2, rel=1e-3
    )
