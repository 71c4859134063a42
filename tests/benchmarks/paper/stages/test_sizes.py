"""Answers by the size of the pool, on the tiny study."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.paper.answering.runs import Bench
from benchmarks.paper.stages import sizes
from benchmarks.paper.stages.sizes import Group, groups_of
from retriever_svc import Encoder
from tests.benchmarks.tiny_study import SPECS


def test_larger_pools_have_all_of_the_smaller_ones_and_every_task_is_asked_once() -> None:
    names, further = [f"task{n}" for n in range(46)], ["new1", "new2"]
    groups = groups_of(names, further)
    assert len(groups) == 4 and len({name for group in groups for name in group.asked}) == 40
    for group in groups:
        assert list(group.pools) == [10, 20, 46, 48]
        assert set(group.asked) == set(group.pools[10]) < set(group.pools[20]) < set(group.pools[46]) == set(names)
        assert set(group.pools[48]) == {*names, *further}
        assert all(len(set(pool)) == size for size, pool in group.pools.items())
    assert groups == groups_of(names, further)


def test_every_pool_answers_the_same_questions_with_its_own_adapters(
    bench: Bench, encoder: Encoder, tmp_path: Path
) -> None:
    names = [spec.name for spec in SPECS]
    groups = [Group((name,), {2: (name, names[n - 1]), 3: tuple(names)}) for n, name in enumerate(names[:2])]
    sizes.measure(bench, encoder, groups, tmp_path, 1)
    before = bench.asker.engine.counters.num_requests
    sizes.measure(bench, encoder, groups, tmp_path, 1)
    assert bench.asker.engine.counters.num_requests == before
    rows = pd.read_parquet(tmp_path / sizes.ROWS)
    assert rows.groupby("run").size().eq(len(groups)).all()
    assert set(rows["run"]) == {f"{size}_{name}" for size in (2, 3) for name in sizes.METHODS}
    pools = {(group.asked[0], size): set(pool) for group in groups for size, pool in group.pools.items()}
    for row in rows.itertuples():
        assert set(row.adapters) <= pools[row.task, int(row.run[0])]
        assert row.run[2:] not in ("selection_ood", "mixture_ood") or row.task not in row.adapters
    assert rows[rows["run"] == "2_mixture_iid"]["adapters"].map(len).eq(2).all()
    text = (tmp_path / "sizes.md").read_text()
    assert "| 3 selection iid − 2 selection iid |" in text and "\n| 2 | " in text
