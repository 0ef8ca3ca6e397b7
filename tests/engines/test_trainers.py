"""Trainers of transformers and TRL as clients: one base in a process, a fresh optimizer a turn, folders of their own."""

import datasets
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

import fedlora
from fedlora.engines.trainers import ClientInfo, Trainers, count_examples, to_scores
from tests.fixtures.federation import same
from tests.fixtures.own_trainers import Loop, QuietTrainer, arguments, bert, lora, peft_bert, sampled, words

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "yes", "no", "up", "down", "red", "blue", "one", "two"]
QUIET = {
    "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True,
    "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "dataloader_pin_memory": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlamaConfig(**sizes, vocab_size=len(vocabulary), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def reads(monkeypatch):
    """How often weights are read from a disk."""
    found, load = [], PreTrainedModel._load_pretrained_model

    def counted(*args, **settings):
        found.append(1)
        return load(*args, **settings)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(counted))
    return found


# -------------------------------------------------------------------------------------------------------- TRL
def texts(client):
    """Rows of text of a client, of unequal numbers."""
    return [" ".join(WORDS[(client + i + k) % len(WORDS)] for k in range(6)) for i in range(8 + 4 * client)]


def sft(llama, folder, made):
    from trl import SFTConfig, SFTTrainer

    def make(client):
        rows = datasets.Dataset.from_dict({"text": texts(client.number)})
        args = SFTConfig(str(folder), max_length=16, model_init_kwargs={"dtype": "float32"}, **QUIET)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        made[client.number] = SFTTrainer(llama, args, train_dataset=rows, eval_dataset=rows, peft_config=config)
        return made[client.number]

    return make


def dpo(llama, folder, made):
    from trl import DPOConfig, DPOTrainer

    def make(client):
        pairs = {"prompt": texts(client.number), "chosen": [" yes up red one"] * (8 + 4 * client.number)}
        pairs["rejected"] = [" no down blue two"] * len(pairs["prompt"])
        rows = datasets.Dataset.from_dict(pairs)
        args = DPOConfig(str(folder), max_length=16, model_init_kwargs={"dtype": "float32"}, **QUIET)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        made[client.number] = DPOTrainer(llama, args=args, train_dataset=rows, eval_dataset=rows, peft_config=config)
        return made[client.number]

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "method"), [(sft, "fedsa-lora"), (sft, "flora"), (dpo, "fedsa-lora")])
def test_trainers_of_trl(kind, method, llama, tmp_path, reads):
    pytest.importorskip("trl")
    made, out = {}, tmp_path / "run"
    run = fedlora.federate(kind(llama, tmp_path / "o", made), 3, method, 3, out=out)
    assert len(reads) == 1, "the weights are read once"
    assert len({id(trainer.model) for trainer in made.values()}) == 1
    first, last = (run.records[i]["clients"]["mean"] for i in (0, -1))
    assert last < first, "the loss on the clients' rows falls"
    assert all(set(record["loss"]) == {0, 1, 2} for record in run.records)
    again = fedlora.federate(kind(llama, tmp_path / "p", {}), 3, method, 3)
    assert same(again.shared, run.shared), "the same bits"
    assert len(fedlora.open(out).records) == 3
    if method == "fedsa-lora":
        assert not torch.equal(*(next(iter(run.kept[k].values()))["B"] for k in (0, 1)))


@pytest.mark.filterwarnings("ignore")
def test_dpo_compares_with_the_base_without_the_adapter(llama, tmp_path):
    """Its reference is the model with the adapter off, which is not the pretrained one if the base has updates."""
    pytest.importorskip("trl")
    made = {}
    make = dpo(llama, tmp_path, made)
    run = fedlora.federate(make, 2, "fedit", 2)
    start = make(ClientInfo(0, 2, 0)).evaluate()["eval_loss"]
    assert start == pytest.approx(0.6931, abs=1e-3), "log 2: no adapter and its reference are equal"
    assert run.records[-1]["clients"]["mean"] < start
    for method in ("flora", "fedex-lora"):
        with pytest.raises(ValueError, match="called without its adapter, as DPO does for its reference, .* ref_model"):
            fedlora.federate(dpo(llama, tmp_path, {}), 2, method, 2)


# -------------------------------------------------------------------------------------------------- transformers
def test_seq2seq(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8, "vocab_size": 40}
    base = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0))
    config = peft.LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    network = peft.get_peft_model(base, config)

    class Quiet(Seq2SeqTrainer):
        def evaluate(self, *args, **settings):
            assert self.args.predict_with_generate
            return super().evaluate(*args, **settings)

    def make(client):
        ids = words(client.number)[0].ids
        rows = [{"input_ids": row, "labels": row.flip(0)} for row in ids]
        args = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, generation_max_length=4, **QUIET)
        return Quiet(client.model or network, args, train_dataset=rows, eval_dataset=rows[:4])

    run = fedlora.federate(make, 3, "fedrot-lora", 2)
    assert run.records[-1]["clients"]["mean"] < run.records[0]["clients"]["mean"]


def test_networks_by_name_share_their_weights(tmp_path, reads):
    bert().save_pretrained(tmp_path / "base")
    made = {}

    def make(client):
        network = type(bert()).from_pretrained(tmp_path / "base")
        made[client.number] = network
        network = peft.get_peft_model(network, lora())
        return QuietTrainer(network, arguments(tmp_path), train_dataset=words(client.number)[0])

    reads.clear()
    fedlora.federate(make, 3, "flora", 2)
    assert len(reads) == 1 and len(made) == 3
    weights = [made[k].bert.encoder.layer[0].output.dense.weight for k in range(3)]
    assert len({x.data_ptr() for x in weights}) == 1


def test_a_turn_does_not_depend_on_the_order_of_clients(tmp_path):
    """Each client alone, in another process, would end its turn with the same bits."""
    ends = []
    for order in ((0, 1), (1, 0)):
        trainers = Trainers(sampled(tmp_path, lambda: peft_bert()), 2, 3)
        model, found = trainers.model, {}
        f = fedlora.Session(peft_bert(), "fedit", 2, seed=3)._federation
        start = model.initial(3)
        for client in order:
            turn = trainers.build_turn(f.turn(0, client), 1, None, lambda: None)
            everything = {path: part.adapter.trainable for path, part in model.parts.items()}
            found[client] = turn.fit(start, everything, f.rules)
        ends.append(found)
    assert all(same(ends[0][k], ends[1][k]) for k in (0, 1))


# ---------------------------------------------------------------------------------------------- rows and scores
def test_numbers_of_rows():
    class Some:
        examples = 7

    class None_:  # noqa: N801
        train_dataset = iter([])

    assert count_examples(Some(), 0) == 7
    assert count_examples(Loop(None, None, [1, 2]), 0) == 2
    with pytest.raises(ValueError, match="client 3 trains on; give its trainer an attribute examples"):
        count_examples(None_(), 3)
    Some.examples = 0
    with pytest.raises(ValueError, match="client 3 has 0 training rows"):
        count_examples(Some(), 3)


def test_scores_of_a_function():
    scores = to_scores({"share": 0.5, "hits": (3, 4), "loss": torch.tensor(0.25)}, 0)
    assert scores.sums == {"share": (0.5, 1), "hits": (3.0, 4), "loss": (0.25, 1)}
    for value in (float("inf"), (1.0, 0), float("nan")):
        with pytest.raises(ValueError, match="return a finite number, or a sum over rows and their number"):
            to_scores({"loss": value}, 0)
