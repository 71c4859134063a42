"""Compare throughput by strategy, adapters and batch size with transformers: `python -m benchmarks.throughput`.

Every round runs `generate` and each of the engine's cases once, so machine load is equal. The cost of LoRA in a decode
step is the difference of two close numbers, so one batch measures both: every second step runs without adapters.
"""

from __future__ import annotations

import gc
import itertools
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer

from benchmarks import plots
from benchmarks.engine_cases import (
    NUM_NEW,
    NUM_ROWS,
    Loaded,
    Prompt,
    Quick,
    console,
    generate,
    in_turn,
    plain_model,
    plans,
    rounds_within,
    shown,
    table_of,
    with_range,
)
from benchmarks.literal_einsum import literal_mixture
from benchmarks.results_file import write_results
from gpu_worker.model.packed_linear import KernelLinear, LinearKernel
from gpu_worker.model.quantization import quantize
from gpu_worker.model.step_context import Composition
from gpu_worker.native.forward import ForwardPass
from lora_store import Strategy
from lora_store.location import DEFAULT_CACHE_DIR

NUM_ADAPTERS, WARM_TOKENS = 96, 4
NUM_TURNS, NUM_PROMPT_STEPS = 4, 8
HEAD_SHAPE = 262_144, 640  # outputs and inputs
PRODUCT_ROWS, PRODUCT_TURNS = (1, 8, 32), 41


SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "top_p 0.95, top_k 50": {"temperature": 1.0, "top_p": 0.95, "top_k": 50},
    "top_p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "5 logprobs": {"logprobs": 5},
    "temperature 1, 5 logprobs": {"temperature": 1.0, "logprobs": 5},
}
"""Sampling settings by name. All of these run on the base model."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table. `literal`: use the paper's einsum."""

    num_rows: int
    strategy: Strategy
    num_active: int
    literal: bool = False
    sampling: str = "greedy"
    lookup: int = 0  # tokens guessed at once

    @property
    def what(self) -> str:
        kind = "literal einsum" if self.literal else self.strategy
        kind = kind if self.strategy == "base" else f"{kind} {self.num_active}"
        kind = f"{kind}, prompt lookup" if self.lookup else kind
        return kind if self.sampling == "greedy" else f"{kind}, {self.sampling}"

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
    *[Case(NUM_ROWS, "base", 0, sampling=name) for name in SAMPLING if name != "greedy"],
    Case(8, "base", 0),
    Case(8, "selection", 8),
    Case(8, "mixture", 8),
    Case(8, "mixture", 8, literal=True),
    Case(1, "base", 0),
    Case(1, "base", 0, lookup=7),
    Case(1, "base", 0, sampling="temperature 1"),
    Case(1, "base", 0, sampling="temperature 1", lookup=7),
    Case(1, "selection", 1),
    Case(1, "mixture", 3),
    Case(1, "mixture", 3, lookup=7),
    Case(1, "mixture", 3, literal=True),
)
BATCHES = tuple(dict.fromkeys(case.num_rows for case in CASES))
STEP_CASES = tuple(case for case in CASES if case.num_rows == NUM_ROWS and case.strategy == "mixture")

Round = dict[str, float]
"""Tokens per second by case, and the median decode step as `<case> ms`."""
Turn = dict[str, float]
"""The cost of adapters in a decode step of 32 rows in ms, by kind of composition."""


class Bench:
    def __init__(self) -> None:
        self._loaded = Loaded(NUM_ADAPTERS)
        self._generate = generate(plain_model(self._loaded.config))

    def round(self, number: int, num_new: int = NUM_NEW) -> Round:
        """Run every case once."""
        found: Round = {}
        for num_rows in BATCHES:
            prompts = self._loaded.prompts(number, num_rows)
            for case in in_turn([None, *(case for case in CASES if case.num_rows == num_rows)], number):
                if case is None:
                    found[f"generate x{num_rows}"] = self._generate(prompts, num_new)
                else:
                    found[case.name], found[f"{case.name} ms"] = self._run(case, prompts, num_new)
        gc.collect()
        return found

    def turn(self, number: int, num_new: int = NUM_NEW) -> Turn:
        """Run each mixture once."""
        prompts = self._loaded.prompts(number, NUM_ROWS)
        return {case.what: self._extra_ms(case, prompts, num_new) for case in STEP_CASES}

    def _run(self, case: Case, prompts: Sequence[Prompt], num_new: int) -> tuple[float, float]:
        asked = plans(case.strategy, case.num_active, case.num_rows)
        engine = self._loaded.engine
        engine.config = replace(engine.config, prompt_lookup_tokens=case.lookup)
        with literal_mixture(engine) if case.literal else nullcontext():
            tokens_s, steps = self._loaded.run(asked, prompts, num_new, **SAMPLING[case.sampling])
        return tokens_s, statistics.median(steps)

    def _extra_ms(self, case: Case, prompts: Sequence[Prompt], num_new: int) -> float:
        """Return the median of a step minus the mean of its neighbours, which run without adapters."""
        asked = plans(case.strategy, case.num_active, case.num_rows)
        forward = self._loaded.engine._forward
        with literal_mixture(self._loaded.engine) if case.literal else nullcontext(), every_second_step_base(forward):
            _, steps = self._loaded.run(asked, prompts, num_new)
        decoding = range(NUM_PROMPT_STEPS, len(steps) - 1, 2)  # the even ones have adapters
        return statistics.median(steps[n] - (steps[n - 1] + steps[n + 1]) / 2 for n in decoding)


@contextmanager
def every_second_step_base(forward: ForwardPass) -> Iterator[None]:
    """Let every second step of the engine compute the base model, within the block."""
    numbers, compose = itertools.count(), forward.compose

    def by_turn(*args: Any) -> Composition | None:
        return compose(*args) if next(numbers) % 2 == 0 else None

    forward.compose = by_turn
    try:
        yield
    finally:
        forward.compose = compose


def figures_of(found: Sequence[Round], turns: Sequence[Turn]) -> dict[str, float]:
    """Return the ratios, and the medians over turns of the cost of adapters; 32 rows each."""

    def extra_ms(name: str) -> float:
        return statistics.median(turn[name] for turn in turns)

    costs = {f"lora_ms_{active}": extra_ms(f"mixture {active}") for active in (8, 32, 96)}
    return ratios_of(found) | costs | {"literal_ms_8": extra_ms("literal einsum 8")}


def ratios_of(found: Sequence[Round]) -> dict[str, float]:
    """Return the medians over rounds of values compared within one; 32 rows unless the name says otherwise."""

    def median(name: str, over: str, num_rows: int = NUM_ROWS) -> float:
        return statistics.median(round_[f"{name} x{num_rows}"] / round_[f"{over} x{num_rows}"] for round_ in found)

    figures = {"base_over_generate": median("base", "generate"), "base1_over_generate": median("base", "generate", 1)}
    figures |= {f"mixture{active}_over_generate": median(f"mixture {active}", "generate") for active in (8, 32, 96)}
    figures |= {f"mixture{active}_over_base": median(f"mixture {active}", "base") for active in (8, 32, 96)}
    for case in (case for case in CASES if case.sampling != "greedy" and case.num_rows == NUM_ROWS):
        figures[f"{_slug(case.sampling)}_over_greedy"] = median(case.what, "base")
    for case in (case for case in CASES if case.lookup):
        without = replace(case, lookup=0).what
        figures[f"prompt_lookup_{_slug(without)}"] = median(case.what, without, case.num_rows)
    return figures


def _slug(text: str) -> str:
    return re.sub("[^a-z0-9]+", "_", text)


def table_and_medians(found: Sequence[Round]) -> tuple[str, Mapping[str, float]]:
    medians = {name: statistics.median(round_[name] for round_ in found) for name in found[0]}
    table = table_of("what", "rows", "tokens/s", "/ generate", "decode step ms")
    for num_rows in BATCHES:
        table.add_row("generate", str(num_rows), f"{medians[f'generate x{num_rows}']:.0f}", "1.00", "")
        for case in (case for case in CASES if case.num_rows == num_rows):
            ratio = with_range([round_[case.name] / round_[f"generate x{num_rows}"] for round_ in found])
            cells = f"{medians[case.name]:.0f}", ratio, f"{medians[f'{case.name} ms']:.0f}"
            table.add_row(case.what, str(num_rows), *cells)
        table.add_section()
    return shown(table), medians


def plot(medians: Mapping[str, float]) -> None:
    """Plot tokens per second by batch size, for the cases measured at every size."""
    curves = {"generate": [(float(num_rows), medians[f"generate x{num_rows}"]) for num_rows in BATCHES]}
    for strategy, literal in (("base", False), ("selection", False), ("mixture", False), ("mixture", True)):
        greedy = [case for case in CASES if case.sampling == "greedy" and case.num_active < 9 and not case.lookup]
        alike = [case for case in greedy if (case.strategy, case.literal) == (strategy, literal)]
        label = "mixture of 3, literal einsum" if literal else "mixture of 3" if strategy == "mixture" else strategy
        curves[label] = [(float(case.num_rows), medians[case.name]) for case in alike]
    plots.lines("throughput/plot", curves, "rows generating at once (up to 8 adapters active)", "tokens/s")


def products(num_turns: int) -> list[str]:
    """Return lines with the speed of integer weights relative to bfloat16, in the shape of the model's output head.

    The kinds take turns in one process, and the medians are of each turn's ratios, so that the load of other processes
    counts for all of them.
    """
    kernel = LinearKernel.load(DEFAULT_CACHE_DIR)
    assert kernel is not None, "needs a C++ compiler"
    weight = torch.randn(HEAD_SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    layers = {"bfloat16": KernelLinear(kernel, weight, None)}
    layers |= {f"int{bits}": KernelLinear(kernel, quantize(weight, bits), None) for bits in (8, 4)}
    lines = []
    for num_rows in PRODUCT_ROWS:
        x = torch.randn(num_rows, HEAD_SHAPE[1]).bfloat16()
        seconds: dict[str, list[float]] = {kind: [] for kind in layers}
        for number in range(num_turns):
            for kind in in_turn(list(layers), number):
                began = time.perf_counter()
                layers[kind](x)
                seconds[kind].append(time.perf_counter() - began)
        for kind in layers:
            turns = zip(seconds["bfloat16"], seconds[kind], strict=True)
            ratio, best = statistics.median(a / b for a, b in turns), min(seconds["bfloat16"]) / min(seconds[kind])
            lines.append(f"{num_rows} rows, {kind}: {ratio:.2f} (of the best times: {best:.2f})")
    return lines


def main(
    rounds: Annotated[int, typer.Option(help="rounds after the first, a warm-up")] = 3,
    minutes: Annotated[float, typer.Option(help="start no round that would end later")] = 5.0,
    only_products: Annotated[
        bool, typer.Option(help="compare integer weights with bfloat16, and nothing else")
    ] = False,
    quick: Quick = False,
) -> None:
    """Measure Gemma-3-270M in bfloat16: prompts of 20 to 80 tokens, 64 new ones each, rank 8 in all linear modules."""
    if only_products:
        console.print("\n".join(products(3 if quick else PRODUCT_TURNS)))
        return
    bench = Bench()
    bench.round(0, WARM_TOKENS)
    found: list[Round] = []
    for number in rounds_within(1 if quick else rounds, minutes):
        found.append(bench.round(number, WARM_TOKENS if quick else NUM_NEW))
        console.print(f"round {number}: " + ", ".join(f"{name} {value:.0f}" for name, value in found[-1].items()))
        console.print(", ".join(f"{name} {value:.2f}" for name, value in ratios_of(found[-1:]).items()))
    turns = [bench.turn(number, *[3 * NUM_PROMPT_STEPS] * quick) for number in range(1 if quick else NUM_TURNS)]
    figures = figures_of(found, turns)
    table, medians = table_and_medians(found)
    if quick:
        return
    write_results("throughput", figures=figures, table=table, runs=[*found, *turns], keeps_other_processors=True)
    plot(medians)


if __name__ == "__main__":
    typer.run(main)
