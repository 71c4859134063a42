"""Measure answers by the encoder's share of training tasks: `python -m benchmarks.paper.stages.shares`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console

from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, Method, pool_retriever, run_all
from benchmarks.paper.answering.study import Study
from benchmarks.paper.common.intervals import Interval
from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.options import PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.retrieval.loading import load_experiments
from benchmarks.paper.retrieval.projected import projected_encoders
from benchmarks.paper.retrieval.study import UNTRAINED, main_draws
from benchmarks.paper.stages.answer_tables import Answers
from benchmarks.paper.stages.main_table import load_bench
from retriever_svc import Encoder
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "shares.parquet"
UNTRAINED_LABEL, PROJECTED = "nothing", "nothing, with a projection"
METHODS: dict[str, Method] = {
    f"{strategy}_{pool}": Routed(strategy, top_k, masks_own=masked)
    for strategy, top_k in (("selection", 1), ("mixture", 3))
    for pool, masked in (("iid", False), ("ood", True))
}


def share_rows(bench: Bench, encoders: Mapping[str, Encoder], per_task: int) -> pa.Table:
    """Return rows of every method under every encoder. Runs are named `<encoder> <method>`."""
    tables = []
    for label, encoder in encoders.items():
        own = replace(bench, retriever=pool_retriever(bench.study, bench.asker, encoder))
        methods = {f"{label} {name}": method for name, method in METHODS.items()}
        tables.append(run_all(own, methods, per_task, bench.study.workspace.rows / "shares"))
    return pa.concat_tables(tables)


def projected(encoder: Encoder, study: Study) -> Encoder:
    """Return the encoder with a projection fitted to the pool's samples, the reference that needs no training."""
    samples = {name: [item.input for item in study.parts[name].samples] for name in study.specs}
    return dict(projected_encoders(encoder, samples))["refit"]


def section(rows: pd.DataFrame) -> str:
    """Return the report's section."""
    answers = Answers(rows, {})
    labels = dict.fromkeys(run.rpartition(" ")[0] for run in answers.runs)
    lines = [[label, *[answers.interval(f"{label} {name}").in_percent() for name in METHODS]] for label in labels]
    count = answers.scores(answers.runs[0]).shape[1]
    words = (
        f"{count} questions per task; percent with 95 % intervals. One encoder per share, from the first draw of tasks;"
        " the main table uses the best of three draws.\n"
    )
    header = ["encoder trained on", *[name.replace("_", " ") for name in METHODS]]
    return "\n".join(["## The encoder's training and the answers\n", words, table(header, lines)])


def gain_over_projection(answers: Answers, strategy: str, *, seen: bool) -> Interval:
    """Return what training on 40 % of the tasks gives more than the projection, on those tasks or on the others."""
    trained_on = main_draws(read_pool())[0].tasks
    pair = f"40% {strategy}_iid", f"{PROJECTED} {strategy}_iid"
    return answers.difference_on(*pair, lambda task: (task in trained_on) == seen)


def sentence(folder: Path) -> str:
    """Return what the projection and the training change in answers in distribution."""
    if not (folder / ROWS).exists():
        return "Answers by the encoder's training were not measured yet."
    answers = Answers(pd.read_parquet(folder / ROWS), {})
    num_seen = len(main_draws(read_pool())[0].tasks)
    gains = [
        answers.difference(f"{label} {strategy}_iid", f"{UNTRAINED_LABEL} {strategy}_iid").in_percent()
        for strategy in ("selection", "mixture")
        for label in (PROJECTED, "40%")
    ]
    unseen, seen = (gain_over_projection(answers, "selection", seen=seen).in_percent() for seen in (False, True))
    return (
        f"In distribution the projection adds {gains[0]} points to the right answers of selection, the training"
        f" {gains[1]}; to those of the mixture they add {gains[2]} and {gains[3]}. With selection the trained"
        f" encoder leads the projection by {seen} points on the {num_seen} tasks of its training, and by {unseen}"
        " on the others."
    )


def main(
    per_task: PerTask = 20,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Answer under the encoders of the retrieval study's first seed, write rows and the report's section."""
    workspace = Workspace(root)
    bench, experiments = load_bench(workspace, ENGLISH_MODEL, Console(width=120)).bench, load_experiments(workspace)
    study = experiments.study
    draws = [draw for draw in study.draws() if draw.seed == study.seeds[0] and not draw.whole_clusters]
    named = {f"{draw.share:.0%}": draw.name for draw in sorted(draws, key=lambda draw: draw.share)}
    encoders = {label: experiments.encoder(name) for label, name in {UNTRAINED_LABEL: UNTRAINED, **named}.items()}
    encoders[PROJECTED] = projected(experiments.encoder(UNTRAINED), bench.study)
    write_parquet(PAPER_RESULTS / ROWS, share_rows(bench, encoders, per_task))
    (PAPER_RESULTS / "shares.md").write_text(section(pd.read_parquet(PAPER_RESULTS / ROWS)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
