"""Measure throughput by batch size and latency by method, on an idle machine: `... benchmarks.paper.stages.speed`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console

from benchmarks import plots
from benchmarks.paper.answering.answers import Asked, Question
from benchmarks.paper.answering.methods import MAIN, AdapterSoup, Base, First, Perfect, Routed
from benchmarks.paper.answering.runs import Bench, Method, pool_retriever
from benchmarks.paper.common.markdown import plot, table
from benchmarks.paper.common.options import EncoderName, Root
from benchmarks.paper.common.resumable import Step, key_of, run_steps, write_parquet
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.baselines import One, trained_baselines
from benchmarks.paper.stages.main_table import load_bench
from benchmarks.results_file import machine
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Job, SamplingParams
from gpu_worker.native.loop import Engine
from retriever_svc import Encoder, Retriever
from retriever_svc.encoder_files import ENGLISH_MODEL

THROUGHPUT, LATENCY = "throughput.parquet", "latency.parquet"
BATCHES = (1, 2, 4, 8, 16, 32)
BATCHED: dict[str, Method] = {
    "base": Base(),
    "one adapter": First(),
    "own adapter each": Perfect(),
    "fusion": Routed("fusion"),
    "mixture": Routed("mixture"),
}
FIRST, FULL = 1, 16  # new tokens: as in the paper, and about the longest answers of the tasks
_SINGLE = "one adapter"  # for the whole batch; apparently the paper's baseline
_FOR_ALL = (AdapterSoup, One)  # one plan for all requests
_NUM_ROUNDS = 3
_SECONDS_A_QUESTION = 20.0  # of the throughput; the latency of a method takes a tenth of it


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one batch in the engine to its first token and to its end, and its prompt and new tokens."""

    first_s: float
    all_s: float
    num_prompt: int
    num_new: int


def spend(engine: Engine, asked: Sequence[Asked], num_new: int) -> Spent:
    """Generate for all of `asked` at once, `num_new` tokens each. Missing adapters are loaded before timing starts."""
    sampling = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
    counters, before = engine.counters, engine.counters.copy()
    for number, (question, plan) in enumerate(asked):
        job = Job(str(number), (Message("user", question.item.input),), plan, sampling)
        engine.submit(engine.prepare(job, lambda _: None))
    while not all(load.done() for row in engine.waiting for load in row.loads.values()):
        engine.loaded.wait(0.1)
    began, first_s = time.perf_counter(), 0.0
    while engine.has_work:
        engine.step()
        if not first_s and counters.num_new_tokens > before.num_new_tokens:
            first_s = time.perf_counter() - began
    num_prompt = counters.num_prompt_tokens - before.num_prompt_tokens
    return Spent(first_s, time.perf_counter() - began, num_prompt, counters.num_new_tokens - before.num_new_tokens)


def throughput_rows(bench: Bench, num_questions: int, num_rounds: int = _NUM_ROUNDS) -> pa.Table:
    """Return a row per method, batch size, number of new tokens and round. Methods alternate within a round."""
    questions = bench.study.questions("test", 1 + num_questions // len(bench.study.specs))[:num_questions]
    asked = {
        name: list(zip(questions, method.plans(bench.retriever, questions), strict=True))
        for name, method in BATCHED.items()
    }
    for pairs in asked.values():
        spend(bench.asker.engine, pairs, FIRST)  # all adapters are in the bank and all shapes have been used
    rows = []
    for number in range(num_rounds):
        for num_new in (FIRST, FULL):
            for batch in (size for size in BATCHES if size <= num_questions):
                for name, pairs in asked.items():
                    spent = [
                        spend(bench.asker.engine, pairs[start : start + batch], num_new)
                        for start in range(0, num_questions - batch + 1, batch)
                    ]
                    tokens = sum(one.num_prompt + one.num_new for one in spent)
                    seconds = sum(one.all_s for one in spent)
                    row = {"round": number, "new_tokens": num_new, "batch": batch, "method": name}
                    rows.append(row | {"tokens": tokens, "seconds": seconds})
    return pa.Table.from_pylist(rows)


def latency_rows(bench: Bench, methods: Mapping[str, Method], num_questions: int) -> pa.Table:
    """Return a row per method and question, one at a time: time of plan, first token, each further token.

    Methods alternate. If one plan serves all questions, it is made before, and no request waits for it.
    """
    questions = bench.study.questions("test", 1 + num_questions // len(bench.study.specs))[:num_questions]
    asked = {
        name: list(zip(questions, method.plans(bench.retriever, questions), strict=True))
        for name, method in methods.items()
    }
    for pairs in asked.values():
        spend(bench.asker.engine, pairs, FIRST)
    rows = []
    for number, question in enumerate(questions):
        for name, method in methods.items():
            plan_ms = 0.0 if isinstance(method, _FOR_ALL) else _plan_ms(method, bench.retriever, question)
            spent = spend(bench.asker.engine, asked[name][number : number + 1], FULL)
            token_ms = 1000 * (spent.all_s - spent.first_s) / (spent.num_new - 1)
            times = {"plan_ms": plan_ms, "first_ms": 1000 * spent.first_s, "token_ms": token_ms}
            rows.append({"method": name, "prompt_tokens": spent.num_prompt, "machine": machine()} | times)
    return pa.Table.from_pylist(rows)


def _plan_ms(method: Method, retriever: Retriever, question: Question) -> float:
    began = time.perf_counter()
    method.plans(retriever, [question])
    return 1000 * (time.perf_counter() - began)


def throughput_table(rows: pd.DataFrame, num_new: int) -> str:
    """Return median tokens per second, in and out, and their ratio to those of a single adapter."""
    own = rows[rows["new_tokens"] == num_new].assign(pace=lambda frame: frame["tokens"] / frame["seconds"])
    pace = own.groupby(["batch", "method"])["pace"].median().unstack()
    lines = [
        [str(batch), *[f"{pace.loc[batch, name]:.0f}" for name in BATCHED]]
        + [f"{pace.loc[batch, name] / pace.loc[batch, _SINGLE]:.2f}" for name in ("fusion", "mixture")]
        for batch in pace.index
    ]
    return table(["batch", *BATCHED, "fusion / one", "mixture / one"], lines)


def latency_table(rows: pd.DataFrame) -> str:
    """Return medians and 90th percentiles, ms."""
    columns = ("plan_ms", "first_ms", "token_ms")
    lines = []
    for name, own in rows.groupby("method", sort=False):
        cells = [f"{own[column].median():.1f} / {own[column].quantile(0.9):.1f}" for column in columns]
        lines.append([str(name).replace("_", " "), *cells])
    return table(["method", "plan, ms", "first token, ms", "each further token, ms"], lines)


def section(throughput: pd.DataFrame, latency: pd.DataFrame) -> str:
    """Return the report's section."""
    return "\n".join(
        [
            "## Throughput and latency\n",
            f"{latency['machine'].iloc[0]}. Tokens per second, including prompt tokens as in the paper; plans are"
            " made before. `one adapter`: one for the whole batch; `own adapter each`: one for each of its tasks.\n",
            "### First token only\n",
            plot("throughput", "tokens per second by batch size, first token only"),
            throughput_table(throughput, FIRST),
            f"### {FULL} tokens each\n",
            throughput_table(throughput, FULL),
            "### One request at a time, median / 90th percentile\n",
            "`plan`: encoder and search for a text that is new to the encoder, 0 if one composition serves all; the"
            f" other columns are the engine's time. {latency.groupby('method').size().iloc[0]} questions per method.\n",
            latency_table(latency),
        ]
    )


def _plot(rows: pd.DataFrame) -> None:
    pace = rows.assign(pace=lambda frame: frame["tokens"] / frame["seconds"])
    medians = pace[pace["new_tokens"] == FIRST].groupby(["method", "batch"])["pace"].median()
    curves = {name: list(medians[name].items()) for name in BATCHED}
    plots.lines("paper/throughput", curves, "batch", "tokens per second, first token only")


def write_tables(folder: Path) -> None:
    """Write the section of the report and its plot from the rows in `folder`."""
    throughput, latency = (pd.read_parquet(folder / name) for name in (THROUGHPUT, LATENCY))
    (folder / "speed.md").write_text(section(throughput, latency), encoding="utf-8")
    _plot(throughput)


def measure(
    bench: Bench, methods: Mapping[str, Method], folder: Path, num_questions: int, num_rounds: int = _NUM_ROUNDS
) -> None:
    """Save rows of both kinds in `folder`. Existing results of this workspace over this pool are not measured again."""
    key = key_of(list(bench.study.specs), list(methods), num_questions, num_rounds)
    kept, cost = bench.study.workspace.rows / "speed" / key, _SECONDS_A_QUESTION * num_questions
    few = max(1, num_questions // 2)
    steps = [
        Step("throughput", kept / THROUGHPUT, cost, lambda: throughput_rows(bench, num_questions, num_rounds)),
        Step("latency", kept / LATENCY, cost / 10, lambda: latency_rows(bench, methods, few)),
    ]
    run_steps(steps, 1.0, bench.out)
    for step in steps:
        write_parquet(folder / step.path.name, pq.read_table(step.path))


def main(
    num_questions: Annotated[int, typer.Option(help="test questions of all tasks, at least the largest batch")] = 32,
    encoder: EncoderName = ENGLISH_MODEL,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Measure missing results, then write the section and the plot."""
    workspace, out = Workspace(root), Console(width=120)
    reader = Encoder(encoder, max_cached_texts=0)  # no text is cached
    loaded = load_bench(workspace, encoder, out)
    bench = replace(loaded.bench, retriever=pool_retriever(loaded.bench.study, loaded.bench.asker, reader))
    measure(bench, MAIN | trained_baselines(loaded, reader), PAPER_RESULTS, num_questions)
    write_tables(PAPER_RESULTS)


if __name__ == "__main__":
    typer.run(main)
