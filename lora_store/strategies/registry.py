"""The strategies by name. Plans, requests, settings, commands, the console and the docs read their names here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lora_store.strategies.fusion import FUSION
from lora_store.strategies.mixture import MIXTURE
from lora_store.strategies.selection import SELECTION
from lora_store.strategies.strategy import CompositionStrategy

_BASE = CompositionStrategy(name="base", summary="no adapter", adds="nothing", most_adapters=0)  # plans report it
STRATEGIES = {strategy.name: strategy for strategy in (_BASE, SELECTION, MIXTURE, FUSION)}
ROUTED_STRATEGIES = tuple(name for name, strategy in STRATEGIES.items() if strategy.most_adapters)
if TYPE_CHECKING:
    Strategy = str
    RoutedStrategy = str
else:  # the names, for what reads annotations at run time: validation, schemas and the command
    Strategy = Literal[tuple(STRATEGIES)]
    RoutedStrategy = Literal[ROUTED_STRATEGIES]
