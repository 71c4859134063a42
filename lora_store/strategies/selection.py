"""The best adapter alone. Source: LoraRetriever (ACL Findings 2024)."""

from lora_store.strategies.strategy import CompositionStrategy

SELECTION = CompositionStrategy(
    name="selection",
    summary="the best adapter alone",
    adds="s B A x of the best adapter",
    most_adapters=1,
)
