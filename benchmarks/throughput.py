"""The engine beside transformers' generate, by strategy, active adapters and batch: `python -m benchmarks.throughput`.

Every round runs generate and each of the engine's cases once, so that all of a round meet the same machine.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated

import typer

from benchmarks import plots
from benchmarks.engine_cases import (
    NUM_NEW,
    NUM_ROWS,
    Loaded,
    Quick,
    console,
    generate,
    plain_model,
    plans,
    rounds_within,
    shown,
    table_of,
)
from benchmarks.literal_einsum import literal_mixture
from benchmarks.results_file import write_results
from lora_store import Strategy

NUM_ADAPTERS, WARM_TOKENS = 96, 4


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table. `literal`: by the paper's einsum."""

    num_rows: int
    strategy: Strategy
    num_active: int
    literal: bool = False

    @property
    def what(self) -> str:
        kind = "literal einsum" if self.literal else self.strategy
        return kind if self.strategy == "base" else f"{kind} {self.num_active}"

    @property
    def name(self) -> str:
        return f"{self.what} x{self.num_rows}"


CASES = (
    Case(NUM_ROWS, "base", 0),
    Case(NUM_ROWS, "selection", 8),
    Case(NUM_ROWS, "mixture", 8),
    Case(NUM_ROWS, "mixture", 32),
    Case(NUM_ROWS, "mixture", 96),
    Case(NUM_ROWS, "fusion", 8),
    Case(NUM_ROWS, "mixture", 8, literal=True),
    Case(8, "base", 0),
    Case(8, "selection", 8),
    Case(8, "mixture", 8),
    Case(8, "mixture", 8, literal=True),
    Case(1, "base", 0),
    Case(1, "selection", 1),
    Case(1, "mixture", 3),
    Case(1, "mixture", 3, literal=True),
)
BATCHES = tuple(dict.fromkeys(case.num_rows for case in CASES))

Round = dict[str, float]
"""Tokens a second by case, and by `<case> ms` the median decode step."""


class Bench:
    def __init__(self) -> None:
        self._loaded = Loaded(NUM_ADAPTERS)
        self._generate = generate(plain_model(self._loaded.config))

    def round(self, number: int, num_new: int = NUM_NEW) -> Round:
        """Every case once."""
        found: Round = {}
        for num_rows in BATCHES:
            prompts = self._loaded.prompts(number, num_rows)
            found[f"generate x{num_rows}"] = self._generate(prompts, num_new)
            for case in (case for case in CASES if case.num_rows == num_rows):
                asked = plans(case.strategy, case.num_active, num_rows)
                with literal_mixture(self._loaded.engine) if case.literal else nullcontext():
                    found[case.name], found[f"{case.name} ms"] = self._loaded.run(asked, prompts, num_new)
        gc.collect()
        return found


def figures_of(found: Sequence[Round]) -> dict[str, float]:
    """Medians over rounds of what was compared within a round, 32 rows each."""

    def median(name: str, over: str) -> float:
        return statistics.median(round_[f"{name} x{NUM_ROWS}"] / round_[f"{over} x{NUM_ROWS}"] for round_ in found)

    def extra_ms(name: str) -> float:
        return statistics.median(round_[f"{name} x{NUM_ROWS} ms"] - round_[f"base x{NUM_ROWS} ms"] for round_ in found)

    figures = {"base_over_generate": median("base", "generate")}
    figures |= {f"mixture{active}_over_generate": median(f"mixture {active}", "generate") for active in (8, 32, 96)}
    figures |= {f"lora_ms_{active}": extra_ms(f"mixture {active}") for active in (8, 32, 96)}
    figures |= {"mixture8_over_base": median("mixture 8", "base")}
    return figures | {"literal_ms_8": extra_ms("literal einsum 8")}


def table_and_medians(found: Sequence[Round]) -> tuple[str, Mapping[str, float]]:
    medians = {name: statistics.median(round_[name] for round_ in found) for name in found[0]}
    table = table_of("what", "rows", "tokens/s", "/ generate", "decode step ms")
    for num_rows in BATCHES:
        table.add_row("generate", str(num_rows), f"{medians[f'generate x{num_rows}']:.0f}", "1.00", "")
        for case in (case for case in CASES if case.num_rows == num_rows):
            ratio = statistics.median(round_[case.name] / round_[f"generate x{num_rows}"] for round_ in found)
            cells = f"{medians[case.name]:.0f}", f"{ratio:.2f}", f"{medians[f'{case.name} ms']:.0f}"
            table.add_row(case.what, str(num_rows), *cells)
        table.add_section()
    return shown(table), medians


def plot(medians: Mapping[str, float]) -> None:
    """Tokens a second by batch, for what was measured at every batch."""
    curves = {"generate": [(float(num_rows), medians[f"generate x{num_rows}"]) for num_rows in BATCHES]}
    for strategy, literal in (("base", False), ("selection", False), ("mixture", False), ("mixture", True)):
        alike = [case for case in CASES if (case.strategy, case.literal) == (strategy, literal) and case.num_active < 9]
        label = "mixture of 3, literal einsum" if literal else "mixture of 3" if strategy == "mixture" else strategy
        curves[label] = [(float(case.num_rows), medians[case.name]) for case in alike]
    plots.lines("throughput", curves, "rows generating at once (up to 8 adapters active)", "tokens/s")


def main(
    rounds: Annotated[int, typer.Option(help="rounds after the first, which warms up")] = 3,
    minutes: Annotated[float, typer.Option(help="no round begins that would end later")] = 5.0,
    quick: Quick = False,
) -> None:
    """Gemma-3-270M bfloat16, prompts of 20 to 80 tokens, 64 new ones each, rank 8 in all linear modules."""
    bench = Bench()
    bench.round(0, WARM_TOKENS)
    found: list[Round] = []
    for number in rounds_within(1 if quick else rounds, minutes):
        found.append(bench.round(number, WARM_TOKENS if quick else NUM_NEW))
        console.print(f"round {number}: " + ", ".join(f"{name} {value:.0f}" for name, value in found[-1].items()))
    table, medians = table_and_medians(found)
    if quick:
        return
    write_results("throughput", figures=figures_of(found), table=table, runs=found)
    plot(medians)


if __name__ == "__main__":
    typer.run(main)
