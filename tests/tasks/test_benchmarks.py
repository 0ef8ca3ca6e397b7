"""GSM8K, SVAMP and BIG-Bench Hard through the task's own grading: gold answers 100 %, wrong ones 0 %."""

import pytest
import torch

from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.metrics.scores import compute_metrics

pytestmark = pytest.mark.shared

SETS = {
    "gsm8k": (1319, {}, lambda gold: f" She has 7 and then some.\n#### {int(gold.rpartition('#### ')[2].replace(',', '')) + 1}"),
    "svamp": (200, {}, lambda gold: f" {gold.strip()}1"),
    "bbh": (1304, {"answer": "text", "label": "task"}, lambda gold: " (Z)" if "(" in gold else f" un{gold.strip()}"),
}  # fmt: skip


class Speaker(torch.nn.Module):
    """Writes what it is told to, row by row; its logits say nothing."""

    def __init__(self, network, tokenizer, texts):
        super().__init__()
        self.config, self.generation_config, self.weight = (
            network.config,
            network.generation_config,
            torch.nn.Parameter(torch.zeros(1)),
        )
        self.tokenizer, self.texts = tokenizer, texts

    def get_input_embeddings(self):
        return None

    def forward(self, input_ids, **more):
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 2)})

    def generate(self, input_ids, **more):
        said = self.tokenizer(self.texts, add_special_tokens=False)["input_ids"]
        width = max(map(len, said))
        return torch.cat([input_ids, torch.tensor([x + [2] * (width - len(x)) for x in said])], 1)


# The grading itself sees every row of every set in tests/tasks/test_answers.py, too, without a network around it.
SOME = [pytest.param(100, id="some"), pytest.param(None, id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("rows", SOME)
@pytest.mark.parametrize("name", SETS)
def test_gold_answers_are_right_and_others_wrong(name, rows, shared, monkeypatch):
    count, settings, wrong = SETS[name]
    count = rows or count
    place = str(shared / "models" / "stories260k-llama")
    task = CausalLM(str(shared / "data" / name), metric="exact_match", truncation_side="left", train_rows=8, test_rows=rows, **settings)  # fmt: skip
    data = task.load(place, 0)
    assert len(data.test) == count
    monkeypatch.setattr(CausalLM, "outputs", lambda self, network, batch: torch.ones(len(batch["labels"]), 3).double())
    network, golds = task.network(place, 0, 0), [text["gold"] for text in data.test.texts]
    for texts, expected in ((golds, 1.0), ([wrong(gold) for gold in golds], 0.0)):
        speaker = Speaker(network, task.preprocessor(place), texts)
        with torch.no_grad():
            found = task.evaluate(speaker, data.test, torch.arange(count), torch.device("cpu"))
        assert compute_metrics(task.scores(found, data.test.labels))["exact_match"] == expected


@pytest.mark.parametrize(
    "name,column,settings", [("gsm8k", "final", {}), ("svamp", "answer", {}), ("bbh", "target", {"answer": "text"})]
)
def test_a_column_of_its_own_says_the_same(name, column, settings, shared):
    place, rows = str(shared / "models" / "stories260k-llama"), {"train_rows": 8, "test_rows": 60}
    made = [
        CausalLM(
            str(shared / "data" / name),
            metric="exact_match",
            truncation_side="left",
            answer_column=where,
            **rows,
            **settings,
        )
        for where in (None, column)
    ]
    first, second = ([text["gold"] for text in task.load(place, 0).test.texts] for task in made)
    from fedlora.tasks.metrics.answers import is_correct

    assert all(is_correct(a, b, made[0].answer) for a, b in zip(first, second)) and len(first) == 60
