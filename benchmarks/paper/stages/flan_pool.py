"""Test the paper's relation where neighbours share function: `python -m benchmarks.paper.stages.flan_pool`.

The pool is made as Flan is: one set of labels over several sources and languages. Its tasks are those of BIG-bench's
multiemo, four sentiments in reviews of several domains and eight languages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper.answering.auto import Auto
from benchmarks.paper.answering.methods import MAIN
from benchmarks.paper.answering.runs import Bench, Method, pool_retriever, run_all
from benchmarks.paper.answering.study import load_asker, load_study, worker_config
from benchmarks.paper.common.markdown import percent
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.tasks import NUM_TEST, read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.train_pool import train_all
from benchmarks.paper.stages.answer_tables import Answers, differences, main_table
from benchmarks.paper.stages.main_table import Loaded
from benchmarks.training.bigbench_tasks import TaskSpec
from gpu_worker.model.base_model import model_source
from retriever_svc import Encoder
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "flan_pool.parquet"
NUM_TASKS = 12
_STEP = 7
_UNION = "/all_"  # its texts are those of the other sources
PAIRS = [
    ("mixture_iid", "selection_iid"),
    ("mixture_ood", "selection_ood"),
    ("mixture_ood", "majority"),
    ("mixture_iid", "fusion_iid"),
    ("mixture_ood", "fusion_ood"),
    ("auto_iid", "selection_iid"),
    ("auto_iid", "mixture_iid"),
    ("auto_ood", "selection_ood"),
    ("auto_ood", "mixture_ood"),
]


def chosen_tasks(specs: Sequence[TaskSpec], number: int = NUM_TASKS) -> list[TaskSpec]:
    """Return tasks of the set of labels that most tasks share, of as many sources and languages as possible.

    Sorted names are sources, and within them languages, so steps of a prime visit all of both.
    """
    sets = Counter(frozenset(spec.labels) for spec in specs if spec.labels)
    labels = sets.most_common(1)[0][0]
    own = [spec for spec in specs if frozenset(spec.labels) == labels and _UNION not in spec.path]
    sharing = sorted(own, key=lambda spec: spec.name)
    return [sharing[place * _STEP % len(sharing)] for place in range(number)]


def methods() -> dict[str, Method]:
    """Return the paper's methods and the server's default, without abstention."""
    autos = {f"auto_{pool}": Auto(abstains=False, masks_own=pool == "ood") for pool in ("iid", "ood")}
    return {**MAIN, **autos}


def summary(folder: Path) -> str:
    """Return the scores that the paper compares."""
    if not (folder / ROWS).exists():
        return "A pool whose tasks share their labels was not measured yet."
    means = _means(Answers(pd.read_parquet(folder / ROWS), {}))
    return (
        "Where all tasks share their labels, as in Flan's clusters, the mixture has"
        f" {means['mixture_iid']} %, selection {means['selection_iid']} %, and without the own adapter"
        f" {means['mixture_ood']} and {means['selection_ood']} %."
    )


def sentence(folder: Path) -> str:
    """Return the scores that the paper compares, and what they mean for the main pool."""
    if not (folder / ROWS).exists():
        return "A pool whose tasks share their labels was not measured yet."
    answers = Answers(pd.read_parquet(folder / ROWS), {})
    means, tasks = _means(answers), len(answers.scores("perfect"))
    leads = [answers.difference(f"mixture_{pool}", f"selection_{pool}").in_percent() for pool in ("iid", "ood")]
    return (
        f"On {tasks} tasks with the same labels, as in Flan's clusters, the mixture has {means['mixture_iid']} % in"
        f" distribution and selection {means['selection_iid']} %. Out of distribution they have {means['mixture_ood']}"
        f" and {means['selection_ood']} %, guessing {means['majority']} %. The mixture's leads over selection are"
        f" {leads[0]} and {leads[1]} points. Fusion has {means['fusion_iid']} and {means['fusion_ood']} %. So"
        " companions of the same function do not do the harm that the main pool shows (section 2 compares both)."
    )


def _means(answers: Answers) -> dict[str, str]:
    return {run: percent(answers.interval(run).mean) for run in answers.runs}


def section(rows: pd.DataFrame) -> str:
    """Return the appendix."""
    answers = Answers(rows, {name: spec.cluster for name, spec in read_task_list().by_name.items()})
    tasks, questions = answers.scores("perfect").shape
    return "\n".join(
        [
            "## A pool whose tasks share their labels\n",
            f"{tasks} tasks of one set of labels, over several sources and languages; {questions} questions each.\n",
            main_table(answers),
            differences(answers, PAIRS),
        ]
    )


def measure(bench: Bench, folder: Path, per_task: int, name: str = "flan_pool") -> pd.DataFrame:
    """Answer under every method and write the rows, named after the pool. Known answers are not computed again."""
    rows = run_all(bench, methods(), per_task, bench.study.workspace.rows / name)
    path = folder / f"{name}.parquet"
    write_parquet(path, pa.concat_tables([rows, bench.majority(per_task)]))
    return pd.read_parquet(path)


def load_flan_pool(workspace: Workspace, encoder: str, out: Console) -> Loaded:
    """Train the adapters of multiemo's pool that do not exist yet, and load the pool."""
    return load_pool(chosen_tasks(list(read_task_list().by_name.values())), workspace, encoder, out, "flan")


def load_pool(specs: Sequence[TaskSpec], workspace: Workspace, encoder: str, out: Console, name: str) -> Loaded:
    """Train the adapters of these tasks that do not exist yet, and load them as the pool `name`."""
    config = worker_config(len(specs))
    with Progress() as progress:
        train_all(specs, workspace, Path(model_source(config)), progress)
    study = load_study(specs, workspace, config)
    asker, store, weights = load_asker(workspace, config, [spec.name for spec in specs])
    return Loaded(Bench(study, asker, pool_retriever(study, asker, Encoder(encoder), name), out), store, weights)


def main(per_task: PerTask = NUM_TEST, encoder: EncoderName = ENGLISH_MODEL, root: Root = DEFAULT_ROOT) -> None:
    """Train the pool's adapters, then measure."""
    rows = measure(load_flan_pool(Workspace(root), encoder, Console(width=120)).bench, PAPER_RESULTS, per_task)
    (PAPER_RESULTS / "flan_pool.md").write_text(section(rows), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
