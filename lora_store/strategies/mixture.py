"""The weighted sum of the adapters' outputs. Source: LoraRetriever (ACL Findings 2024)."""

from lora_store.strategies.strategy import CompositionStrategy

MIXTURE = CompositionStrategy(
    name="mixture",
    summary="the weighted sum of the adapters' outputs",
    adds="Σ w s B A x",
)
