"""A pool whose tasks share their labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd

from benchmarks.paper.answering.runs import Bench
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.stages import flan_pool


def test_the_tasks_have_one_set_of_labels_and_several_sources_and_languages() -> None:
    specs = flan_pool.chosen_tasks(list(read_task_list().by_name.values()))
    assert len({spec.name for spec in specs}) == flan_pool.NUM_TASKS == 12
    assert {frozenset(spec.labels) for spec in specs} == {frozenset(["positive", "negative", "neutral", "ambivalent"])}
    sources = Counter(spec.path.split("/")[3].split("_")[0] for spec in specs)
    languages = Counter(spec.path.split("/")[3].rpartition("_")[2] for spec in specs)
    assert len(sources) == 4 and len(languages) == 8 and "all" not in sources


def test_the_sentences_have_the_scores_of_the_rows(tmp_path: Path) -> None:
    scores = {"mixture_iid": 0.5, "selection_iid": 0.25, "mixture_ood": 0.75, "selection_ood": 0.125, "majority": 0.5}
    scores |= {"fusion_iid": 0.625, "fusion_ood": 0.0, "perfect": 1.0}
    rows = [{"run": run, "task": task, "number": 0, "score": score} for run, score in scores.items() for task in "abc"]
    assert flan_pool.sentence(tmp_path) == flan_pool.summary(tmp_path)
    pd.DataFrame(rows).to_parquet(tmp_path / flan_pool.ROWS)
    words = "the mixture has 50.0 %, selection 25.0 %, and without the own adapter 75.0 and 12.5 %."
    assert words in flan_pool.summary(tmp_path)
    found = flan_pool.sentence(tmp_path)
    assert "On 3 tasks" in found and "50.0 % in distribution and selection 25.0 %." in found
    assert "they have 75.0 and 12.5 %, guessing 50.0 %." in found
    assert "over selection are 25.0 (25.0 to 25.0) and 62.5 (62.5 to 62.5) points." in found
    assert "Fusion has 62.5 and 0.0 %." in found


def test_the_stage_compares_the_papers_methods_with_the_default(bench: Bench, tmp_path: Path) -> None:
    flan_pool.measure(bench, tmp_path, 2)
    before = bench.asker.engine.counters.num_requests
    flan_pool.measure(bench, tmp_path, 2)
    assert bench.asker.engine.counters.num_requests == before
    rows = pd.read_parquet(tmp_path / flan_pool.ROWS)
    assert set(rows["run"]) == {*flan_pool.methods(), "majority"}
    text = flan_pool.section(rows)
    assert all(f"{one} − {other}".replace("_", " ") in text for one, other in flan_pool.PAIRS)
