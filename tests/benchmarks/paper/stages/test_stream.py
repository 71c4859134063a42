"""The stream over a changing pool, on the tiny study."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.stages import stream
from benchmarks.paper.stages.main_table import Loaded
from benchmarks.paper.stages.stream import FOLLOWS, FROZEN, OWN, Shape, stretches_of
from benchmarks.training.bigbench_tasks import Item
from retriever_svc import Encoder

SMALL = Shape(num_changes=1, num_requests=8, num_coming=1, num_swapped=1, num_replaced=1)


def test_changes_withdraw_publish_and_replace_without_repeating_a_name() -> None:
    names = [f"task{n}" for n in range(30)]
    questions = {name: [Question(name, "test", n, Item(f"{name} {n}", ("",)), 1) for n in range(3)] for name in names}
    first = {name: f"{name}.flipped" for name in names[:6]}
    found = stretches_of(questions, first, Shape())
    assert len(found) == 5 and all(len(stretch.requests) == 100 for stretch in found)
    assert len(found[0].current) == 18 and all(found[0].current[name] == own for name, own in first.items())
    gone: set[str] = set()
    for before, after in pairwise(found):
        gone |= set(after.withdrawn)
        assert set(after.withdrawn) <= before.current.keys() - first.keys() | set().union(*(s.replaced for s in found))
        arrived = after.published.keys() - after.replaced
        assert len(arrived) == len(after.withdrawn) == 3 and not arrived & before.current.keys()
        assert all(before.current[name] != name == after.current[name] for name in after.replaced)
        assert {after.kind(name) for name in arrived} == {"arrived"}
        assert {q.task for q in after.requests} <= after.current.keys() and not gone & after.current.keys()
    assert sum(len(stretch.replaced) for stretch in found) == 6
    counts = Counter(q.task for q in found[0].requests).most_common()
    assert counts[0][1] > 15 and counts[0][1] > 3 * counts[len(counts) // 2][1]
    of_first = [q.number for q in found[0].requests if q.task == counts[0][0]]
    assert of_first == [n % 3 for n in range(len(of_first))]


def test_only_the_retriever_that_follows_finds_new_adapters_and_versions(
    loaded: Loaded, encoder: Encoder, tmp_path: Path
) -> None:
    """The first version of `animals` is the adapter of another task."""
    assert stream.sentence(tmp_path) == "Answers in a changing pool were not measured yet."
    stream.measure(loaded, encoder, {"animals": "cities"}, tmp_path, 3, SMALL)
    counters = loaded.bench.asker.engine.counters
    before = counters.num_requests
    stream.measure(loaded, encoder, {"animals": "cities"}, tmp_path, 3, SMALL)
    assert counters.num_requests == before
    rows = pd.read_parquet(tmp_path / stream.ROWS)
    assert rows.groupby(["router", "method", "stretch"]).size().eq(SMALL.num_requests).all()
    own = rows[rows["router"] == OWN]
    assert own["hit"].all() and own[own["stretch"] == 1]["score"].eq(1).all()
    assert own[(own["stretch"] == 0) & (own["task"] == "animals")]["score"].eq(0).all()
    new = rows[(rows["stretch"] == 1) & rows["kind"].isin(["arrived", "replaced"])]
    assert set(new["kind"]) == {"arrived", "replaced"} and (rows[rows["kind"] == "replaced"]["task"] == "animals").all()
    assert not new[new["router"] == FROZEN]["hit"].any()
    assert new[new["router"] == FOLLOWS]["hit"].mean() > 0.8
    found = stream.following(rows)
    assert found.mean == pytest.approx(_mean(new, FOLLOWS) - _mean(new, FROZEN)) and found.mean > 0.5
    assert "| follows auto |" in (tmp_path / "stream.md").read_text()
    assert "with an index that does not follow" in stream.sentence(tmp_path)


def _mean(rows: pd.DataFrame, router: str) -> float:
    """Return the mean score of `auto`."""
    return float(rows[(rows["router"] == router) & (rows["method"] == "auto")]["score"].mean())
