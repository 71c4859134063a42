"""What a strategy is: a name, its options, how retrieved adapters get their weights, and how rows compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MAX_PLAN_ADAPTERS = 16
OptionValues = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StrategyOption:
    """A number that requests and settings may set: more than `above`, and at most `highest`."""

    name: str
    meaning: str
    default: float
    above: float
    highest: float


@dataclass(frozen=True, slots=True)
class CompositionStrategy:
    """One way to compose adapters. To add one, make it in a file of this folder and list it in `registry`.

    `summary`: what it composes. `adds`: what a linear layer adds for input x, where an adapter of weight w and scaling
    s has the matrices A and B. Rows compute (Σ w s B)(Σ w A) x if it `averages_parameters`, else Σ w s B A x; another
    sum needs code in both engines. `choose` gets the weights of the best `most_adapters` by the request's weighting,
    best first, and a value for each option. It returns their final weights, which sum to 1; 0 leaves an adapter out.
    """

    name: str
    summary: str
    adds: str
    options: tuple[StrategyOption, ...] = ()
    most_adapters: int = MAX_PLAN_ADAPTERS
    averages_parameters: bool = False
    choose: Callable[[Sequence[float], OptionValues], Sequence[float]] = lambda weights, options: weights

    def read_options(self, given: OptionValues, defaults: OptionValues) -> OptionValues:
        """Return a value for each option: the given one, or that of `defaults`, or its own default.

        Raises: ValueError if a given one is unknown or out of bounds.
        """
        known = {option.name: option for option in self.options}
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"strategy {self.name!r} has no option {name!r}; it has {', '.join(known) or 'none'}")
            if not known[name].above < value <= known[name].highest:
                limits = f"above {known[name].above:g} and at most {known[name].highest:g}"
                raise ValueError(f"{name} must be {limits}, got {value:g}")
        return {name: given.get(name, defaults.get(name, option.default)) for name, option in known.items()}
