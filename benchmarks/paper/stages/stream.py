"""Change the pool during a stream of requests and measure the answers: `python -m benchmarks.paper.stages.stream`.

Requests follow Zipf's law. At each change some adapters are withdrawn, others published, and some get a new version
that replaces one with exchanged answers. A Retriever that follows the catalogue is compared with one that does not.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.auto import Auto
from benchmarks.paper.answering.runs import Bench, Method
from benchmarks.paper.answering.stores import ACTOR, open_store, packaged_encoder
from benchmarks.paper.answering.study import publish_lacking
from benchmarks.paper.common.intervals import Interval, clustered
from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.options import PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.scoring import score
from benchmarks.paper.common.tasks import NUM_TEST
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.conflicts import FLIPPED
from benchmarks.paper.stages.main_table import Loaded, load_loaded
from lora_store import LOCAL_TENANT, LoraStore
from retriever_svc import Encoder, LivePool, ProjectionFiles, Retriever, embed_groups

ROWS = "stream.parquet"
FOLLOWS, FROZEN, OWN = "follows", "frozen", "own adapter"
KINDS = ("kept", "arrived", "replaced")
NUM_CHANGES, NUM_REQUESTS, NUM_COMING, NUM_SWAPPED, NUM_REPLACED = 4, 100, 12, 3, 2
ZIPF = 1.0


@dataclass(frozen=True, slots=True)
class Stretch:
    """The requests after a change. `current`: the folder of each live adapter; `published`: those of the change."""

    current: Mapping[str, str]
    published: Mapping[str, str]
    withdrawn: tuple[str, ...]
    requests: tuple[Question, ...]
    replaced: frozenset[str] = frozenset()

    def kind(self, task: str) -> str:
        """Return whether the change published the task's adapter, or a new version of it."""
        if task not in self.published:
            return "kept"
        return "replaced" if task in self.replaced else "arrived"


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a stream: changes, requests after each, adapters that come, and those of one change."""

    num_changes: int = NUM_CHANGES
    num_requests: int = NUM_REQUESTS
    num_coming: int = NUM_COMING
    num_swapped: int = NUM_SWAPPED
    num_replaced: int = NUM_REPLACED


def stretches_of(
    questions: Mapping[str, Sequence[Question]], first: Mapping[str, str], shape: Shape, seed: int = 0
) -> list[Stretch]:
    """Return the stream. `questions`: by task; `first`: the folder of a task's first version, if it is not its own."""
    draw = random.Random(seed)
    by_popularity, order = (draw.sample(sorted(questions), len(questions)) for _ in range(2))
    coming = [name for name in order if name not in first][: shape.num_coming]
    current = {name: first.get(name, name) for name in order if name not in coming}
    wrong, turns = [name for name in current if name in first], {name: iter(()) for name in order}
    stretches = []
    for number in range(shape.num_changes + 1):
        withdrawn: list[str] = []
        published, replaced = dict(current), frozenset[str]()
        if number:
            leaving = [name for name in current if name not in wrong]
            withdrawn = draw.sample(leaving, shape.num_swapped)
            arrived, coming = coming[: shape.num_swapped], coming[shape.num_swapped :]
            replaced, wrong = frozenset(wrong[: shape.num_replaced]), wrong[shape.num_replaced :]
            published = {name: name for name in [*arrived, *replaced]}
            current = {name: folder for name, folder in current.items() if name not in withdrawn} | published
        names = draw.choices([n for n in by_popularity if n in current], _zipf(len(current)), k=shape.num_requests)
        requests = tuple(_next(turns, questions, name) for name in names)
        stretches.append(Stretch(dict(current), published, tuple(withdrawn), requests, replaced))
    return stretches


def _zipf(count: int) -> list[float]:
    """Return weights 1 / rank^ZIPF."""
    return [1 / rank**ZIPF for rank in range(1, count + 1)]


def _next(turns: dict[str, Iterator[Question]], questions: Mapping[str, Sequence[Question]], name: str) -> Question:
    """Return the task's next question; after the last one the first."""
    found = next(turns[name], None)
    if found is None:
        turns[name] = iter(questions[name])
        found = next(turns[name])
    return found


class Catalogue:
    """A store that changes, with a Retriever that follows it and one that keeps its first generation."""

    def __init__(self, bench: Bench, encoder: Encoder, uri: str) -> None:
        shutil.rmtree(uri, ignore_errors=True)
        self._bench, self._encoder, self._store = bench, encoder, open_store(uri)

    def change(self, stretch: Stretch) -> None:
        """Withdraw and publish, as two commits."""
        if stretch.withdrawn:
            self._store.withdraw(LOCAL_TENANT, list(stretch.withdrawn), actor=ACTOR)
        folder, shapes = self._bench.study.workspace.adapters, self._bench.asker.engine.bank.shapes
        staged = [
            self._store.stage(folder / own, name=name, module_shapes=shapes) for name, own in stretch.published.items()
        ]
        embeddings = embed_groups(self._encoder, [item.samples for item in staged])
        self._store.commit(staged, embeddings, [None] * len(staged), actor=ACTOR)

    def live_pool(self) -> LivePool:
        return pool_over(self._store, self._encoder)


def pool_over(store: LoraStore, encoder: Encoder) -> LivePool:
    """Return the server's pool over a store. An encoder without projection is used without thresholds."""
    make: Callable[..., LivePool] = partial(LivePool, lambda _: encoder, store.snapshot)
    return make() if encoder.projection is None else make(projections=ProjectionFiles(), projection="none")


def stream_rows(
    bench: Bench, encoder: Encoder, stretches: Sequence[Stretch], methods: Mapping[str, Method]
) -> pa.Table:
    """Return a row per request, router and method: whether its adapter's current version leads, and the score."""
    catalogue = Catalogue(bench, encoder, bench.study.workspace.store_uri(f"stream-{encoder.identity}"))
    catalogue.change(stretches[0])
    follows, frozen = catalogue.live_pool(), Retriever(catalogue.live_pool())
    routers, rows = {FOLLOWS: Retriever(follows), FROZEN: frozen}, list[dict[str, object]]()
    for number, stretch in enumerate(stretches):
        if number:
            catalogue.change(stretch)
            follows.catch_up()
        own = [routers[FOLLOWS].plan_named(LOCAL_TENANT, [(q.task, 1.0)], "selection") for q in stretch.requests]
        plans = {(OWN, ""): own}
        plans |= {
            (router, name): method.plans(retriever, stretch.requests)
            for router, retriever in routers.items()
            for name, method in methods.items()
        }
        for (router, name), found in plans.items():
            asked = list(zip(stretch.requests, found, strict=True))
            texts = bench.asker.answers(asked, bench.out, f"{router} {name}, after change {number}")
            for (question, plan), wanted, text in zip(asked, own, texts, strict=True):
                about = {"router": router, "method": name, "stretch": number, "task": question.task}
                is_first = bool(plan.adapters) and plan.adapters[0].ref == wanted.adapters[0].ref
                value = score(bench.study.specs[question.task], question.item, text)
                rows.append(about | {"kind": stretch.kind(question.task), "hit": is_first, "score": value})
    return pa.Table.from_pylist(rows)


def section(rows: pd.DataFrame) -> str:
    """Return the appendix."""
    changed = rows[rows["stretch"] > 0]
    lines = []
    for (router, method), own in changed.groupby(["router", "method"], sort=False):
        cells = [_interval(own, "hit"), _interval(own, "score")]
        cells += [_interval(own[own["kind"] == kind], "score") for kind in KINDS]
        lines.append([f"{router} {method}".strip(), *cells])
    per_stretch = len(rows) // rows["stretch"].nunique() // rows.groupby(["router", "method"]).ngroups
    counts = changed[changed["router"] == OWN]["kind"].value_counts()
    return "\n".join(
        [
            "## Answers while the pool changes\n",
            f"{rows['stretch'].max()} changes, {per_stretch} requests after each, tasks by Zipf's law. A change",
            "withdraws adapters, publishes others, and replaces versions that were trained on exchanged answers. Until",
            "then these answer wrongly, as own adapters too.",
            f"`{FOLLOWS}`: the server's Retriever; `{FROZEN}`: one that stays at the first generation. Percent after",
            "the first change, with 95 % intervals that resample tasks and requests. Requests have columns by the last",
            f"change of their adapter: {', '.join(f'{kind} ({counts.get(kind, 0)})' for kind in KINDS)}.\n",
            table(["router", "current version first", "right", *KINDS], lines),
        ]
    )


def _interval(rows: pd.DataFrame, column: str) -> str:
    if rows.empty:
        return "–"
    return clustered([own.to_numpy(float) for _, own in rows.groupby("task")[column]]).in_percent()


def changed_requests(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `auto`, under both indexes, whose adapter or version is new."""
    return rows[(rows["stretch"] > 0) & (rows["kind"] != KINDS[0]) & (rows["method"] == "auto")]


def following(rows: pd.DataFrame) -> Interval:
    """Return the points of `auto` over the frozen index, on requests whose adapter or version is new."""
    changed = changed_requests(rows)
    follows, frozen = (changed[changed["router"] == router].reset_index(drop=True) for router in (FOLLOWS, FROZEN))
    more = follows["score"] - frozen["score"]
    return clustered([own.to_numpy(float) for _, own in more.groupby(follows["task"])])


def measure(
    loaded: Loaded, encoder: Encoder, first: Mapping[str, str], folder: Path, per_task: int, shape: Shape
) -> None:
    """Write rows and the appendix. Known answers are not computed again."""
    bench = loaded.bench
    names = [*bench.study.specs, *first.values()]
    publish_lacking(loaded.store, bench.study.workspace, names, bench.asker.engine.bank)
    questions: dict[str, list[Question]] = {name: [] for name in bench.study.specs}
    for question in bench.study.questions("test", per_task):
        questions[question.task].append(question)
    methods: dict[str, Method] = {"selection": Auto("selection", abstains=False), "auto": Auto(abstains=False)}
    rows = stream_rows(bench, encoder, stretches_of(questions, first, shape), methods)
    write_parquet(folder / ROWS, rows)
    (folder / "stream.md").write_text(section(pd.read_parquet(folder / ROWS)), encoding="utf-8")


def sentence(folder: Path) -> str:
    """Return the result in one sentence."""
    if not (folder / ROWS).exists():
        return "Answers in a changing pool were not measured yet."
    rows = pd.read_parquet(folder / ROWS)
    chosen = rows[(rows["stretch"] > 0) & ((rows["method"] == "auto") | (rows["router"] == OWN))]
    named = {router: _interval(own, "score") for router, own in chosen.groupby("router")}
    return (
        f"In a stream by Zipf's law with new versions, {named[FOLLOWS]} % of the answers after changes are right with"
        f" the server's `auto`, {named[FROZEN]} % with an index that does not follow, and {named[OWN]} % with own"
        " adapters."
    )


def main(per_task: PerTask = NUM_TEST, root: Root = DEFAULT_ROOT) -> None:
    """Run the stream with the flipped copies of `conflicts` as first versions, as far as they were trained."""
    workspace, encoder = Workspace(root), packaged_encoder()
    loaded = load_loaded(workspace, encoder, Console(width=120))
    flipped = {name: f"{name}{FLIPPED}" for name in loaded.bench.study.specs}
    first = {name: own for name, own in flipped.items() if (workspace.adapters / own).is_dir()}
    measure(loaded, encoder, first, PAPER_RESULTS, per_task, Shape())


if __name__ == "__main__":
    typer.run(main)
