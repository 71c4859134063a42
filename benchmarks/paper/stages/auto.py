"""Measure the answers of `auto` with the server's defaults: `python -m benchmarks.paper.stages.auto`.

The composition's settings are compared on the choice part. The defaults are then measured on the test part, in and out
of distribution, and over a stream of half in-pool and half everyday prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.auto import Auto
from benchmarks.paper.answering.methods import Base, Perfect
from benchmarks.paper.answering.runs import Bench, Method
from benchmarks.paper.answering.stores import packaged_encoder
from benchmarks.paper.common.intervals import NUM_RESAMPLES, Interval
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.tasks import NUM_TEST
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.retrieval.projected import read_everyday, read_fresh
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.main_table import load_loaded
from benchmarks.results_file import write_part
from benchmarks.training.bigbench_tasks import Item

SWEEP, ROWS, EVERYDAY, FRESH = (f"{name}.parquet" for name in ("auto_sweep", "auto", "auto_everyday", "auto_fresh"))
TEMPERATURES = (0.02, 0.05, 0.1, 0.2)
MIN_LEADS = (1.0, 2.0, 3.0, 5.0)
CLOSE = (0.0, 0.05, 0.1, 0.2)
_EVERYDAY_TOKENS = 24
_CHOICE_PER_TASK = 10


def sweep() -> dict[str, Method]:
    """Return the settings to compare, in (`iid`) and out of distribution (`ood`). None of them abstains."""
    ways = {"selection": Auto("selection"), "uniform": Auto(weighting="uniform")}
    ways |= {f"softmax_{t:g}": Auto(weighting="softmax", temperature=t) for t in TEMPERATURES}
    ways |= {f"evidence_{t:g}": Auto(temperature=t) for t in TEMPERATURES}
    ways |= {f"evidence_0.1_lead_{lead:g}": Auto(temperature=0.1, min_lead=lead) for lead in MIN_LEADS}
    ways |= {f"evidence_0.1_close_{close:g}": Auto(temperature=0.1, close_scores=close) for close in CLOSE}
    return _both(ways, abstains=False)


def defaults() -> dict[str, Method]:
    """Return the default, selection and the paper's mixture, with and without abstention, and the references."""
    ways = {"auto": Auto(), "selection": Auto("selection"), "uniform": Auto(weighting="uniform")}
    found: dict[str, Method] = {"own": Perfect(), "base": Base()}
    found |= _both(ways, abstains=True)
    return found | {f"{name}_always": way for name, way in _both(ways, abstains=False).items()}


def _both(ways: Mapping[str, Auto], *, abstains: bool) -> dict[str, Method]:
    return {
        f"{name}_{pool}": Auto(
            way.strategy, way.weighting, way.top_k, way.temperature, way.min_lead, way.close_scores, abstains, masked
        )
        for pool, masked in (("iid", False), ("ood", True))
        for name, way in ways.items()
    }


def run(bench: Bench, methods: Mapping[str, Method], per_task: int, part: str) -> pa.Table:
    """Return the rows of every method."""
    return pa.concat_tables([bench.run(name, method, per_task, part) for name, method in methods.items()])


def everyday_rows(bench: Bench, texts: Sequence[str]) -> pa.Table:
    """Return a row for each of these texts: the adapters `auto` chose, and whether the base model answers the same."""
    questions = [
        Question("", "everyday", number, Item(text, ("",)), _EVERYDAY_TOKENS) for number, text in enumerate(texts)
    ]
    plans = Auto().plans(bench.retriever, questions)
    base = Base().plans(bench.retriever, questions)
    said = bench.asker.answers(list(zip(questions, plans, strict=True)), bench.out, "everyday prompts")
    wanted = bench.asker.answers(list(zip(questions, base, strict=True)), bench.out, "everyday prompts, base model")
    rows = [
        {
            "number": question.number,
            "adapters": [adapter.ref.name for adapter in plan.adapters],
            "abstained": not plan.adapters,
            "same": one.strip() == other.strip(),
        }
        for question, plan, one, other in zip(questions, plans, said, wanted, strict=True)
    ]
    return pa.Table.from_pylist(rows)


def stream(answers: Answers, same: Sequence[bool], oracle: str = "auto_iid_always") -> dict[str, Interval]:
    """Return the score of a stream of half in-pool and half everyday prompts, the oracle's, and their ratio.

    An in-pool prompt scores as in the study. An everyday prompt scores 1 if the answer equals the base model's. The
    oracle knows which is which: it never abstains in-pool, and always does for everyday prompts.
    """
    rng = np.random.default_rng(0)
    flags = np.asarray(same, float)
    served, known = (answers.scores(run).to_numpy() for run in ("auto_iid", oracle))
    tasks, queries = served.shape
    draws = [
        (rng.integers(0, queries, (tasks, queries)), rng.integers(0, len(flags), len(flags)))
        for _ in range(NUM_RESAMPLES)
    ]
    rows = np.arange(tasks)[:, np.newaxis]
    resampled = np.array([_stream(served[rows, q], known[rows, q], flags[e]) for q, e in draws])
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    means = _stream(served, known, flags)
    names = ("stream", "oracle", "stream_over_oracle")
    return {name: Interval(float(means[i]), float(low[i]), float(high[i])) for i, name in enumerate(names)}


def _stream(served: np.ndarray, known: np.ndarray, same: np.ndarray) -> tuple[float, float, float]:
    ours, oracle = (served.mean() + same.mean()) / 2, (known.mean() + 1) / 2
    return ours, oracle, ours / oracle


def sweep_table(chosen: pd.DataFrame) -> str:
    """Return the compared settings."""
    sweeps = Answers(chosen, {})
    lines = [
        [name, *[sweeps.interval(f"{name}_{pool}").in_percent() for pool in ("iid", "ood")]]
        for name in dict.fromkeys(run.rpartition("_")[0] for run in sweeps.runs)
    ]
    return table(["composition", "iid", "ood"], lines)


def section(
    chosen: pd.DataFrame | None, rows: pd.DataFrame, everyday: pd.DataFrame, fresh: pd.DataFrame | None = None
) -> str:
    """Return the report's section. `chosen`: the compared settings. `chosen` and `fresh` may not be measured yet."""
    answers = Answers(rows, {})
    names = [[run.replace("_", " "), answers.interval(run).in_percent()] for run in answers.runs]
    pairs = [
        (f"auto_{pool}{end}", f"{way}_{pool}{end}")
        for end in ("", "_always")
        for pool in ("iid", "ood")
        for way in ("selection", "uniform")
    ]
    whole = stream(answers, list(everyday["same"]))
    parts = [
        "## `auto` with the server's defaults\n",
        "The packaged encoder with its projection. `iid`: every adapter can be chosen; `ood`: the question's own is",
        "masked. `evidence`: softmax with limited companions, the default. On the choice part, without abstention:\n",
        "Not measured yet.\n" if chosen is None else sweep_table(chosen),
        f"On the test part, {answers.scores('own').shape[1]} questions a task; `always`: without abstention.\n",
        table(["run", "percent (95 % interval)"], names),
        differences(answers, pairs),
        f"Over a stream of half in-pool and half everyday prompts ({len(everyday)} of them, which have set nothing):",
        "right answers and answers equal to the base model's. The oracle knows which is which.\n",
        table(["", "percent (95 % interval)"], [[name, found.in_percent()] for name, found in whole.items()]),
        f"Everyday prompts that went to the base model: {percent(everyday['abstained'].mean())} %;",
        f"answers equal to the base model's: {percent(everyday['same'].mean())} %.\n",
        *([] if fresh is None else _fresh_lines(answers, fresh)),
    ]
    return "\n".join(parts)


def _fresh_lines(answers: Answers, fresh: pd.DataFrame) -> list[str]:
    whole = stream(answers, list(fresh["same"]))
    return [
        f"The same with {len(fresh)} everyday prompts that were written after the projection and all thresholds were",
        f"chosen: {percent(fresh['abstained'].mean())} % went to the base model,",
        f"{percent(fresh['same'].mean())} % of the answers equal the base model's; the stream reaches",
        f"{whole['stream_over_oracle'].in_percent()} percent of the oracle.\n",
    ]


def figures(rows: pd.DataFrame, everyday: pd.DataFrame, fresh: pd.DataFrame | None = None) -> dict[str, float]:
    """Return the headline numbers as shares of 1. `fresh`: None if it was not measured."""
    answers = Answers(rows, {})
    found = {
        f"auto_minus_selection_{pool}{end}": answers.difference(f"auto_{pool}{end}", f"selection_{pool}{end}")
        for pool in ("iid", "ood")
        for end in ("", "_always")
    }
    found |= {f"auto_{name}": interval for name, interval in stream(answers, list(everyday["same"])).items()}
    named: dict[str, float] = {}
    for name, (mean, low, high) in found.items():
        named |= {name: mean, f"{name}_lo": low, f"{name}_hi": high}
    named["auto_everyday_same"] = float(everyday["same"].mean())
    if fresh is not None:
        named |= {
            "auto_fresh_same": float(fresh["same"].mean()),
            "auto_fresh_to_base": float(fresh["abstained"].mean()),
        }
    return {name: round(value, 4) for name, value in named.items()}


def write_tables(folder: Path) -> None:
    """Write the section and the numbers from the rows in `folder`."""
    rows, everyday = (pd.read_parquet(folder / name) for name in (ROWS, EVERYDAY))
    chosen, fresh = (pd.read_parquet(path) if path.exists() else None for path in (folder / SWEEP, folder / FRESH))
    text = section(chosen, rows, everyday, fresh)
    (folder / "auto.md").write_text(text, encoding="utf-8")
    write_part("paper", "auto", figures=figures(rows, everyday, fresh), table=text, runs=[])


def main(
    per_task: PerTask = NUM_TEST,
    choice_per_task: Annotated[int, typer.Option(help="choice questions of each task")] = _CHOICE_PER_TASK,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Compare settings on the choice part, measure the defaults on the test part, write rows and the section."""
    bench = load_loaded(Workspace(root), packaged_encoder(), Console(width=120)).bench
    write_parquet(PAPER_RESULTS / EVERYDAY, everyday_rows(bench, read_everyday()))
    write_parquet(PAPER_RESULTS / FRESH, everyday_rows(bench, read_fresh()))
    write_parquet(PAPER_RESULTS / ROWS, run(bench, defaults(), per_task, "test"))
    write_tables(PAPER_RESULTS)
    write_parquet(PAPER_RESULTS / SWEEP, run(bench, sweep(), choice_per_task, "choice"))
    write_tables(PAPER_RESULTS)


if __name__ == "__main__":
    typer.run(main)
