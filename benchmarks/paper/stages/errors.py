"""Class wrong answers, and score without full stops, from known answers: `python -m benchmarks.paper.stages.errors`.

No model is loaded. A row whose answer is not in the study's cache is left out, so the stage covers the runs whose
weights the rows determine: one adapter alone, equal weights, or other simple fractions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import typer

from benchmarks.paper.answering.answers import Question, answer_key, known_answers
from benchmarks.paper.answering.stores import open_store
from benchmarks.paper.answering.study import Study, load_study, worker_config
from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.scoring import plain, score, score_without_dots, shown_options
from benchmarks.paper.common.tasks import NUM_TEST, read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.stages import baselines, layer_routers
from benchmarks.paper.stages.answer_tables import BASELINES
from benchmarks.training.bigbench_tasks import Item, TaskSpec
from gpu_worker.model.base_model import resolve_dtype
from lora_store import LOCAL_TENANT, AdapterNotFound, AdapterRef, Plan, PlannedAdapter, Snapshot

ROWS = "errors.parquet"
SOURCES = ("answers.parquet", "baselines.parquet", "auto.parquet", "companions.parquet")
RIGHT, COMPANION, FORM, OTHER = "right", "another adapter's answer", "wrong form", "other"
CLASSES = (RIGHT, COMPANION, FORM, OTHER)
_MIXTURES, _OWN = ("mixture_iid", "uniform_iid_always"), ("perfect", "own")  # in the rows of either stage
_ROUTER_FILES = {BASELINES: "", layer_routers.ROWS: " in every layer"}
_NOT_YET = "Wrong answers were not classed yet."
_LARGEST, _ROUNDED = 12, 1e-4  # denominator of the weights in SOURCES, and the error of their rounding


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a task's answers: closed options, or the number of words and the kinds of characters."""

    closed: frozenset[str]
    words: range
    kinds: frozenset[str]

    @classmethod
    def of(cls, spec: TaskSpec, train: Sequence[Item]) -> Form:
        texts = [item.answers[0] for item in train]
        counts = [len(text.split()) for text in texts]
        kinds = frozenset(kind for text in texts for kind in _kinds(text))
        return cls(frozenset(map(plain, spec.labels)), range(min(counts), max(counts) + 1), kinds)

    def fits(self, item: Item, text: str) -> bool:
        """Return whether `text` could be an answer to the item, right or wrong."""
        options, found = self.closed or frozenset(map(plain, shown_options(item))), plain(text)
        return found in options if options else len(found.split()) in self.words and _kinds(found) <= self.kinds


def _kinds(text: str) -> frozenset[str]:
    return frozenset("a" if c.isalpha() else "0" if c.isdigit() else c for c in text if not c.isspace())


def error_class(form: Form, item: Item, text: str, is_right: bool, alone: Sequence[str]) -> str:
    """Return the class of an answer. `alone`: the answers of the plan's other adapters alone, as far as known."""
    if is_right:
        return RIGHT
    if plain(text) in map(plain, alone):
        return COMPANION
    return OTHER if form.fits(item, text) else FORM


class Known:
    """The answers in the study's cache, for questions under plans."""

    def __init__(self, texts: Mapping[str, str], snapshot: Snapshot, dtype: str) -> None:
        self._texts, self._snapshot, self._dtype = texts, snapshot, dtype

    def answer(self, question: Question, strategy: str, names: Sequence[str], weights: Sequence[float]) -> str | None:
        """Return the text, or None if it is not known or an adapter of another name is now in the store."""
        try:
            records = [self._snapshot.resolve(LOCAL_TENANT, name) for name in names]
        except AdapterNotFound:
            return None
        parts = [
            PlannedAdapter(AdapterRef(LOCAL_TENANT, r.ref.name, r.ref.digest), r.weights_digest, weight)
            for r, weight in zip(records, weights, strict=True)
        ]
        plan = Plan(strategy, tuple(parts))  # type: ignore[arg-type]
        return self._texts.get(answer_key(question, plan, self._dtype))

    def alone(self, question: Question, name: str) -> str | None:
        return self.answer(question, "selection", [name], [1.0])


def _exact(weights: Sequence[float]) -> list[float]:
    """Return the weights before they were rounded for the rows, if they are simple fractions."""
    simple = [Fraction(float(weight)).limit_denominator(_LARGEST) for weight in weights]
    pairs = zip(weights, simple, strict=True)
    return [float(own) if abs(own - float(weight)) < _ROUNDED else float(weight) for weight, own in pairs]


def classed_rows(rows: pd.DataFrame, study: Study, known: Known) -> pa.Table:
    """Return a row per known answer: run, task, number, class, score, and the score without full stops.

    Tasks with free text are left out, and runs of which fewer than nine tenths of the answers are known.
    """
    exact = [spec for spec in study.specs.values() if spec.metric != "rouge_l"]
    forms = {spec.name: Form.of(spec, study.parts[spec.name].train) for spec in exact}
    questions = {(q.task, q.number): q for q in study.questions("test", NUM_TEST)}

    def classed() -> Iterator[dict[str, object]]:
        for row in rows[(rows["run"] != "majority") & rows["task"].isin(forms)].itertuples():
            question = questions[row.task, row.number]
            names = list(row.adapters)
            text = known.answer(question, row.strategy, names, _exact(row.weights))
            if text is None:
                continue
            others = [known.alone(question, name) for name in names if name != row.task]
            spec, item = study.specs[row.task], question.item
            value = score(spec, item, text)
            alone = [other for other in others if other is not None]
            found = error_class(forms[row.task], item, text, value == 1, alone)
            yield {
                "run": row.run,
                "task": row.task,
                "number": row.number,
                "class": found,
                "score": value,
                "without_dots": score_without_dots(spec, item, text),
            }

    wanted = rows[rows["task"].isin(forms)].groupby("run").size()
    found = list(classed())
    known_share = Counter(str(row["run"]) for row in found)
    return pa.Table.from_pylist([row for row in found if known_share[str(row["run"])] >= 0.9 * wanted[row["run"]]])


def rows_in(folder: Path) -> pd.DataFrame:
    """Return the rows of all sources. Runs of `auto` that have a name of another source are marked by it."""
    found = {name: pd.read_parquet(folder / name) for name in SOURCES if (folder / name).exists()}
    taken: set[str] = set()
    for name, rows in found.items():
        names = set(rows["run"])
        rows["run"] = [f"{run} ({Path(name).stem})" if run in taken else run for run in rows["run"]]
        taken |= names
    return pd.concat(found.values())


def router_rows(folder: Path) -> pd.DataFrame:
    """Return the answers of trained routers and of LoRAHub that were scored without full stops.

    No answer of theirs is found again from its rows, which have rounded weights, or none for routers in every layer.
    """
    found = []
    for name, place in _ROUTER_FILES.items():
        rows = pd.read_parquet(folder / name) if (folder / name).exists() else pd.DataFrame({"run": []})
        own = rows[rows["run"].isin([*baselines.ROUTERS, baselines.LORAHUB])]
        found.append(own.assign(run=own["run"] + place) if "without_dots" in own else own.head(0))
    return pd.concat(found).dropna(subset="without_dots") if any(map(len, found)) else pd.DataFrame()


def section(rows: pd.DataFrame, routers: pd.DataFrame) -> str:
    """Return the appendix: classes by run, then the effect of full stops, also for `routers`, which lack classes."""
    lines = []
    for run, own in rows.groupby("run", sort=False):
        shares = own["class"].value_counts(normalize=True)
        lines.append([_words(run), str(own["task"].nunique()), str(len(own))])
        lines[-1] += [percent(shares.get(name, 0.0)) for name in CLASSES]
    words = (
        f"`{COMPANION}`: equal to the answer of another adapter of the plan alone, as far as that answer is known."
        f" `{FORM}`: not one of the task's options, or for open answers another number of words or other kinds of"
        " characters than any training answer. Tasks with free text are left out.\n"
    )
    other = routers[~routers["run"].isin(rows["run"])] if len(routers) else routers
    both = [run for answers in (rows, other) if len(answers) for run in answers.groupby("run", sort=False)]
    dots = [[_words(run), _dots(own)] for run, own in both]
    return "\n".join(
        [
            "## Wrong answers by class\n",
            words,
            table(["run", "tasks", "answers", *CLASSES], lines),
            "### Exact match with full stops dropped, as in the paper\n",
            "Points more than with full stops; the interval resamples questions and tasks.\n",
            table(["run", "points (95 % interval)"], dots),
        ]
    )


def _words(run: object) -> str:
    return str(run).replace("_", " ")


def _dots(own: pd.DataFrame) -> str:
    found = _dots_interval(own)
    return "–" if found is None else found.in_percent()


def _dots_interval(own: pd.DataFrame) -> Interval | None:
    more = (own["without_dots"] - own["score"]).to_frame("more").assign(task=own["task"], number=own["number"])
    grid = more.pivot(index="task", columns="number", values="more").dropna(axis="columns")
    if grid.empty:
        return None
    return bootstrap(grid.to_numpy()[np.newaxis], resamples_tasks=True)


def sentence(folder: Path) -> str:
    """Return which classes the equal mixture's wrong answers are of, against those of the own adapter."""
    rows, own = _of_runs(folder, _MIXTURES), _of_runs(folder, _OWN)
    if rows is None or own is None:
        return _NOT_YET
    lost, companion, form, other = (_change(own, rows, name) for name in CLASSES)
    return (
        f"Against own adapters, equal mixing changes right answers by {lost} points. Wrong answers that a companion"
        f" gives alone, word for word, change by at least {companion}, those of a wrong form by {form}, and"
        f" others by {other} ({len(rows)} questions with exact match)."
    )


def company_sentence(folder: Path) -> str:
    """Return which wrong answers a smaller weight alone adds; empty if they were not classed."""
    own, third = (_of_runs(folder, (name,)) for name in ("own (companions)", "own_third"))
    if own is None or third is None:
        return ""
    return (
        f"A third of the own adapter alone keeps the form (answers of a wrong form: {_change(own, third, FORM)} points)"
        f" and loses content ({_change(own, third, OTHER)})."
    )


def _change(own: pd.DataFrame, mixed: pd.DataFrame, name: str) -> str:
    """Return the points by which the share of a class changes, with questions and tasks resampled."""
    grids = [
        found.assign(found=found["class"] == name).pivot(index="task", columns="number", values="found").astype(float)
        for found in (own, mixed)
    ]
    more = (grids[1] - grids[0]).dropna(axis="columns").to_numpy()
    return bootstrap(more[np.newaxis], resamples_tasks=True).in_percent()


def dots_sentence(folder: Path) -> str:
    """Return the effect of full stops on the equal mixture, and the largest on a router."""
    rows, routers = _of_runs(folder, _MIXTURES), router_rows(folder)
    if rows is None:
        return ""
    found = [_dots_interval(own) for _, own in routers.groupby("run")] if len(routers) else []
    most = max(filter(None, found), key=lambda interval: interval.mean, default=None)
    rest = f", on trained routers and LoRAHub at most {most.in_percent()}" if most else ""
    return f"On the equal mixture that is {_dots(rows)} points{rest}."


def _of_runs(folder: Path, names: Sequence[str]) -> pd.DataFrame | None:
    """Return the rows of the first of the runs that was classed."""
    rows = pd.read_parquet(folder / ROWS) if (folder / ROWS).exists() else pd.DataFrame({"run": []})
    present = [name for name in names if (rows["run"] == name).any()]
    return rows[rows["run"] == present[0]] if present else None


def main(root: Root = DEFAULT_ROOT) -> None:
    """Class every known answer, write rows and the appendix."""
    workspace, listed, names = Workspace(root), read_task_list().by_name, read_pool()
    config = worker_config(len(names))
    study = load_study([listed[name] for name in names], workspace, config)
    snapshot = open_store(workspace.store_uri("candidates")).snapshot()
    dtype = str(resolve_dtype(config.dtype, config.device))
    known = Known(known_answers(workspace.root / "answers.jsonl"), snapshot, dtype)
    write_parquet(PAPER_RESULTS / ROWS, classed_rows(rows_in(PAPER_RESULTS), study, known))
    write_tables(PAPER_RESULTS)


def write_tables(folder: Path) -> None:
    """Write the appendix from the rows in `folder`."""
    text = section(pd.read_parquet(folder / ROWS), router_rows(folder))
    (folder / "errors.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
