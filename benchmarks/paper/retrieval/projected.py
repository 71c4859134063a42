"""Measure what the projection and the thresholds per adapter change, with the server's own Retriever.

Prompts of the pool's tasks should find their adapter. Prompts of tasks without a related task in the pool, and everyday
prompts, should go to the base model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.resumable import Step
from benchmarks.paper.common.tasks import TaskList
from benchmarks.paper.retrieval.experiments import Experiments
from benchmarks.paper.retrieval.ranking import retriever_of
from benchmarks.paper.retrieval.study import UNTRAINED, Task, main_draws
from benchmarks.routing.training_tasks import family_of
from deployments.cli.routing import auroc
from retriever_svc import Encoder, ProjectionFiles, Retriever, Route, RouteRequest, fit_whitening

KIND = "projections"
PARTS = ("choice", "test")
EVERYDAY = Path(__file__).parents[2] / "routing" / "held_out_prompts.jsonl"  # they have set nothing
FRESH = EVERYDAY.with_name("fresh_prompts.jsonl")  # written after everything was chosen; nothing was chosen with them
PER_FOREIGN_TASK = 25
PER_WIDE_TASK = 20  # test queries of each task of the wide pool
TURNED_AWAY = 0.05  # of the pool's own prompts, at the operating point of the table
_BATCH = 512  # prompts routed together
_TOP_K = 3


@dataclass(frozen=True, slots=True)
class Others:
    """Prompts that no adapter of the pool is for; those of foreign tasks by part (`choice`, `test`)."""

    foreign: Mapping[str, Sequence[str]]
    everyday: Sequence[str]


def read_everyday() -> list[str]:
    """Return the everyday prompts, which are for results only."""
    return _inputs(EVERYDAY)


def read_fresh() -> list[str]:
    """Return the everyday prompts that no projection, threshold or margin was chosen with."""
    return _inputs(FRESH)


def _inputs(file: Path) -> list[str]:
    return [json.loads(line)["input"] for line in file.read_text(encoding="utf-8").splitlines()]


def others_of(listed: TaskList, tasks: Sequence[Task], spares: Sequence[Task]) -> Others:
    """Return everyday prompts, and prompts of those spares whose family has no task in the pool."""
    families = {family_of(listed.by_name[task.name].path) for task in tasks}
    strange = [task for task in spares if family_of(listed.by_name[task.name].path) not in families]
    foreign = {part: [text for task in strange for text in getattr(task, part)[:PER_FOREIGN_TASK]] for part in PARTS}
    return Others(foreign, read_everyday())


def projection_steps(experiments: Experiments, others: Others) -> list[Step]:
    """Return a step for the untrained encoder and for each trained one of the paper's share of tasks."""
    study = experiments.study
    draws = {draw.name: draw for draw in main_draws(study.names)}
    names = [UNTRAINED, *draws]
    cost = sum(len(task.samples) + len(task.choice) + len(task.test) for task in (*study.tasks, *study.spares))

    def run(name: str) -> pa.Table:
        if name in draws:
            experiments.train(draws[name])
        spares = study.spares if name == UNTRAINED else ()
        return projected_rows(experiments.encoder(name), name, study.tasks, spares, others)

    return [Step(f"{KIND} {n}", experiments.rows / f"{KIND}-{n}.parquet", cost, lambda n=n: run(n)) for n in names]


def projected_encoders(encoder: Encoder, samples: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Encoder]]:
    """Yield (projection, encoder): without one, with the packaged one if there is one, and fitted to the pool."""
    shipped = ProjectionFiles().shipped(encoder.identity)
    yield "none", encoder
    if shipped is not None:
        yield "packaged", encoder.projected(shipped)
    groups, texts = [encoder.encode_plain(own, [""] * len(own)) for own in samples.values()], list(samples.values())
    yield "refit", encoder.projected(fit_whitening(encoder.identity, groups, texts, shipped))


def projected_rows(
    encoder: Encoder, name: str, tasks: Sequence[Task], spares: Sequence[Task], others: Others
) -> pa.Table:
    """Return a row for each projection and prompt: the rank of its own adapter among 3, and the best confidence.

    `kind`: `own`, `foreign` and `everyday` over the pool; `wide` over the pool with all spares, if there are any.
    """
    rows = []
    for wide in (False, True) if spares else (False,):
        pool = [*tasks, *spares] if wide else list(tasks)
        samples = {task.name: task.samples for task in pool}
        for projection, projected in projected_encoders(encoder, samples):
            retriever = retriever_of(samples, projected)
            about = {"encoder": name, "projection": projection}
            if wide:
                few = [replace(task, test=task.test[:PER_WIDE_TASK]) for task in pool]
                rows += [about | row for row in _own_rows(retriever, few, "wide", ("test",))]
                continue
            rows += [about | row for row in _own_rows(retriever, pool, "own", PARTS)]
            for part in PARTS:
                rows += [about | row for row in _rows(retriever, "foreign", part, "", others.foreign[part])]
            rows += [about | row for row in _rows(retriever, "everyday", "test", "", others.everyday)]
    return pa.Table.from_pylist(rows)


def _own_rows(
    retriever: Retriever, tasks: Sequence[Task], kind: str, parts: Sequence[str]
) -> Iterator[dict[str, object]]:
    for part in parts:
        for task in tasks:
            yield from _rows(retriever, kind, part, task.name, getattr(task, part))


def _rows(retriever: Retriever, kind: str, part: str, task: str, texts: Sequence[str]) -> Iterator[dict[str, object]]:
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        routes = retriever.route([RouteRequest(text, top_k=_TOP_K) for text in batch])
        for number, route in enumerate(routes, start):
            assert isinstance(route, Route), route
            found = [candidate.ref.name for candidate in route.candidates]
            yield {
                "kind": kind,
                "part": part,
                "task": task,
                "query": number,
                "place": found.index(task) + 1 if task in found else 0,
                "best": found[0],
                "confidence": max(candidate.confidence for candidate in route.candidates),
                "abstained": route.abstained,
            }


class Projections:
    """The measured rows of one part."""

    def __init__(self, rows: pd.DataFrame, part: str) -> None:
        self._rows = rows[rows["part"] == part]
        self.encoders = list(dict.fromkeys(rows["encoder"]))

    def groups(self) -> dict[str, list[str]]:
        """Return the encoders of each line: the untrained one, and the trained ones together."""
        trained = [name for name in self.encoders if name != UNTRAINED]
        return {UNTRAINED: [UNTRAINED]} | ({"trained on 40 %": trained} if trained else {})

    def projections(self, encoders: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(self._rows[self._rows["encoder"].isin(encoders)]["projection"]))

    def of(self, encoder: str, projection: str, kind: str) -> pd.DataFrame:
        rows = self._rows
        return rows[(rows["encoder"] == encoder) & (rows["projection"] == projection) & (rows["kind"] == kind)]

    def hits(self, encoders: Sequence[str], projection: str, depth: int = 1, kind: str = "own") -> np.ndarray:
        """Return (encoders, tasks, queries): 1 if the own adapter is among the first `depth`; tasks sorted by name.

        Tasks with fewer queries than the others are left out.
        """
        found = []
        for name in encoders:
            grid = self.of(name, projection, kind).pivot(index="task", columns="query", values="place").dropna()
            found.append(((grid > 0) & (grid <= depth)).to_numpy(float))
        return np.stack(found)

    def top(self, encoders: Sequence[str], projection: str, depth: int = 1, kind: str = "own") -> Interval:
        return bootstrap(self.hits(encoders, projection, depth, kind))

    def abstained(self, encoders: Sequence[str], projection: str, kind: str) -> float:
        """Return the share turned away at the default operating point."""
        return float(np.mean([self.of(name, projection, kind)["abstained"].mean() for name in encoders]))

    def turned_away(self, encoders: Sequence[str], projection: str, kind: str) -> float:
        """Return the share turned away at the confidence that turns away `TURNED_AWAY` of the pool's own prompts."""
        shares = []
        for name in encoders:
            least = self.of(name, projection, "own")["confidence"].quantile(TURNED_AWAY)
            shares.append((self.of(name, projection, kind)["confidence"] < least).mean())
        return float(np.mean(shares))

    def auroc(self, encoders: Sequence[str], projection: str, kind: str) -> float:
        """Return how well the confidence distinguishes the pool's own prompts from those of `kind`."""
        pairs = [(self.of(name, projection, "own"), self.of(name, projection, kind)) for name in encoders]
        return float(np.mean([auroc(list(own["confidence"]), list(other["confidence"])) for own, other in pairs]))


def section(folder: Path) -> str:
    """Return the tables of both parts: the choice part is for decisions, the test part for results."""
    rows = pd.read_parquet(folder / f"retrieval_{KIND}.parquet")
    words = (
        "`packaged`: fitted to tasks that no pool has; `refit`: fitted to the pool's samples, with the packaged one as"
        " the prior if there is one. `kept`, `base model`: at `abstain: balanced`. The last columns: at the confidence"
        f" that turns away {percent(TURNED_AWAY)} % of own prompts. Everyday prompts of the test part have set nothing."
    )
    parts = [f"{words}\n"]
    parts += ["`choice` part, for decisions:\n", _table(Projections(rows, "choice"), ("foreign",))]
    parts += ["`test` part, for results:\n", _table(Projections(rows, "test"), ("foreign", "everyday"))]
    return "\n".join(parts)


def _table(found: Projections, kinds: Sequence[str]) -> str:
    header = ["encoder", "runs", "projection", "top-1", "top-3", "own kept"]
    header += [f"{kind} {what}" for what in ("to base", "AUROC", "turned away") for kind in kinds]
    has_wide = len(found.of(UNTRAINED, "none", "wide")) > 0
    lines = []
    for label, encoders in found.groups().items():
        for projection in found.projections(encoders):
            cells = [found.top(encoders, projection, depth).in_percent() for depth in (1, 3)]
            cells.append(percent(1 - found.abstained(encoders, projection, "own")))
            cells += [percent(found.abstained(encoders, projection, kind)) for kind in kinds]
            cells += [f"{found.auroc(encoders, projection, kind):.3f}" for kind in kinds]
            cells += [percent(found.turned_away(encoders, projection, kind)) for kind in kinds]
            if has_wide:
                is_wide = encoders == [UNTRAINED]
                cells.append(found.top(encoders, projection, 1, "wide").in_percent() if is_wide else "–")
            lines.append([label, str(len(encoders)), projection, *cells])
    return table([*header, *(["top-1, all tasks"] if has_wide else [])], lines)


def unseen_gains(rows: pd.DataFrame, seen: Mapping[str, set[str]]) -> dict[tuple[str, str], Interval]:
    """Return the points of top-1 over the untrained encoder on tasks that an encoder has not seen, of the test part.

    By (projection of the trained encoders, projection of the untrained one). `seen`: the training tasks by encoder.
    """
    found = Projections(rows, "test")
    encoders = [name for name in found.encoders if name in seen]
    names = sorted(found.of(UNTRAINED, "none", "own")["task"].unique())
    counts = np.array([[name not in seen[encoder] for name in names] for encoder in encoders])
    gains = {}
    for trained in found.projections(encoders):
        for untrained in found.projections([UNTRAINED]):
            more = found.hits(encoders, trained) - found.hits([UNTRAINED], untrained)
            gains[trained, untrained] = bootstrap(more, counts, resamples_tasks=True)
    return gains
