"""The base model and its LoRA layers, which both engines use."""
