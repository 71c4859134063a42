"""The gain of the prefix cache: first tokens behind a long shared prefix, and conversations of several turns.

`python -m benchmarks.prefix_cache`. One engine runs every case with and without the cache in turn, so that both meet
the same machine. Without the cache a row neither finds blocks nor leaves any.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from benchmarks.engine_cases import NUM_NEW, NUM_ROWS, Loaded, Quick, plans, rounds_within, sampling, shown, table_of
from benchmarks.results_file import write_results
from gpu_worker.front.request.request import Job
from gpu_worker.front.row import Row
from lora_store import Plan

NUM_ADAPTERS, PREFIX_TOKENS, QUESTION_TOKENS = 8, 1000, 24
CONVERSATIONS, TURNS = 8, 8
FIRST_MESSAGE, MESSAGE, ANSWER = 300, 30, 32  # tokens
KINDS = {"base": plans("base", 0, CONVERSATIONS), "mixture of 3": plans("mixture", NUM_ADAPTERS, CONVERSATIONS)}

Round = dict[str, float]
"""Seconds to the first token, and tokens per second, by case."""


class Bench:
    """An engine, and rows of random tokens."""

    def __init__(self) -> None:
        self.engine = (loaded := Loaded(NUM_ADAPTERS, prefix_cache=True)).engine
        loaded.run(plans("mixture", NUM_ADAPTERS), loaded.prompts(1, NUM_ROWS), 4)  # brings the adapters into the bank
        self._ids = range(1000, 9000)
        self._draw = random.Random(0)
        self._numbers = itertools.count()

    def tokens(self, count: int) -> list[int]:
        """Return random ids, which no other row has in this order."""
        return self._draw.choices(self._ids, k=count)

    def submit(self, tokens: Sequence[int], plan: Plan, num_new: int, *, cached: bool) -> Row:
        job = Job(f"{next(self._numbers)}", "", plan, sampling(num_new))
        row = self.engine.prepare.of_tokens(job, list(tokens), lambda event: None)
        row.skips_prefix_cache = not cached
        self.engine.submit(row)
        return row

    def first_token_s(self, tokens: Sequence[int], plan: Plan, *, cached: bool) -> float:
        """Return the seconds from submission to the first token of a lone row."""
        started = time.perf_counter()
        self.submit(tokens, plan, 1, cached=cached)
        self.engine.run_until_idle()
        return time.perf_counter() - started

    def converse(self, plans_: Sequence[Plan], num_turns: int, *, cached: bool) -> float:
        """Run a conversation per plan, all at once, and return new tokens per second."""
        talks = [self.tokens(FIRST_MESSAGE) for _ in plans_]
        started = time.perf_counter()
        rows = [self.submit(talk, plan, ANSWER, cached=cached) for talk, plan in zip(talks, plans_, strict=True)]
        done = [0] * len(rows)
        while any(count < num_turns for count in done):
            self.engine.step()
            for place, row in enumerate(rows):
                if row.num_new_tokens == ANSWER and done[place] < num_turns:
                    done[place] += 1
                    if done[place] < num_turns:
                        tokens = [*row.tokens, *self.tokens(MESSAGE)]
                        rows[place] = self.submit(tokens, plans_[place], ANSWER, cached=cached)
        return len(rows) * num_turns * ANSWER / (time.perf_counter() - started)

    def different(self, num_new: int, *, cached: bool) -> float:
        """Return tokens per second of a batch whose prompts share nothing."""
        rows = [self.tokens(50) for _ in range(NUM_ROWS)]
        started = time.perf_counter()
        for tokens, plan in zip(rows, plans("mixture", NUM_ADAPTERS), strict=True):
            self.submit(tokens, plan, num_new, cached=cached)
        self.engine.run_until_idle()
        return NUM_ROWS * num_new / (time.perf_counter() - started)

    def round(self, num_turns: int, num_new: int) -> Round:
        """Run every case once, with and without the cache."""
        found: Round = {}
        for kind, plans_ in KINDS.items():
            prefix = self.tokens(PREFIX_TOKENS)
            for what in ("first", "cached"):
                tokens = [*prefix, *self.tokens(QUESTION_TOKENS)]
                found[f"{kind} {what}"] = self.first_token_s(tokens, plans_[0], cached=True)
            for cached in (False, True):
                found[f"{kind} turns {cached}"] = self.converse(plans_, num_turns, cached=cached)
        for cached in (False, True):
            found[f"different {cached}"] = self.different(num_new, cached=cached)
        return found


def main(
    rounds: Annotated[int, typer.Option(help="rounds after the first, a warm-up")] = 3,
    minutes: Annotated[float, typer.Option(help="start no round that would end later")] = 3.5,
    quick: Quick = False,
) -> None:
    """Measure Gemma-3-270M in bfloat16 and write the results."""
    num_turns, num_new = (2, 4) if quick else (TURNS, NUM_NEW)
    bench = Bench()
    bench.round(1, 4)
    found = [bench.round(num_turns, num_new) for _ in rounds_within(1 if quick else rounds, minutes)]

    def median(name: str, over: str) -> float:
        return statistics.median(round_[name] / round_[over] for round_ in found)

    medians = {name: statistics.median(round_[name] for round_ in found) for name in found[0]}
    figures = {"different_prompts_with_over_without": median("different True", "different False")}
    table = table_of("", "without", "with", "ratio")
    for kind in KINDS:
        name = kind.replace(" ", "_")
        ratio = figures[f"{name}_first_token_cached_over_not"] = median(f"{kind} cached", f"{kind} first")
        seconds = (1000 * medians[f"{kind} first"], 1000 * medians[f"{kind} cached"])
        table.add_row(f"{kind}: first token, ms", *(f"{value:.0f}" for value in seconds), f"{ratio:.3f}")
        ratio = figures[f"{name}_turns_with_over_without"] = median(f"{kind} turns True", f"{kind} turns False")
        speeds = (medians[f"{kind} turns False"], medians[f"{kind} turns True"])
        table.add_row(f"{kind}: turns, tokens/s", *(f"{value:.0f}" for value in speeds), f"{ratio:.2f}")
    speeds = (medians["different False"], medians["different True"])
    ratio = figures["different_prompts_with_over_without"]
    table.add_row("nothing shared, tokens/s", *(f"{value:.0f}" for value in speeds), f"{ratio:.3f}")
    text = shown(table)
    if not quick:
        write_results("prefix_cache", figures=figures, table=text, runs=found, keeps_other_processors=True)


if __name__ == "__main__":
    typer.run(main)
