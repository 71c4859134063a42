"""Measure adapters that overlap or contradict each other: `python -m benchmarks.paper.stages.conflicts`.

Some tasks get three more adapters: one for each half of the training examples, and one with exchanged answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.margin import ByLead, Rule, chosen_rule
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, Method, pool_retriever, run_all
from benchmarks.paper.answering.study import Study, publish_lacking
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.scoring import shown_options
from benchmarks.paper.common.tasks import NUM_CHOICE, NUM_SAMPLES, NUM_TEST, Parts
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.train_pool import in_turns, recipe_of, train_on
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.main_table import Loaded, load_bench
from benchmarks.training.bigbench_tasks import Item, TaskSpec
from gpu_worker.model.base_model import model_source
from lora_store import LOCAL_TENANT, Plan, Strategy
from retriever_svc import Encoder, Retriever
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "conflicts.parquet"
NUM_TASKS = 12
HALVES, FLIPPED = (".half1", ".half2"), ".flipped"
FLIPPED_SHARES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75)
_CHOICE_PER_TASK = 20


def chosen_tasks(specs: Sequence[TaskSpec]) -> list[TaskSpec]:
    """Return tasks with a closed set of answers, then tasks that show options, from as many clusters as possible."""
    labelled = in_turns([spec for spec in specs if spec.labels])
    shown = in_turns([spec for spec in specs if spec.shows_options and not spec.labels])
    return [*labelled, *shown][:NUM_TASKS]


def copies_of(parts: Parts) -> dict[str, Parts]:
    """Return the training items of each further adapter of a task, by its name's ending."""
    answers = sorted({item.answers[0] for item in parts.train})
    flipped = tuple(replace(item, answers=(_exchanged(item, answers),)) for item in parts.train)
    trains: dict[str, tuple[Item, ...]] = {
        HALVES[0]: parts.train[0::2],
        HALVES[1]: parts.train[1::2],
        FLIPPED: flipped,
    }
    return {end: replace(parts, train=train, samples=train[:NUM_SAMPLES]) for end, train in trains.items()}


def _exchanged(item: Item, answers: Sequence[str]) -> str:
    """Return a wrong answer: the next of the options that the input shows, or else of the task's answers."""
    options = shown_options(item) or list(answers)
    return options[(options.index(item.answers[0]) + 1) % len(options)]


@dataclass(frozen=True, slots=True)
class Together:
    """Uses the adapters of a question's task with these endings and weights; "" is the task's own adapter."""

    strategy: Strategy
    shares: tuple[tuple[str, float], ...]

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        return [
            retriever.plan_named(LOCAL_TENANT, self._choices(question.task), self.strategy) for question in questions
        ]

    def _choices(self, task: str) -> list[tuple[str, float]]:
        return [(f"{task}{end}", share) for end, share in self.shares]


def fixed_methods() -> dict[str, Method]:
    """Return combinations of a task's adapters that no retrieval chooses."""
    alone = {"own": "", "half1": HALVES[0], "half2": HALVES[1], "flipped": FLIPPED}
    halves = tuple((end, 0.5) for end in HALVES)
    found: dict[str, Method] = {name: Together("selection", ((end, 1.0),)) for name, end in alone.items()}
    found |= {"halves_mixture": Together("mixture", halves), "halves_fusion": Together("fusion", halves)}
    for share in FLIPPED_SHARES:
        mixed = (("", 1 - share), (FLIPPED, share))
        found[f"own_flipped_{share:g}"] = Together("mixture", mixed)
    found["own_flipped_fusion"] = Together("fusion", (("", 0.5), (FLIPPED, 0.5)))
    found["halves_flipped"] = Together("mixture", tuple((end, 1 / 3) for end in (*HALVES, FLIPPED)))
    return found


def routed_methods(pool: str, rule: Rule) -> dict[str, Method]:
    """Return the server's methods over a pool with such adapters."""
    return {
        f"{pool}_selection": Routed("selection", 1),
        f"{pool}_mixture": Routed("mixture"),
        f"{pool}_softmax": Routed("mixture", weighting="softmax"),
        f"{pool}_margin": ByLead(rule),
    }


class Conflicts:
    """The study's pool, and its pools with the further adapters of `tasks`, which must have been trained."""

    def __init__(self, loaded: Loaded, tasks: Sequence[TaskSpec], copies: dict[str, Parts]) -> None:
        """Set up the pools. `copies`: the further adapters by name."""
        bench = loaded.bench
        self._bench, self._tasks = bench, {spec.name: spec for spec in tasks}
        of_task = {name: self._tasks[name.rpartition(".")[0]] for name in copies}
        specs = bench.study.specs | {name: replace(spec, name=name) for name, spec in of_task.items()}
        self._whole = replace(bench.study, specs=specs, parts=bench.study.parts | copies)
        publish_lacking(loaded.store, bench.study.workspace, list(copies), bench.asker.engine.bank)

    def rows(self, encoder: Encoder, per_task: int) -> tuple[pa.Table, dict[str, Rule]]:
        """Answer the questions of tasks with further adapters under every method. Return rows, and each pool's rule."""
        flipped = [name for name in self._whole.specs if not name.endswith(HALVES)]
        halved = [name for name in self._whole.specs if not name.endswith(FLIPPED) and name not in self._tasks]
        folder = self._whole.workspace.rows / "conflicts"
        benches = {
            "plain": replace(self._bench, study=self._asked),
            "flipped": self._over("conflicts-flipped", flipped, encoder),
            "halved": self._over("conflicts-halved", halved, encoder),
        }
        rules = {pool: chosen_rule(bench, NUM_CHOICE, masks_own=False) for pool, bench in benches.items()}
        tables = [run_all(self._over("conflicts", list(self._whole.specs), encoder), fixed_methods(), per_task, folder)]
        for pool, bench in benches.items():
            tables.append(run_all(bench, routed_methods(pool, rules[pool]), per_task, folder))
        return pa.concat_tables(tables), rules

    @property
    def _asked(self) -> Study:
        return replace(self._whole, specs=self._tasks)

    def _over(self, store: str, names: Sequence[str], encoder: Encoder) -> Bench:
        """Return a bench of the tasks' questions over a pool of `names`."""
        pool = replace(self._whole, specs={name: self._whole.specs[name] for name in names})
        return replace(
            self._bench, study=self._asked, retriever=pool_retriever(pool, self._bench.asker, encoder, store)
        )


def margin_rows(bench: Bench, rules: dict[str, Rule], per_task: int) -> pa.Table:
    """Answer by selection, mixture and the rule between them over the whole pool, with a rule for `iid` and `ood`."""
    methods: dict[str, Method] = {}
    for name, rule in rules.items():
        masked = name == "ood"
        methods[f"selection_{name}"] = Routed("selection", 1, masks_own=masked)
        methods[f"mixture_{name}"] = Routed("mixture", masks_own=masked)
        methods[f"margin_{name}"] = ByLead(rule, masked)
    return run_all(bench, methods, per_task, bench.study.workspace.rows / "margin")


def section(conflicts: pd.DataFrame, margins: pd.DataFrame, rules: dict[str, Rule], wide: dict[str, Rule]) -> str:
    """Return the report's section. `rules`: chosen for the pools with further adapters; `wide`: for the whole pool."""
    answers, pool = Answers(conflicts, {}), Answers(margins, {})
    tasks = list(answers.scores("own").index)
    rows = [
        [
            run.replace("_", " "),
            answers.interval(run).in_percent(),
            *[percent(answers.scores(run).loc[task].mean()) for task in tasks],
        ]
        for run in answers.runs
    ]
    pairs = [("own", "own_flipped_0.5"), ("halves_mixture", "half1"), ("halves_mixture", "own")]
    for name in ("flipped", "halved"):
        pairs += [(f"{name}_{way}", f"plain_{way}") for way in ("selection", "mixture", "softmax")]
        pairs += [(f"{name}_{way}", f"{name}_mixture") for way in ("softmax", "margin")]
        pairs += [(f"{name}_{way}", f"{name}_selection") for way in ("softmax", "margin")]
    words = (
        "`half1`, `half2`: adapters trained on one half of the training examples; `flipped`: trained on all, with each"
        " answer replaced by the next of the task's answers. `own flipped 0.25`: a mixture with a weight of 0.25 on the"
        " flipped adapter. Then the server's methods over the unchanged pool (`plain`), with the flipped adapters"
        " added, and with the halves instead of their tasks' adapters; k = 3. `margin` mixes or selects by a rule"
        f" chosen for each pool on the choice part of these tasks. {_listed(rules)}.\n"
    )
    kinds = [(f"margin_{name}", f"{way}_{name}") for name in wide for way in ("mixture", "selection")]
    return "\n".join(
        [
            "## Conflicting and overlapping adapters\n",
            words,
            table(["run", "all tasks, percent", *tasks], rows),
            differences(answers, pairs),
            "### A margin between mixture and selection\n",
            f"Over all tasks of the pool; rules chosen on their choice part. {_listed(wide)}.\n",
            differences(pool, kinds),
        ]
    )


def _listed(rules: dict[str, Rule]) -> str:
    return "; ".join(f"{name}: {rule}" for name, rule in rules.items())


def main(
    per_task: PerTask = NUM_TEST,
    encoder: EncoderName = ENGLISH_MODEL,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Train the further adapters, answer under every method, write rows and the report's section."""
    workspace, out = Workspace(root), Console(width=120)
    loaded = load_bench(workspace, encoder, out)
    study = loaded.bench.study
    tasks = chosen_tasks(list(study.specs.values()))
    copies = {f"{spec.name}{end}": parts for spec in tasks for end, parts in copies_of(study.parts[spec.name]).items()}
    recipes = {f"{spec.name}{end}": recipe_of(spec) for spec in tasks for end in (*HALVES, FLIPPED)}
    with Progress() as progress:
        train_on(copies, recipes, workspace, Path(model_source(loaded.bench.asker.engine.config)), progress)
    rows, rules = Conflicts(loaded, tasks, copies).rows(Encoder(encoder), per_task)
    wide = {
        name: chosen_rule(loaded.bench, _CHOICE_PER_TASK, masks_own=masked)
        for name, masked in (("iid", False), ("ood", True))
    }
    margins = margin_rows(loaded.bench, wide, per_task)
    write_parquet(PAPER_RESULTS / ROWS, pa.concat_tables([rows, margins]))
    text = section(rows.to_pandas(), margins.to_pandas(), rules, wide)
    (PAPER_RESULTS / "conflicts.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
