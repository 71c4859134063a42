"""The list of claims."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.paper.__main__ import STAGES
from benchmarks.paper.common.workspace import PAPER_RESULTS
from benchmarks.paper.stages.answer_tables import BASELINES, ROWS
from benchmarks.paper.stages.claim_list import PAPERS
from benchmarks.paper.stages.claims import Results
from benchmarks.paper.stages.claims_beyond import BEYOND


def test_every_claim_names_the_stage_that_measures_its_rows() -> None:
    names = {stage.name for stage in STAGES}
    every = [*PAPERS, *BEYOND]
    assert len(every) > 20 and {claim.stage for claim in every} <= names
    assert len({claim.text for claim in every}) == len(every)


def test_the_rows_of_every_claim_are_committed_or_named_as_missing() -> None:
    """Only names are compared here; the report's own test computes some of the claims."""
    known = {path.name for path in PAPER_RESULTS.glob("*.parquet")}
    assert {name for claim in PAPERS for name in claim.rows} <= known


def test_nine_tenths_are_compared_question_by_question(tmp_path: Path) -> None:
    _rows({"selection_iid": {"a": 1.0, "b": 0.8}, "perfect": {"a": 1.0, "b": 1.0}}).to_parquet(tmp_path / ROWS)
    _rows({"smear": {"a": 0.0, "b": 0.0}}).to_parquet(tmp_path / BASELINES)
    found = PAPERS[0].difference(Results(tmp_path))
    assert found.mean == pytest.approx(0.0) and np.allclose([found.low, found.high], [-0.1, 0.1])


def _rows(scores: dict[str, dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"run": run, "task": task, "number": 0, "score": value}
            for run, tasks in scores.items()
            for task, value in tasks.items()
        ]
    )
