"""Shared parts of the engine's benchmarks: adapters, prompts, plans, a loaded engine, `generate`, rounds, tables."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.results_file import machine
from gpu_worker.config import NativeWorkerConfig, WorkerConfig
from gpu_worker.front.request.request import Job, SamplingParams
from gpu_worker.model.base_model import model_source
from gpu_worker.native.loop import Engine
from gpu_worker.native.openmp import run_on_short_lived_thread
from lora_store import BASE_PLAN, AdapterRef, AdapterWeights, ModuleWeights, Plan, PlannedAdapter, Strategy

RANK, NUM_ROWS, NUM_NEW = 8, 32, 64
PROMPT_TOKENS = (20, 80)
console = Console(width=110)

Quick = Annotated[bool, typer.Option(help="small counts, as a trial run; write nothing")]

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, int]]
"""The (out, in) of every linear module."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and its token ids."""

    text: str
    ids: list[int]


class Prompts:
    """Draws rows of random words of one token each."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokens = (token.removeprefix("▁") for token in tokenizer.get_vocab() if token.startswith("▁"))
        self._words = sorted(word for word in tokens if len(word) > 2 and word.isascii() and word.islower())

    def __call__(self, seed: int, count: int, lengths: tuple[int, int] = PROMPT_TOKENS) -> list[Prompt]:
        """Return `count` prompts whose token counts, first token included, are spread evenly over the range."""
        draw = random.Random(seed)
        texts = ["".join(f" {word}" for word in draw.choices(self._words, k=draw.randint(*lengths) - 1))
                 for _ in range(count)]  # fmt: skip
        return [Prompt(text, self._tokenizer(text).input_ids) for text in texts]


def random_modules(seed: int, shapes: Shapes) -> dict[str, ModuleWeights]:
    """Return small random weights of rank 8 for every linear module."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 0.01).bfloat16()

    return {module: ModuleWeights(draw(RANK, i), draw(o, RANK), 1.0) for module, (o, i) in shapes.items()}


def adapters_of(num_adapters: int, shapes: Shapes) -> dict[str, AdapterWeights]:
    """Return random adapters by digest. The digest is the adapter's number."""
    return {str(n): AdapterWeights(str(n), random_modules(n, shapes)) for n in range(num_adapters)}


def plan_of(strategy: Strategy, adapters: Sequence[tuple[AdapterRef, str]]) -> Plan:
    """Return a plan of all `adapters` (ref, weights digest) with equal weights."""
    weight = 1 / max(len(adapters), 1)
    return Plan(strategy, tuple(PlannedAdapter(ref, digest, weight) for ref, digest in adapters))


def plans(strategy: Strategy, num_active: int, num_rows: int = NUM_ROWS) -> list[Plan]:
    """Return one plan per row. All rows together use `num_active` adapters evenly; a mixture or fusion has 3."""
    if strategy == "base":
        return [BASE_PLAN] * num_rows
    k = 1 if strategy == "selection" else 3
    names = [[str((row * k + place) % num_active) for place in range(k)] for row in range(num_rows)]
    return [plan_of(strategy, [(AdapterRef("b", n, n), n) for n in row]) for row in names]


class Loaded:
    """An engine with fetched adapters. A first round brings all of them into the bank."""

    def __init__(self, num_adapters: int, **settings: Any) -> None:
        adapters: dict[str, AdapterWeights] = {}

        def fetch(digest: str) -> Future[AdapterWeights]:
            future: Future[AdapterWeights] = Future()
            future.set_result(adapters[digest])
            return future

        settings = {"prefix_cache": False, "shares_cores": False} | settings  # the cases repeat their prompts
        self.config = NativeWorkerConfig(bank_rank_rows=RANK * num_adapters, max_batch_size=NUM_ROWS, **settings)
        self.engine = run_on_short_lived_thread(lambda: Engine(self.config, fetch))
        self.prompts = Prompts(self.engine.base.tokenizer)
        adapters |= adapters_of(num_adapters, self.engine.bank.shapes)

    def run(
        self, asked: Sequence[Plan], rows: Sequence[Prompt], num_new: int = NUM_NEW, **settings: Any
    ) -> tuple[float, list[float]]:
        """Return (tokens per second, prompts included; milliseconds per step). `settings` override greedy sampling."""
        for number, (plan, prompt) in enumerate(zip(asked, rows, strict=True)):
            job = Job(str(number), prompt.text, plan, replace(sampling(num_new), **settings))
            self.engine.submit(self.engine.prepare(job, lambda _: None))
        while not all(load.done() for row in self.engine.waiting for load in row.loads.values()):
            self.engine.loaded.wait(0.1)
        steps: list[float] = []
        before = self.engine.counters.num_new_tokens
        started = time.perf_counter()
        while self.engine.has_work:
            step_started = time.perf_counter()
            self.engine.step()
            steps.append(1000 * (time.perf_counter() - step_started))
        seconds = time.perf_counter() - started
        num_made = self.engine.counters.num_new_tokens - before
        assert num_made == len(rows) * num_new, f"{num_made} tokens were made for {len(rows)} rows"
        return num_made / seconds, steps


def sampling(num_new: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)


def plain_model(config: WorkerConfig, **options: Any) -> Any:
    """Load the same base model with transformers."""
    return AutoModelForCausalLM.from_pretrained(model_source(config), dtype=torch.bfloat16, **options).eval()


def generate(model: Any) -> Callable[..., float]:
    """Return a function that measures transformers' `generate` on left-padded rows, in tokens per second.

    Keyword arguments are passed to `generate`.
    """

    @torch.inference_mode()
    def run(rows: Sequence[Prompt], num_new: int = NUM_NEW, **options: Any) -> float:
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([[0] * (longest - len(row.ids)) + row.ids for row in rows])
        mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in rows])
        sizes = {"max_new_tokens": num_new, "min_new_tokens": num_new}
        started = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **sizes, **options)
        return len(rows) * num_new / (time.perf_counter() - started)

    return run


def rounds_within(most: int, minutes: float) -> Iterator[int]:
    """Yield 1, 2, … `most`, while a round as long as the longest so far would end within `minutes`; at least one."""
    began, longest = time.perf_counter(), 0.0
    for number in range(1, most + 1):
        started = time.perf_counter()
        if started - began + longest > minutes * 60:
            console.print(f"{number - 1} of {most} rounds: time limit reached")
            return
        yield number
        longest = max(longest, time.perf_counter() - started)


def in_turn(cases: Sequence[T], number: int) -> Sequence[T]:
    """Return a round's cases in order, in every second round backwards, as a machine may slow down within a round."""
    return cases if number % 2 else cases[::-1]


def with_range(values: Sequence[float]) -> str:
    """Return the median of the rounds, with the least and the most if there are several."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def table_of(*columns: str) -> Table:
    """Return a table titled with the machine. The first column is text, the others are numbers."""
    table = Table(title=f"{machine()}, {torch.get_num_threads()} threads", title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def shown(table: Table) -> str:
    """Print the table and return its text."""
    with console.capture() as captured:
        console.print(table)
    console.print(table)
    return captured.get()
