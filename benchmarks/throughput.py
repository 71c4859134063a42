"""The engine beside transformers' generate, by strategy and active adapters: `python -m benchmarks.throughput`.

Every round runs generate and each of the engine's cases once, so that all of a round meet the same machine.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.results_file import machine, write_results
from gpu_worker.base_model import model_source
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.request import Job, SamplingParams
from lora_store import AdapterRef, AdapterWeights, Plan, PlannedAdapter
from lora_store.adapter import ModuleWeights
from lora_store.plan import BASE_PLAN

RANK, NUM_ADAPTERS, NUM_ROWS, NUM_NEW = 8, 96, 32, 64
CASES = (("base", 0), ("selection", 8), ("mixture", 8), ("mixture", 32), ("mixture", 96), ("fusion", 8))
console = Console(width=100)


def random_adapter(name: str, shapes: dict[str, tuple[int, int]]) -> AdapterWeights:
    """Small random weights of rank 8 for every linear module."""
    generator = torch.Generator().manual_seed(int(name))

    def draw(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 0.01).bfloat16()

    modules = {module: ModuleWeights(draw(RANK, i), draw(o, RANK), 1.0) for module, (o, i) in shapes.items()}
    return AdapterWeights(name, modules)


def prompts(seed: int) -> list[list[int]]:
    """Rows of 20 to 80 random ids."""
    draw = random.Random(seed)
    return [[draw.randrange(1000, 200_000) for _ in range(draw.randint(20, 80))] for _ in range(NUM_ROWS)]


def plans(strategy: str, num_active: int) -> list[Plan]:
    """One plan a row, `num_active` adapters used evenly by all of them; a mixture or fusion is of 3."""
    if strategy == "base":
        return [BASE_PLAN] * NUM_ROWS
    k = 1 if strategy == "selection" else 3
    names = [[str((row * k + place) % num_active) for place in range(k)] for row in range(NUM_ROWS)]
    return [
        Plan(strategy, tuple(PlannedAdapter(AdapterRef("b", n, n), n, 1 / k) for n in row))  # type: ignore[arg-type]
        for row in names
    ]


class Loaded:
    """An engine whose adapters are at hand, all of them in the bank after a first round."""

    def __init__(self) -> None:
        adapters: dict[str, AdapterWeights] = {}

        def fetch(digest: str) -> Future[AdapterWeights]:
            future: Future[AdapterWeights] = Future()
            future.set_result(adapters[digest])
            return future

        self.config = WorkerConfig(bank_rank_rows=RANK * NUM_ADAPTERS, max_batch_size=NUM_ROWS)
        self.engine = Engine(self.config, fetch)
        adapters |= {str(n): random_adapter(str(n), self.engine.bank.shapes) for n in range(NUM_ADAPTERS)}

    def run(self, asked: Sequence[Plan], rows: Sequence[list[int]]) -> tuple[float, float]:
        """(tokens a second, median ms of a decode step), prompts included in the first."""
        sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        for number, (plan, tokens) in enumerate(zip(asked, rows, strict=True)):
            row = self.engine.prepare(Job(str(number), "x", plan, sampling), lambda _: None)
            row.tokens[:], row.num_prompt_tokens = tokens, len(tokens)
            self.engine.submit(row)
        while not all(load.done() for row in self.engine.waiting for load in row.loads.values()):
            self.engine.loaded.wait(0.1)
        steps: list[float] = []
        started = time.perf_counter()
        while self.engine.has_work:
            before = time.perf_counter()
            self.engine.step()
            steps.append(time.perf_counter() - before)
        return NUM_ROWS * NUM_NEW / (time.perf_counter() - started), 1000 * statistics.median(steps)


def generate(config: WorkerConfig) -> Callable[[Sequence[list[int]]], float]:
    """transformers' own loop over the same rows, padded on the left: tokens a second."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_source(config), dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(rows: Sequence[list[int]]) -> float:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        sizes = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW}
        started = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **sizes)
        return NUM_ROWS * NUM_NEW / (time.perf_counter() - started)

    return run


def measure(rounds: int) -> list[dict[str, float]]:
    """One row of figures a round, after one that warms everything up."""
    loaded = Loaded()
    by_generate = generate(loaded.config)
    found: list[dict[str, float]] = []
    for number in range(rounds + 1):
        rows = prompts(number)
        round_: dict[str, float] = {"generate": by_generate(rows)}
        for strategy, active in CASES:
            round_[f"{strategy} {active}"], round_[f"{strategy} {active} ms"] = loaded.run(
                plans(strategy, active), rows
            )
        gc.collect()
        if number:
            found.append(round_)
            console.print(f"round {number}: " + ", ".join(f"{name} {value:.0f}" for name, value in round_.items()))
    return found


def main(rounds: Annotated[int, typer.Option(help="rounds after the first, which warms up")] = 3) -> None:
    """Gemma-3-270M bfloat16, 32 prompts of 20 to 80 tokens, 64 new ones each, rank 8 in all linear modules."""
    found = measure(rounds)
    table = Table(title=f"{machine()}, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("what", "tokens/s", "/ generate", "decode step ms"):
        table.add_column(column, justify="left" if column == "what" else "right")
    ratios: dict[str, float] = {}
    for name in ("generate", *[f"{strategy} {active}" for strategy, active in CASES]):
        ratios[name] = statistics.median(round_[name] / round_["generate"] for round_ in found)
        speed = statistics.median(round_[name] for round_ in found)
        step_ms = "" if name == "generate" else f"{statistics.median(round_[f'{name} ms'] for round_ in found):.0f}"
        table.add_row(name, f"{speed:.0f}", f"{ratios[name]:.2f}", step_ms)
    with console.capture() as captured:
        console.print(table)
    console.print(table)
    figures = {"base_over_generate": ratios["base 0"]}
    figures |= {f"mixture{active}_over_generate": ratios[f"mixture {active}"] for active in (8, 32, 96)}
    figures |= {
        f"lora_ms_{active}": statistics.median(r[f"mixture {active} ms"] - r["base 0 ms"] for r in found)
        for active in (8, 32, 96)
    }
    write_results("throughput", figures=figures, table=captured.get(), runs=found)


if __name__ == "__main__":
    typer.run(main)
