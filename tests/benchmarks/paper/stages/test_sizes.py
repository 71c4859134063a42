"""Answers by the size of the pool, on the tiny study."""

from __future__ import annotations

from benchmarks.paper.stages import sizes
from benchmarks.paper.stages.sizes import Group, split_groups
from benchmarks.paper.stages.stage import Context, Loaded
from tests.benchmarks.tiny_study import SPECS


def test_larger_pools_have_all_of_the_smaller_ones_and_every_task_is_asked_once() -> None:
    names, further = [f"task{n}" for n in range(46)], ["new1", "new2"]
    groups = split_groups(names, further)
    assert len(groups) == 4 and len({name for group in groups for name in group.asked}) == 40
    for group in groups:
        assert list(group.pools) == [10, 20, 46, 48]
        assert set(group.asked) == set(group.pools[10]) < set(group.pools[20]) < set(group.pools[46]) == set(names)
        assert set(group.pools[48]) == {*names, *further}
        assert all(len(set(pool)) == size for size, pool in group.pools.items())
    assert groups == split_groups(names, further)


def test_every_pool_answers_the_same_questions_with_its_own_adapters(loaded: Loaded) -> None:
    names = [spec.name for spec in SPECS]
    groups = [Group((name,), {2: (name, names[n - 1]), 3: tuple(names)}) for n, name in enumerate(names[:2])]
    bench = loaded.bench
    context = Context(bench.study.workspace, loaded.encoder, names, 1, bench.out)
    rows = sizes.answer_groups(loaded, groups, context).to_pandas()
    assert rows.groupby("run").size().eq(len(groups)).all()
    assert set(rows["run"]) == {f"{size}_{name}" for size in (2, 3) for name in sizes.METHODS}
    pools = {(group.asked[0], size): set(pool) for group in groups for size, pool in group.pools.items()}
    for row in rows.itertuples():
        assert set(row.adapters) <= pools[row.task, int(row.run[0])]
        assert row.run[2:] not in ("selection_ood", "mixture_ood") or row.task not in row.adapters
    assert rows[rows["run"] == "2_mixture_iid"]["adapters"].map(len).eq(2).all()
