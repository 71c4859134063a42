"""The worker: one base model, a bank of adapters, and the engine that answers all prompts in one batch."""
