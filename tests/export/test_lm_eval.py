"""An export in lm-evaluation-harness: its figures on the same rows are the run's own."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedlora
from fedlora.runs.folder import RunFolder

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.shared

COLOURS = {"dog": "brown", "cat": "red", "ball": "blue", "sun": "red", "tree": "green", "boat": "blue", "bird": "blue", "house": "brown"}  # fmt: skip
CHOICES = ["red.", "blue.", "green.", "a happy brown."]
ROWS = [
    {"question": f"What color is the {thing}?", "choices": CHOICES, "answer": next(i for i, c in enumerate(CHOICES) if colour in c)}
    for thing, colour in COLOURS.items()
]  # fmt: skip
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""
TASKS = {
    "own_choices": """
task: own_choices
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_perplexity": """
task: own_perplexity
output_type: loglikelihood
doc_to_target: " {{choices[answer]}}</s>"  # here the harness adds no space
metric_list: [{metric: perplexity}]
""",
    "own_answers": """
task: own_answers
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 16, do_sample: false}
filter_list: [{name: none, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match, ignore_case: true, ignore_punctuation: true}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("lm-eval")
    for name in ("train", "test"):
        (place / "rows").mkdir(exist_ok=True)
        (place / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "tasks").mkdir()
    for name, text in TASKS.items():
        common = COMMON.format(rows=place / "rows" / "test.jsonl")
        (place / "tasks" / f"{name}.yaml").write_text(common + text)
    return place


@pytest.fixture(scope="module")
def figures(folder, shared):
    """The final figures of two runs that differ only in their metric, and the export of one of them."""
    made = {}
    for metric in ("choice_accuracy_norm", "exact_match"):
        config = {
            "rounds": 2,
            "model": {"name": str(shared / "models" / "stories260k-llama")},
            "task": {"name": "causal-lm", "data": str(folder / "rows"), "choices": "choices", "metric": metric,
                     "answer": "text", "max_new_tokens": 16, "stop": ["."]},
            "clients": {"count": 2},
            "adapter": {"name": "lora", "rank": 8, "alpha": 16},
            "method": {"name": "fedit"},
            "training": {"local_steps": 40, "batch_size": 4, "learning_rate": 1e-2},
            "evaluation": {"every": 2},
        }  # fmt: skip
        fedlora.run(config, out=str(folder / metric))
        made[metric] = RunFolder.open(folder / metric).summary["final"]["global"]
    fedlora.open(folder / "exact_match").export(folder / "adapter")
    return made


@pytest.mark.slow
def test_the_harness_finds_the_runs_own_figures(folder, figures, shared):
    model = str(shared / "models" / "stories260k-llama")
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},peft={folder / 'adapter'},dtype=float32",
         "--tasks", ",".join(TASKS), "--include_path", str(folder / "tasks"), "--device", "cpu", "--batch_size", "4",
         "--output_path", str(folder / "results.json")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    (written,) = folder.glob("results_*.json")
    harness = json.loads(written.read_text())["results"]
    own = figures["choice_accuracy_norm"]
    assert harness["own_choices"]["acc,none"] == own["choice_accuracy"]
    assert harness["own_choices"]["acc_norm,none"] == own["choice_accuracy_norm"]
    assert harness["own_answers"]["exact_match,none"] == figures["exact_match"]["exact_match"]
    # The harness' perplexity is over rows, fedlora's over tokens.
    tokenizer, tokens = AutoTokenizer.from_pretrained(model), 0
    for row in ROWS:
        prompt = f"Question: {row['question']}\nAnswer:"
        answer = f" {row['choices'][row['answer']]}</s>"
        tokens += len(tokenizer(prompt + answer)["input_ids"]) - len(tokenizer(prompt)["input_ids"])
    per_token = math.exp(math.log(harness["own_perplexity"]["perplexity,none"]) * len(ROWS) / tokens)
    assert per_token == pytest.approx(own["perplexity"], rel=1e-4)
    assert own["perplexity"] == figures["exact_match"]["perplexity"], "the metric changes no training"
    assert own["choice_accuracy"] > 0.5 and figures["exact_match"]["exact_match"] > 0, "figures that can differ"


@pytest.mark.slow
def test_flowertune_loads_the_export_as_it_is(folder, figures, shared):
    """The calls of FlowerTune's finance/eval.py, without its quantisation."""
    model = str(shared / "models" / "stories260k-llama")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = PeftModel.from_pretrained(base, str(folder / "adapter"), torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    network.resize_token_embeddings(len(tokenizer))
    network.eval()
    sums, tokens = 0.0, 0
    for row in ROWS:
        prompt = f"Question: {row['question']}\nAnswer:"
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(f"{prompt} {row['choices'][row['answer']]}</s>")["input_ids"]
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0, :, :512].double().log_softmax(-1)  # without the new token
        sums -= float(sum(logits[i - 1, ids[i]] for i in range(start, len(ids))))
        tokens += len(ids) - start
    assert math.exp(sums / tokens) == pytest.approx(figures["exact_match"]["perplexity"], rel=1e-4)
