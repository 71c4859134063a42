"""Measure answers while the pool grows: `python -m benchmarks.paper.stages.sizes`.

The same questions are asked over pools of 10, 20 and 46 adapters, and over all that the study has trained. A larger
pool has everything that a smaller one has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Method, pool_retriever, run_all
from benchmarks.paper.common.resumable import key_of
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.stages.answers import Claim
from benchmarks.paper.stages.stage import PACKAGED, Context, Loaded, Stage, run
from benchmarks.training.bigbench_tasks import task_rng

SIZES = (10, 20, 46)
NUM_ASKED = 10
"""Tasks of a group, which all of its pools have."""
METHODS: dict[str, Method] = {
    f"{name}_{pool}": method
    for pool, masked in (("iid", False), ("ood", True))
    for name, method in (
        ("selection", Routed("selection", 1, masks_own=masked)),
        ("mixture", Routed("mixture", masks_own=masked)),
        ("auto", Routed("mixture", weighting="evidence", masks_own=masked)),
    )
}


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks whose questions are asked, and the pools over which they are asked, by size."""

    asked: tuple[str, ...]
    pools: dict[int, tuple[str, ...]]


def split_groups(
    names: Sequence[str], further: Sequence[str] = (), sizes: Sequence[int] = SIZES, num_asked: int = NUM_ASKED
) -> list[Group]:
    """Divide `names` at random into groups of asked tasks. Their pools add others of `names`, and at last `further`."""
    order = list(names)
    task_rng("sizes").shuffle(order)
    groups = []
    for start in range(0, len(order) - num_asked + 1, num_asked):
        asked = order[start : start + num_asked]
        others = [name for name in order if name not in asked]
        task_rng(f"sizes {start}").shuffle(others)
        every = [*asked, *others, *further]
        wanted = sorted({*(size for size in sizes if size <= len(every)), len(every)})
        groups.append(Group(tuple(asked), {size: tuple(every[:size]) for size in wanted}))
    return groups


def answer_groups(loaded: Loaded, groups: Sequence[Group], context: Context) -> pa.Table:
    """Return rows of every method over every pool. Runs are named `<size>_<method>`."""
    bench, tables = loaded.bench, []
    study = bench.study
    for group in groups:
        asked = replace(study, specs={name: study.specs[name] for name in group.asked})
        for size, pool in group.pools.items():
            held = replace(study, specs={name: study.specs[name] for name in pool})
            retriever = pool_retriever(held, bench.asker, loaded.encoder, f"size-{key_of(sorted(pool))}")
            own = replace(bench, study=asked, retriever=retriever)
            methods = {f"{size}_{name}": method for name, method in METHODS.items()}
            tables.append(run_all(own, methods, context.per_task, context.workspace.rows / "sizes"))
    return pa.concat_tables(tables)


def answer_sizes(context: Context) -> pa.Table:
    """Answer over every pool, also over all tasks whose adapters were trained."""
    trained = context.workspace.adapters
    further = [name for name in read_task_list().by_name if name not in context.tasks and (trained / name).is_dir()]
    loaded = context.load("sizes", [*context.tasks, *further])
    return answer_groups(loaded, split_groups(context.tasks, further), context)


STAGE = Stage(
    name="sizes",
    title="Answers by the size of the pool",
    note=f"Groups of {NUM_ASKED} tasks over random pools that have the group's adapters, named by their size.",
    rows=answer_sizes,
    claims=tuple(
        Claim(f"With 46 adapters instead of 10, {name} is as good.", f"46_{name}_iid", f"10_{name}_iid", "at least")
        for name in ("selection", "mixture", "auto")
    ),
    per_task=10,
    encoder=PACKAGED,
)

if __name__ == "__main__":
    run(STAGE)
