"""The mixture of the heaviest adapters, as top-p sampling keeps the likeliest tokens.

Source: Holtzman et al., The Curious Case of Neural Text Degeneration (2020), section 3.1, for tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_store.strategies.strategy import CompositionStrategy, OptionValues, StrategyOption

_ROUNDING = 1e-9  # sums are exact up to this
_KEPT_WEIGHT = StrategyOption(
    name="kept_weight",
    meaning="The heaviest adapters are kept until their weights sum to this.",
    default=0.9,
    above=0.0,
    highest=1.0,
)


def _keep_heaviest(weights: Sequence[float], options: OptionValues) -> Sequence[float]:
    """Return the weights of the fewest heaviest adapters whose sum reaches the option, scaled to the sum 1."""
    kept: list[int] = []
    total = 0.0
    for place in sorted(range(len(weights)), key=lambda place: -weights[place]):
        if total >= options[_KEPT_WEIGHT.name] - _ROUNDING:
            break
        kept.append(place)
        total += weights[place]
    return [weight / total if place in kept else 0.0 for place, weight in enumerate(weights)]


TOP_P_MIXTURE = CompositionStrategy(
    name="top_p_mixture",
    summary="the mixture of the heaviest adapters",
    adds="Σ w s B A x of the heaviest, their w scaled to the sum 1",
    options=(_KEPT_WEIGHT,),
    choose=_keep_heaviest,
)
