"""Rerank where neighbours share function, and compare both pools: `python -m benchmarks.paper.stages.rerank_flan`.

The pool is that of `flan_pool`, the ways to choose and to compose are those of `rerank`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import typer
from rich.console import Console

from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.workspace import DEFAULT_ROOT, Workspace
from benchmarks.paper.stages import rerank
from benchmarks.paper.stages.answer_tables import Answers
from benchmarks.paper.stages.flan_pool import load_flan_pool
from retriever_svc.encoder_files import ENGLISH_MODEL

NAME = "rerank_flan"
ROWS = f"{NAME}.parquet"
TITLE = "Reranking where tasks share their labels"
WAYS = {
    rerank.MIXTURE: "the paper's mixture",
    rerank.SOFTMAX: "softmax weights",
    rerank.AUTO: "`auto`, without abstention",
    "likelihood": "log probability of the answer",
    "likelihood_calibrated": "the same, calibrated",
    "arrow_calibrated": "Arrow, calibrated",
    "spectr_calibrated": "SpectR, calibrated",
    "norm_calibrated": "norm (LoGo), calibrated",
    rerank.BEST: "the best of the three, by its score",
}


def both_pools(folder: Path) -> str:
    """Return a table of each way against the nearest adapter alone, over the study's pool and the one like Flan."""
    pools = [Answers(pd.read_parquet(folder / file), {}) for file in (rerank.ROWS, ROWS) if (folder / file).exists()]
    if len(pools) < 2 or any(f"{way}_iid" not in answers.runs for way in WAYS for answers in pools):
        return "Both pools were not reranked in the same ways yet."
    lines = [
        [words, *[_against_first(answers, way, part) for answers in pools for part in rerank.POOLS]]
        for way, words in WAYS.items()
    ]
    sizes = ["{} × {}".format(*answers.scores(f"{rerank.FIRST}_iid").shape) for answers in pools]
    header = [f"{size}, {part}" for size in sizes for part in rerank.POOLS]
    words = "Points against selection, with the encoder trained on 40 %; the header has tasks × questions.\n\n"
    return words + table(["points against selection", *header], lines).rstrip("\n")


def _against_first(answers: Answers, way: str, part: str) -> str:
    return answers.difference(f"{way}_{part}", f"{rerank.FIRST}_{part}").in_percent()


def main(per_task: PerTask = 20, encoder: EncoderName = ENGLISH_MODEL, root: Root = DEFAULT_ROOT) -> None:
    """Measure `rerank` over the pool of `flan_pool`."""
    workspace = Workspace(root)
    rerank.rerank(load_flan_pool(workspace, encoder, Console(width=120)), workspace, per_task, NAME, TITLE)


if __name__ == "__main__":
    typer.run(main)
