"""The average of the adapters' parameters. Source: LoraRetriever (ACL Findings 2024)."""

from lora_store.strategies.strategy import CompositionStrategy

FUSION = CompositionStrategy(
    name="fusion",
    summary="the average of the adapters' parameters",
    adds="(Σ w s B)(Σ w A) x",
    averages_parameters=True,
)
