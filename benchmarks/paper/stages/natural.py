"""Measure adapters of the pool that contradict each other: `python -m benchmarks.paper.stages.natural`.

Two tasks of a pair have the same sort of inputs and different functions, such as past tense and plural. Each question
is answered by its own adapter, by the rival alone, by mixtures of both, and by the server's methods over the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, Method
from benchmarks.paper.answering.study import Study
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.tasks import NUM_CHOICE, NUM_TEST
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.main_table import load_bench
from lora_store import LOCAL_TENANT, Plan, Strategy
from retriever_svc import Retriever
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "natural.parquet"
RIVALS = (
    ("copy_letters", "reverse_letters"),
    ("past_tense", "plural"),
    ("question_formation", "sentence_negation"),
    ("date_format", "date_unformat"),
    ("bbq_age_ambig", "bbq_age_disambig"),
    ("bbq_gender_ambig", "bbq_gender_disambig"),
)
SHARES = (0.5, 0.6, 0.75, 0.9)  # of the own adapter


def rivals_of(pairs: Sequence[tuple[str, str]] = RIVALS) -> dict[str, str]:
    """Return the rival of every task."""
    return {one: other for pair in pairs for one, other in (pair, pair[::-1])}


@dataclass(frozen=True, slots=True)
class Against:
    """The own adapter with this share of the weight, and the task's rival with the rest."""

    rivals: Mapping[str, str]
    share: float
    strategy: Strategy = "mixture"

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        return [self._plan(retriever, question.task) for question in questions]

    def _plan(self, retriever: Retriever, task: str) -> Plan:
        weights = {task: self.share, self.rivals[task]: 1 - self.share}
        choices = [(name, weight) for name, weight in weights.items() if weight > 0]
        strategy: Strategy = "selection" if len(choices) == 1 else self.strategy
        return retriever.plan_named(LOCAL_TENANT, choices, strategy)


def methods_of(rivals: Mapping[str, str]) -> dict[str, Method]:
    """Return every method by name."""
    found: dict[str, Method] = {"own": Against(rivals, 1.0), "rival": Against(rivals, 0.0)}
    found |= {f"own_{share:g}": Against(rivals, share) for share in SHARES}
    found["fusion_0.5"] = Against(rivals, 0.5, "fusion")
    return found | {
        "pool_selection": Routed("selection", 1),
        "pool_mixture": Routed("mixture"),
        "pool_softmax": Routed("mixture", weighting="softmax"),
    }


def asked_study(study: Study, rivals: Mapping[str, str]) -> Study:
    """Return the tasks of the pairs, with 100 questions each: nothing is decided here, so `choice` is asked too."""
    names = [name for name in study.specs if name in rivals]
    parts = {name: study.parts[name] for name in names}
    both = {name: replace(own, test=own.test + own.choice) for name, own in parts.items()}
    return replace(study, specs={name: study.specs[name] for name in names}, parts=study.parts | both)


def pair_rows(bench: Bench, rivals: Mapping[str, str], per_task: int) -> pa.Table:
    """Return rows of every method. `as_rival`: whether the answer is the one that the rival gives alone."""
    questions = bench.study.questions("test", per_task)

    def texts(name: str, method: Method) -> list[str]:
        plans = method.plans(bench.retriever, questions)
        return bench.asker.answers(list(zip(questions, plans, strict=True)), bench.out, name)

    methods = methods_of(rivals)
    of_rival = {(q.task, q.number): t for q, t in zip(questions, texts("rival", methods["rival"]), strict=True)}
    tables = []
    for name, method in methods.items():
        rows = bench.run(name, method, per_task)
        said = texts(name, method)
        same = [t.strip() == of_rival[q.task, q.number].strip() for q, t in zip(questions, said, strict=True)]
        tables.append(rows.append_column("as_rival", pa.array(same)))
    return pa.concat_tables(tables)


def section(rows: pd.DataFrame) -> str:
    """Return the appendix."""
    answers = Answers(rows, {})
    tasks = list(answers.scores("own").index)
    lines = []
    for run in answers.runs:
        own = rows[rows["run"] == run]
        cells = [percent(answers.scores(run).loc[task].mean()) for task in tasks]
        lines.append([run.replace("_", " "), answers.interval(run).in_percent(), percent(own["as_rival"].mean())])
        lines[-1] += cells
    pairs = [(f"own_{share:g}", "own") for share in SHARES]
    pairs += [("fusion_0.5", "own_0.5"), ("pool_mixture", "pool_selection"), ("pool_softmax", "pool_selection")]
    return "\n".join(
        [
            "## Related tasks that contradict each other\n",
            f"{len(tasks)} tasks in pairs of similar inputs and different functions, {answers.scores('own').shape[1]}",
            "questions each. `own 0.75`: a mixture with a quarter of the weight on the rival. `as rival`: the answer",
            "is exactly the one that the rival gives alone. `pool`: the server's methods over the whole pool, k = 3.\n",
            table(["run", "all tasks, percent", "as rival", *tasks], lines),
            differences(answers, pairs),
        ]
    )


def sentence(folder: Path) -> str:
    """Return what mixing with a related task's adapter does, in one sentence."""
    if not (folder / ROWS).exists():
        return "Pairs of related tasks were not measured yet."
    rows = pd.read_parquet(folder / ROWS)
    answers = Answers(rows, {})
    half, quarter, tenth = (answers.difference(f"own_{share:g}", "own").in_percent() for share in (0.5, 0.75, 0.9))
    same = percent(rows[rows["run"] == "own_0.5"]["as_rival"].mean())
    return (
        f"In pairs of tasks with similar inputs and different functions ({len(answers.scores('own'))} tasks), half of"
        f" the weight on the other adapter changes right answers by {half} points, a quarter by {quarter}, a tenth by"
        f" {tenth}."
        f" At half, {same} % of the answers are those of the other adapter alone, word for word."
    )


def measure(bench: Bench, folder: Path, per_task: int, pairs: Sequence[tuple[str, str]] = RIVALS) -> None:
    """Answer under every method, write rows and the appendix. Known answers are not computed again."""
    rivals = rivals_of(pairs)
    study = asked_study(bench.study, rivals)
    fewest = min(len(study.parts[name].test) for name in study.specs)
    rows = pair_rows(replace(bench, study=study), rivals, min(per_task, fewest))
    write_parquet(folder / ROWS, rows)
    (folder / "natural.md").write_text(section(rows.to_pandas()), encoding="utf-8")


def main(
    per_task: PerTask = NUM_TEST + NUM_CHOICE, encoder: EncoderName = ENGLISH_MODEL, root: Root = DEFAULT_ROOT
) -> None:
    """Measure the pairs of the pool."""
    measure(load_bench(Workspace(root), encoder, Console(width=120)).bench, PAPER_RESULTS, per_task)


if __name__ == "__main__":
    typer.run(main)
