"""PEFT folders, merged models, aggregated adapters, model cards and chat."""
