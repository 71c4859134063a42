"""Measure both ways to compute a step's LoRA products, without its rest: `python -m benchmarks.lora_products`.

All seven modules of the 18 layers of Gemma-3-270M, bfloat16, mixtures of 3 random adapters of rank 8. The grouped way
and the dense one (`gpu_worker/model/mapping.py`) take turns in one process. Inputs and outputs are in a cache if they
fit, as in a step, where the base model's layers have just used them.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from benchmarks.engine_cases import RANK, Quick, adapters_of, console, plans, shown, table_of
from benchmarks.results_file import write_results
from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.residency import Residency
from gpu_worker.config import WorkerConfig
from gpu_worker.model.dense_mapping import dense_mapping
from gpu_worker.model.grouped_mapping import grouped_mapping
from gpu_worker.model.lora_kernel import LoraKernel, load_lora_kernel
from gpu_worker.model.step_context import Composition, Outputs

NUM_LAYERS = 18
WIDTHS = {  # (out, in)
    **{f"self_attn.{name}_proj": (width, 640) for name, width in (("q", 1024), ("k", 256), ("v", 256))},
    "self_attn.o_proj": (640, 1024),
    **{f"mlp.{name}_proj": (2048, 640) for name in ("gate", "up")},
    "mlp.down_proj": (640, 2048),
}
CASES = (  # rows, tokens of each, active adapters
    *((32, 1, active) for active in (8, 32, 96)),
    (8, 1, 24),
    *((1, tokens, 3) for tokens in (64, 512)),
    *((32, 32, active) for active in (8, 96)),
)


class Products:
    """The products of all layers over a bank that holds `num_active` adapters."""

    def __init__(self, num_active: int, kernel: LoraKernel) -> None:
        shapes = {f"model.layers.{n}.{name}": size for n in range(NUM_LAYERS) for name, size in WIDTHS.items()}
        linears = {name: nn.Linear(i, o, dtype=torch.bfloat16) for name, (o, i) in shapes.items()}
        self._num_active, self._kernel, self._bank = num_active, kernel, LoraBank(linears, RANK * num_active)
        self._residency = Residency(self._bank, is_packed=True)
        adapters = adapters_of(num_active, shapes)
        layouts = {digest: self._bank.to_device_layout(weights) for digest, weights in adapters.items()}
        if not self._residency.try_pin(list(adapters), layouts):
            raise RuntimeError("the bank has no room for its adapters")
        self._residency.settle()

    def ways(self, num_rows: int, num_tokens: int) -> dict[str, Callable[[], float]]:
        """Return functions that compute all products once, and return the milliseconds."""
        asked, counts = plans("mixture", self._num_active, num_rows), [num_tokens] * num_rows
        grouped = grouped_mapping(asked, counts, self._residency, self._kernel)
        dense = dense_mapping(asked, counts, self._residency, torch.bfloat16, torch.device("cpu"))
        calls = list(self._calls(num_rows * num_tokens))
        return {"grouped": lambda: _milliseconds(grouped, calls), "dense": lambda: _milliseconds(dense, calls)}

    def _calls(self, num_tokens: int) -> Iterator[tuple[Tensor, Outputs]]:
        """Yield an input for each group of modules that read one, and their outputs. Layers share their memory."""
        inputs = {size: torch.randn(num_tokens, size).bfloat16() for _, size in WIDTHS.values()}
        outputs = {name: torch.zeros(num_tokens, size, dtype=torch.bfloat16) for name, (size, _) in WIDTHS.items()}
        of_input: defaultdict[int, list[str]] = defaultdict(list)
        for name, module in self._bank.modules.items():
            of_input[id(module.inputs)].append(name)
        for names in of_input.values():
            x = inputs[self._bank.shapes[names[0]][1]]
            yield x, [(outputs[name.split(".", 3)[3]], self._bank.modules[name]) for name in names]


def _milliseconds(composition: Composition, calls: list[tuple[Tensor, Outputs]]) -> float:
    started = time.perf_counter()
    for x, outputs in calls:
        composition.add(x, outputs)
    return 1000 * (time.perf_counter() - started)


def main(rounds: Annotated[int, typer.Option(help="turns of each way")] = 9, quick: Quick = False) -> None:
    """Measure steps of decoded tokens and of prompts, with few adapters and with many."""
    kernel = load_lora_kernel(WorkerConfig().cache_dir)
    if kernel is None:
        raise SystemExit("the kernel could not be loaded; the warning above states why")
    table, runs = table_of("rows x tokens, active", "grouped ms", "dense ms"), []
    figures: dict[str, float] = {}
    for num_rows, num_tokens, num_active in CASES[:1] if quick else CASES:
        name = f"{num_rows}x{num_tokens}_{num_active}"
        ways = Products(num_active, kernel).ways(num_rows, num_tokens)
        found = [{way: run() for way, run in ways.items()} for _ in range(1 + (1 if quick else rounds))][1:]
        runs += [{"case": name} | each for each in found]
        of_way = {way: statistics.median(each[way] for each in found) for way in ways}
        figures |= {f"lora_products_{way}_{name}_ms": value for way, value in of_way.items()}
        table.add_row(f"{num_rows} x {num_tokens}, {num_active}", *(f"{value:.1f}" for value in of_way.values()))
    text = shown(table)
    if quick:
        console.print("a trial run: nothing is written")
        return
    write_results("lora_products", figures=figures, table=text, runs=runs, keeps_other_vendors=True)


if __name__ == "__main__":
    typer.run(main)
