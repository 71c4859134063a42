"""Compare the native engine with integer weights to bfloat16: `python -m benchmarks.integer_weights`.

The same base model four times: in bfloat16, with the integers of the packaged file, and rounded from bfloat16 to 8
and to 4 bits. Each is in a process of its own, and they take turns within a round. With `--perplexity` it prints how
well each predicts the held-out prompts of `examples/starter_heldout` instead.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import typer

from benchmarks.engine_cases import (
    NUM_NEW,
    Loaded,
    Quick,
    console,
    in_turn,
    plans,
    rounds_within,
    shown,
    table_of,
    with_range,
)
from benchmarks.results_file import write_results
from benchmarks.starter_pool import HELD_OUT, read_prompts
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from gpu_worker.model.base_model import model_source
from lora_store import Strategy

NUM_ADAPTERS = 8
CASES: tuple[tuple[Strategy, int], ...] = (
    ("base", 1), ("base", 8), ("base", 32), ("mixture", 1), ("mixture", 8), ("mixture", 32)
)  # fmt: skip
PLAIN = "bfloat16"

Round = dict[str, float]
"""Tokens per second by weights and case."""


def name_case(weights: str, strategy: Strategy, num_rows: int) -> str:
    return f"{weights}: {strategy} x{num_rows}"


def all_settings() -> dict[str, dict[str, Any]]:
    """Return the settings of an engine for each kind of weights."""
    folder = str(model_source(NativeWorkerConfig()))
    return {
        PLAIN: {},
        "the file's integers": {"quantization": "int8"},
        "int8": {"base_model": folder, "quantization": "int8"},
        "int4": {"base_model": folder, "quantization": "int4"},
    }


_loaded: Loaded
"""The engine of a process."""


def load(settings: Mapping[str, Any]) -> None:
    global _loaded
    _loaded = Loaded(NUM_ADAPTERS, **settings)


def run_case(strategy: Strategy, num_rows: int, number: int, num_new: int) -> float:
    """Return tokens per second of this process's engine."""
    return _loaded.run(plans(strategy, NUM_ADAPTERS, num_rows), _loaded.prompts(number, num_rows), num_new)[0]


def score_texts(texts: Sequence[str]) -> list[tuple[float, int]]:
    """Return the log probability of each token but the first of every text, and the most likely id there."""
    deltas: list[list[Delta]] = [[] for _ in texts]
    scoring = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    for number, text in enumerate(texts):
        job = Job(str(number), text, sampling=scoring)
        _loaded.engine.submit(_loaded.engine.prepare(job, deltas[number].append))
    _loaded.engine.run_until_idle()
    tokens = [token for found in deltas for token in found[0].prompt if token.logprob is not None]
    return [(token.logprob or 0.0, token.top[0][0]) for token in tokens]


@contextmanager
def processes() -> Iterator[dict[str, ProcessPoolExecutor]]:
    """Yield a process with an engine for each kind of weights."""
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(ProcessPoolExecutor(1, spawn, initializer=load, initargs=(settings,)))
            for kind, settings in all_settings().items()
        }


def run_round(engines: Mapping[str, ProcessPoolExecutor], number: int, num_new: int) -> Round:
    found: Round = {}
    for strategy, num_rows in CASES:
        for weights in in_turn(list(engines), number):
            run = engines[weights].submit(run_case, strategy, num_rows, number, num_new)
            found[name_case(weights, strategy, num_rows)] = run.result()
    return found


def compare(rounds: list[Round], kinds: list[str]) -> dict[str, list[float]]:
    """Return ratios to bfloat16 by weights and case, one for each round, and of mixtures to the same base model."""
    figures: dict[str, list[float]] = {}
    for weights in kinds:
        for strategy, num_rows in CASES:
            name, plain = name_case(weights, strategy, num_rows), name_case(PLAIN, strategy, num_rows)
            if weights != PLAIN:
                figures[name] = [round_[name] / round_[plain] for round_ in rounds]
        mixed, base = name_case(weights, "mixture", 32), name_case(weights, "base", 32)
        figures[f"{weights}: mixture against base x32"] = [round_[mixed] / round_[base] for round_ in rounds]
    return figures


def print_perplexities(engines: Mapping[str, ProcessPoolExecutor], texts: Sequence[str]) -> None:
    """Print each engine's perplexity, and the share of tokens whose most likely one is that of bfloat16."""
    plain: list[tuple[float, int]] = []
    table = table_of("weights", "perplexity", "most likely token of bfloat16, %")
    for kind, engine in engines.items():
        found = engine.submit(score_texts, texts).result()
        engine.shutdown()  # only one is in memory
        plain = plain or found
        perplexity = math.exp(-statistics.fmean(logprob for logprob, _ in found))
        same = statistics.fmean(a == b for (_, a), (_, b) in zip(found, plain, strict=True))
        table.add_row(kind, f"{perplexity:.1f}", f"{100 * same:.1f}")
    console.print(f"{len(texts)} texts, {len(plain)} tokens that are predicted")
    console.print(table)


def main(
    rounds: Annotated[int, typer.Option(help="rounds")] = 5,
    minutes: Annotated[float, typer.Option(help="no round begins that would end later")] = 9,
    quick: Quick = False,
    perplexity: Annotated[bool, typer.Option(help="print perplexities instead; write nothing")] = False,
) -> None:
    """Run the rounds and write benchmarks/results/integer_weights."""
    num_new = 4 if quick else NUM_NEW
    with processes() as engines:
        if perplexity:
            prompts = read_prompts(HELD_OUT, per_task=1 if quick else 12)
            print_perplexities(engines, [prompt.input for prompt in prompts])
            return
        run_round(engines, 0, 4)
        found = [run_round(engines, number, num_new) for number in rounds_within(1 if quick else rounds, minutes)]
    figures = compare(found, list(engines))
    table = table_of("case", "tokens/s in bfloat16", *(f"{kind}, ratio" for kind in engines if kind != PLAIN))
    for strategy, num_rows in CASES:
        speed = statistics.median(round_[name_case(PLAIN, strategy, num_rows)] for round_ in found)
        ratios = [with_range(figures[name_case(kind, strategy, num_rows)]) for kind in engines if kind != PLAIN]
        table.add_row(f"{strategy} x{num_rows}", f"{speed:.0f}", *ratios)
    kept = [with_range(figures[f"{kind}: mixture against base x32"]) for kind in engines]
    table.add_row("mixture against base x32", *kept)
    text = shown(table)
    if not quick:
        medians = {name: round(statistics.median(values), 3) for name, values in figures.items()}
        write_results("integer_weights", figures=medians, table=text, runs=found, keeps_other_processors=True)


if __name__ == "__main__":
    typer.run(main)
