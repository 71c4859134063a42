"""Measure decode steps with compiled layers and with their parts called one by one: `python -m benchmarks.layers`.

Both compute the same kernels in the same order. They take turns in one process, in every second round backwards, each
time with new rows.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Annotated

import typer

from benchmarks.engine_cases import Loaded, Quick, console, plans, shown, table_of
from benchmarks.results_file import write_results
from gpu_worker.native.compiled_layer import CompiledLayer
from lora_store import Strategy

NUM_STEPS = 40
CASES: tuple[tuple[Strategy, int, int], ...] = (
    *(("base", 0, rows) for rows in (1, 8, 32)),
    *(("mixture", num_active, 32) for num_active in (8, 32, 96)),
)


class Layers:
    """The decoder layers of a model, which are compiled, or else called in parts."""

    def __init__(self, loaded: Loaded) -> None:
        self._layers = loaded.engine.base.model.model.layers
        self._compiled = [layer.forward for layer in self._layers]
        assert all(isinstance(each, CompiledLayer) for each in self._compiled), "this processor has no compiled layers"

    def use(self, *, compiled: bool) -> None:
        for layer, each in zip(self._layers, self._compiled, strict=True):
            layer.forward = each if compiled else each._own


def main(rounds: Annotated[int, typer.Option(help="turns of each case")] = 4, quick: Quick = False) -> None:
    """Measure the packaged model with random adapters of rank 8."""
    loaded = Loaded(96)
    layers = Layers(loaded)
    steps: defaultdict[tuple[str, bool], list[float]] = defaultdict(list)
    for number in range(1 if quick else rounds):
        for strategy, num_active, num_rows in CASES:
            name = f"{strategy}_{num_active}" if num_active else f"{strategy}_{num_rows}_rows"
            for compiled in (True, False) if number % 2 else (False, True):
                layers.use(compiled=compiled)
                asked, prompts = plans(strategy, num_active, num_rows), loaded.prompts(number, num_rows)
                loaded.run(asked, prompts, 4)
                _, found = loaded.run(asked, prompts, 4 if quick else NUM_STEPS)
                steps[name, compiled].append(statistics.median(found))
    table, figures = table_of("step", "in parts ms", "compiled ms", "compiled / in parts"), {}
    for name in dict.fromkeys(name for name, _ in steps):
        parts, whole = steps[name, False], steps[name, True]
        figures[f"layers_in_parts_{name}_ms"] = statistics.median(parts)
        figures[f"layers_compiled_{name}_ms"] = statistics.median(whole)
        ratio = statistics.median(one / other for one, other in zip(whole, parts, strict=True))
        figures[f"layers_compiled_over_parts_{name}"] = ratio
        table.add_row(name, *(f"{statistics.median(each):.1f}" for each in (parts, whole)), f"{ratio:.2f}")
    text = shown(table)
    if quick:
        console.print("a trial run: nothing is written")
        return
    runs = [{"step": name, "compiled": compiled, "ms": found} for (name, compiled), found in steps.items()]
    write_results("layers", figures=figures, table=text, runs=runs, keeps_other_vendors=True)


if __name__ == "__main__":
    typer.run(main)
