"""The model, the rows and the training loop of a small instruction-tuning project; nothing here knows fedlora."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 32, 12
TARGETS = ["q_proj", "v_proj", "down_proj"]


def get_model(node_config=None):
    """A causal language model with an adapter on it; the base is the same everywhere, the adapter's start is not."""
    node_config = node_config or {}
    torch.manual_seed(7)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=False,
        )
    )  # fmt: skip
    torch.manual_seed(node_config.get("partition-id", 99))
    adapter = LoraConfig(
        r=node_config.get("rank", 4),
        lora_alpha=node_config.get("alpha", 8),
        target_modules=TARGETS,
        modules_to_save=["lm_head"] if node_config.get("head") else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, adapter)


def load_rows(partition):
    """Prompts and answers of one party, as token ids: each party counts in steps of its own."""
    start = torch.arange(3 + 2 * partition).unsqueeze(1)
    return (start + torch.arange(LENGTH) * (partition + 1)) % VOCABULARY


def fit(model, rows, learning_rate):
    """Four steps on all rows."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate, momentum=0.9)
    for _ in range(4):
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def measure(model, rows):
    """The mean loss on rows."""
    model.eval()
    return float(model(input_ids=rows, labels=rows).loss)
