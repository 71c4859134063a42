"""Measure the answers of adapters over integer weights: `python -m benchmarks.paper.stages.integers`.

The adapters were trained on the bfloat16 model. Each question is answered with its own adapter.
"""

from __future__ import annotations

import pyarrow as pa

from benchmarks.integer_weights import PLAIN, all_settings
from benchmarks.paper.answering.methods import Perfect
from benchmarks.paper.answering.runs import run_all
from benchmarks.paper.stages.answers import Claim
from benchmarks.paper.stages.stage import PACKAGED, Context, Stage, run

ARMS = {PLAIN: PLAIN, "file_integers": "the file's integers", "int8": "int8", "int4": "int4"}
"""The kinds of weights, by arm."""


def answer_with_integers(context: Context) -> pa.Table:
    """Return the rows of one arm for each kind of weights, one engine after the other."""
    tables = []
    for arm, kind in ARMS.items():
        bench = context.load(**all_settings()[kind]).bench
        tables.append(run_all(bench, {arm: Perfect()}, context.per_task, context.folder))
    return pa.concat_tables(tables)


STAGE = Stage(
    name="integers",
    title="Own adapters over integer weights",
    note="The adapters were trained on the bfloat16 model.",
    rows=answer_with_integers,
    claims=tuple(
        Claim(f"Answers with {kind} are as good as in bfloat16.", arm, PLAIN, "at least")
        for arm, kind in ARMS.items()
        if arm != PLAIN
    ),
    per_task=25,
    encoder=PACKAGED,
)

if __name__ == "__main__":
    run(STAGE)
