"""Measure answers while the pool grows: `python -m benchmarks.paper.stages.sizes`.

The same questions are asked over pools of 10, 20 and 46 adapters, and over all that the study has trained. A larger
pool has everything that a smaller one has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console

from benchmarks.paper.answering.auto import Auto
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, Method, pool_retriever, run_all
from benchmarks.paper.answering.stores import packaged_encoder
from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.options import PerTask, Root
from benchmarks.paper.common.resumable import key_of, write_parquet
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.main_table import load_loaded
from benchmarks.training.bigbench_tasks import task_rng
from retriever_svc import Encoder

ROWS = "sizes.parquet"
SIZES = (10, 20, 46)
NUM_ASKED = 10  # tasks of a group, which all of its pools have
METHODS: dict[str, Method] = {
    f"{name}_{pool}": method
    for pool, masked in (("iid", False), ("ood", True))
    for name, method in (
        ("selection", Routed("selection", 1, masks_own=masked)),
        ("mixture", Routed("mixture", masks_own=masked)),
        ("auto", Auto(abstains=False, masks_own=masked)),
    )
}


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks whose questions are asked, and the pools over which they are asked, by size."""

    asked: tuple[str, ...]
    pools: dict[int, tuple[str, ...]]


def groups_of(
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


def size_rows(bench: Bench, encoder: Encoder, groups: Sequence[Group], per_task: int) -> pa.Table:
    """Return rows of every method over every pool. Runs are named `<size>_<method>`."""
    study, tables = bench.study, []
    for group in groups:
        asked = replace(study, specs={name: study.specs[name] for name in group.asked})
        for size, pool in group.pools.items():
            held = replace(study, specs={name: study.specs[name] for name in pool})
            retriever = pool_retriever(held, bench.asker, encoder, f"size-{key_of(sorted(pool))}")
            own = replace(bench, study=asked, retriever=retriever)
            methods = {f"{size}_{name}": method for name, method in METHODS.items()}
            tables.append(run_all(own, methods, per_task, study.workspace.rows / "sizes"))
    return pa.concat_tables(tables)


def section(rows: pd.DataFrame) -> str:
    """Return the appendix."""
    answers = Answers(rows, {})
    sizes = sizes_in(answers)
    num_tasks, num_questions = answers.scores(answers.runs[0]).shape
    lines = [
        [str(size), _hits(rows, size), *[answers.interval(f"{size}_{name}").in_percent() for name in METHODS]]
        for size in sizes
    ]
    pairs = [(f"{sizes[-1]}_{name}", f"{sizes[0]}_{name}") for name in METHODS]
    pairs += [(f"{size}_mixture_{pool}", f"{size}_selection_{pool}") for pool in ("iid", "ood") for size in sizes]
    return "\n".join(
        [
            "## Answers by the size of the pool\n",
            f"{num_tasks} tasks in groups of {NUM_ASKED}, {num_questions} questions each, the same at every size, over",
            "random pools that have the group's adapters. The packaged encoder with its projection; k = 3; `auto`",
            "without abstention. Percent with 95 % intervals. Retrieval alone was measured over 229 tasks",
            "(retrieval.md) and over a million synthetic adapters (`benchmarks/README.md`).\n",
            table(["adapters", "own adapter first", *[name.replace("_", " ") for name in METHODS]], lines),
            differences(answers, pairs),
        ]
    )


def sizes_in(answers: Answers) -> list[int]:
    """Return the sizes that were measured, in order."""
    return sorted({int(run.partition("_")[0]) for run in answers.runs})


def _hits(rows: pd.DataFrame, size: int) -> str:
    own = rows[rows["run"] == f"{size}_selection_iid"]
    hits = own.assign(
        score=[float(list(names) == [task]) for names, task in zip(own["adapters"], own["task"], strict=True)]
    )
    return Answers(hits, {}).interval(f"{size}_selection_iid").in_percent()


def sentence(folder: Path) -> str:
    """Return the result in one sentence."""
    if not (folder / ROWS).exists():
        return "Answers by pool size were not measured yet."
    answers = Answers(pd.read_parquet(folder / ROWS), {})
    few, *_, most = sizes_in(answers)
    lost = {
        name: answers.difference(f"{most}_{name}_iid", f"{few}_{name}_iid").in_percent()
        for name in ("selection", "mixture", "auto")
    }
    return (
        f"From {few} to {most} adapters, right answers to the same questions change by {lost['selection']} points with"
        f" selection, {lost['mixture']} with the equal mixture and {lost['auto']} with `auto`."
    )


def measure(bench: Bench, encoder: Encoder, groups: Sequence[Group], folder: Path, per_task: int) -> None:
    """Write rows and the appendix. Known answers are not computed again."""
    write_parquet(folder / ROWS, size_rows(bench, encoder, groups, per_task))
    (folder / "sizes.md").write_text(section(pd.read_parquet(folder / ROWS)), encoding="utf-8")


def main(per_task: PerTask = 10, root: Root = DEFAULT_ROOT) -> None:
    """Answer over every pool, write rows and the appendix."""
    workspace, encoder, names = Workspace(root), packaged_encoder(), read_pool()
    further = [name for name in read_task_list().by_name if name not in names and (workspace.adapters / name).is_dir()]
    bench = load_loaded(workspace, encoder, Console(width=120), "sizes", [*names, *further]).bench
    measure(bench, encoder, groups_of(names, further), PAPER_RESULTS, per_task)


if __name__ == "__main__":
    typer.run(main)
