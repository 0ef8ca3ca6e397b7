"""The model card of an export, in the form of the Hugging Face Hub."""

from collections.abc import Mapping
from typing import Any

from fedlora.runs.attendance import fault_lines
from fedlora.runs.config import Config
from fedlora.schema import dumps, strip_folders
from fedlora.security.privacy import Privacy

ADAPTER = """```python
{first}from peft import PeftModel
from transformers import {auto}

{second}base = {auto}.from_pretrained({base!r}{labels})
model = PeftModel.from_pretrained(base, "this folder")
```"""
LABELLED = {  # JSON's keys are strings
    "first": "import json\n\n",
    "second": """with open("this folder/labels.json") as file:
    id2label = {int(number): name for number, name in json.load(file)["id2label"].items()}
label2id = {name: number for number, name in id2label.items()}
""",
    "labels": ", id2label=id2label, label2id=label2id, ignore_mismatched_sizes=True",
}
MERGED = """```python
from transformers import {auto}

model = {auto}.from_pretrained("this folder")
```"""


UPDATE = """```python
import fedlora

model = fedlora.load_update(model, "this folder")  # model: the network of the run, with its pretrained weights
```

Without fedlora: `update.safetensors` has `NAME/A` (rank x inputs) and `NAME/B` (outputs x rank) of each adapted weight,
and all parameters of each module that was trained in full.

```python
import torch
from safetensors.torch import load_file

update = load_file("this folder/update.safetensors")
with torch.no_grad():
    for name, value in update.items():
        module, _, leaf = name.rpartition("/")
        if leaf == "A":
            model.get_submodule(module).weight += update[module + "/B"] @ value  # transposed for a Conv1D
        elif leaf != "B":
            getattr(model.get_submodule(module), leaf).copy_(value)
```"""


AUTO = {  # the class of transformers for PEFT's task type
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}  # fmt: skip


def write_card(
    config: Config, summary: Mapping[str, Any], about: Mapping[str, Any], merged: bool,
    peft: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Return Markdown with the Hub's front matter: method, clients, rounds, bytes, seed, scores and errors.

    ``peft`` is the configuration of the adapter, if the run trained a model of PEFT in a loop of the caller.
    """
    model = "the shared model" if about["client"] is None else f"client {about['client']}'s own model"
    parts = LABELLED if summary["labels"] and not config.task.brings_head else dict.fromkeys(LABELLED, "")
    own = config.task.is_own_code and not peft
    use = UPDATE if own else (MERGED if merged else ADAPTER)
    auto, base = config.task.auto, config.model.name
    if peft:
        auto, base = AUTO.get(peft.get("task_type") or "", "AutoModel"), peft.get("base_model_name_or_path") or base
    use = use.format(auto=auto, base=base, **parts)
    front = [
        "---", *([] if own else [f"base_model: {strip_folders(base)}"]),
        "library_name: " + ("fedlora" if own else "transformers" if merged else "peft"),
        "tags:", "- fedlora", "- federated-learning", *([] if merged else ["- lora"]), "---",
    ]  # fmt: skip
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(config, summary, about))
    title = f"# {summary['title'] or summary['method']}: {model}"
    settings = f"```toml\n{dumps(strip_folders(config.table)).strip()}\n```"
    return "\n".join(
        [*front, "", title, "", "| | |", "|---|---|", rows, "", "## Use", "", use, "", "## Settings", "", settings, ""]
    )


def _rows(config: Config, summary: Mapping[str, Any], about: Mapping[str, Any]) -> list[tuple[str, str]]:
    final, metric = summary.get("final", {}), summary["metric"]["name"]
    up, down = (sum(summary["bytes"][direction].values()) / 1e6 for direction in ("up", "down"))
    rows = [
        ("method", f"{summary['title']} (`{summary['method']}`)"),
        ("clients", f"{summary['clients']}, split {config.clients.partitioner}"),
        ("rounds", str(summary["rounds"]) + (" (interrupted)" if summary["interrupted"] else "")),
        ("seed", str(summary["seed"])),
        ("sent by all clients", f"{up:.2f} MB up, {down:.2f} MB down"),
        ("ranks", ", ".join(map(str, about["ranks"]))),
    ]
    rows += fault_lines(summary)
    rows += Privacy.describe(summary["privacy"]) if "privacy" in summary else []
    if about["error"]:
        rows.append(("lost by cutting the rank", f"{about['error']:.2e} of the updates (Frobenius)"))
    if "served" in summary["errors"]:
        rows.append(("aggregation error", f"{summary['errors']['served']:.2e}, mean over weights and rounds"))
    if about["client"] is None and "global" in final:
        rows.append((f"{metric.replace('_', ' ')}, global test rows", f"{final['global'][metric]:.4f}"))
    if about["client"] is not None and "clients" in final:
        score = final["clients"]["each"][about["client"]]
        if score is not None:
            rows.append((f"{metric.replace('_', ' ')}, the client's test rows", f"{score:.4f}"))
    return [*rows, ("made with", "fedlora " + summary["versions"]["fedlora"])]
