"""Reranking on the tiny study, whose adapters have all been retrieved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from benchmarks.paper.answering.answers import Asker
from benchmarks.paper.answering.spectral import SIGNALS
from benchmarks.paper.stages import rerank
from benchmarks.paper.stages.gate import adapters_of
from benchmarks.paper.stages.main_table import Loaded
from benchmarks.training.adapter_files import load_base
from tests.benchmarks.tiny_study import SPECS

PER_TASK = 2
_SCORES = [("first", 0.0), ("best", 1.0), ("auto", 1.0), ("mixture", 1.0), ("likelihood", 0.5), ("norm", 0.0)]


def test_the_stage_chooses_among_answers_that_are_computed_once(
    loaded: Loaded, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    assert rerank.sentence(tmp_path) == "Reranking was not measured yet."
    bench = loaded.bench
    scored = Asker(bench.asker.engine, tmp_path / "scored.jsonl", with_logprobs=True)
    reader = rerank.Reader(load_base(tiny_folders["gemma3"]), bench.study.tokenizer, adapters_of(loaded))
    rerank.measure(bench, scored, reader, tmp_path, PER_TASK)
    before = bench.asker.engine.counters.num_requests
    rerank.measure(bench, scored, reader, tmp_path, PER_TASK)
    assert bench.asker.engine.counters.num_requests == before
    rows = pd.read_parquet(tmp_path / rerank.ROWS)
    names = {"first", "best", "likelihood", "likelihood_calibrated", *SIGNALS, *[f"{s}_calibrated" for s in SIGNALS]}
    assert set(rows["run"]) == {f"{name}_{pool}" for name in {*names, *rerank.COMPOSED} for pool in rerank.POOLS}
    weights = {run: list(own["weights"].iloc[0]) for run, own in rows.groupby("run")}
    assert len(set(weights["mixture_iid"])) == 1 < len(set(weights["softmax_iid"]))
    assert rows.groupby("run").size().eq(PER_TASK * len(SPECS)).all()
    scores = rows.pivot_table(index="run", values="score")["score"]
    for pool in rerank.POOLS:
        assert scores[f"best_{pool}"] >= max(scores[f"{name}_{pool}"] for name in names)
    assert scores["best_iid"] == 1.0
    ood = rows[rows["run"].str.endswith("_ood")]
    assert not any(row.task in row.adapters for row in ood.itertuples())
    tops = pd.read_parquet(tmp_path / rerank.TOPS)
    assert tops["place"].between(1, len(SPECS)).all() and len(tops) == 6 * PER_TASK * len(SPECS)
    assert "| likelihood calibrated |" in (tmp_path / "rerank.md").read_text()
    assert "0 of 8 ways" in rerank.sentence(tmp_path)
    made = pd.DataFrame([{"run": f"{n}_iid", "task": t, "number": 0, "score": s} for n, s in _SCORES for t in "ab"])
    made.to_parquet(tmp_path / rerank.ROWS)
    assert "gain 100.0 (100.0 to 100.0) points in distribution; 1 of 2 ways" in rerank.sentence(tmp_path)


def test_signals_come_back_in_the_order_of_the_questions(loaded: Loaded, tiny_folders: Mapping[str, Path]) -> None:
    study = loaded.bench.study
    reader = rerank.Reader(load_base(tiny_folders["gemma3"]), study.tokenizer, adapters_of(loaded))
    questions = sorted(study.questions("test", 4), key=lambda question: -len(question.item.input))
    together = reader.signals(questions)
    for number in (0, len(questions) - 1):
        alone = reader.signals([questions[number]])
        for name in SIGNALS:
            assert (together[name][number] - alone[name][0]).abs().max() < 1e-2 * alone[name].abs().max()


def test_the_place_of_the_own_adapter_counts_those_with_higher_scores(loaded: Loaded) -> None:
    [question] = loaded.bench.study.questions("test", 1)[:1]
    others = [spec.name for spec in SPECS if spec.name != question.task]
    scores = {question.task: 2.0, others[0]: 3.0, others[1]: 2.0}
    [row] = rerank.top_rows([question], {"arrow": [scores]}).to_pylist()
    assert row["place"] == 2
