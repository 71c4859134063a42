"""Change the pool while requests run: `python -m benchmarks.paper.stages.arrivals`. Uses samples only, no adapters.

An index includes new adapters from its first request on. Models trained on the pool, a classifier or the encoder, are
measured both unchanged and trained again after each change.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from torch.nn import functional as F

from benchmarks import plots
from benchmarks.paper.common.markdown import percent, plot, table
from benchmarks.paper.common.options import Root
from benchmarks.paper.common.resumable import Step, run_steps, write_parquet
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.retrieval.loading import load_experiments
from benchmarks.paper.retrieval.ranking import embedded, nearest, records_of
from benchmarks.paper.retrieval.study import Task
from lora_store import LOCAL_TENANT
from retriever_svc import AdapterIndex, Encoder
from retriever_svc.training import TrainingSettings, train_encoder

ROWS = "arrivals.parquet"
NUM_REQUESTS, NUM_CHANGES, NUM_LIVE, NUM_SWAPPED = 2000, 4, 48, 12
REQUESTS_A_SECOND = 1.0  # while a training runs, the previous model answers
WINDOW, TOLERANCE = 100, 0.05
_TRAINING_S = 150.0  # of an encoder, on two idle cores; the first estimate
_CLASSIFIER_STEPS, _CLASSIFIER_RATE, _LOGIT_SCALE = 200, 0.05, 20.0


@dataclass(frozen=True, slots=True)
class Epoch:
    """The requests between two changes of the pool: (task, text) each, all of live tasks."""

    live: tuple[Task, ...]
    arrived: frozenset[str]
    requests: tuple[tuple[str, str], ...]


def stream_of(
    tasks: Sequence[Task],
    *,
    num_requests: int = NUM_REQUESTS,
    num_changes: int = NUM_CHANGES,
    num_live: int = NUM_LIVE,
    num_swapped: int = NUM_SWAPPED,
) -> list[Epoch]:
    """Replace `num_swapped` random live tasks at every change by tasks that were not live before."""
    draw = random.Random(0)
    coming = draw.sample(list(tasks), len(tasks))
    live, arrived, coming = coming[:num_live], list[Task](), coming[num_live:]
    epochs = []
    for number in range(num_changes + 1):
        if number:
            arrived, coming = coming[:num_swapped], coming[num_swapped:]
            live = [*draw.sample(live, num_live - num_swapped), *arrived]
        asked = [draw.choice(live) for _ in range(num_requests // (num_changes + 1))]
        requests = tuple((task.name, draw.choice(task.test)) for task in asked)
        epochs.append(Epoch(tuple(live), frozenset(task.name for task in arrived), requests))
    return epochs


class Router(Protocol):
    """Names the adapter of a text."""

    def follow(self, live: Sequence[Task]) -> None:
        """Adopt `live` as the pool, as far as this needs no training."""

    def route(self, texts: Sequence[str]) -> list[str]: ...


class IndexRouter:
    """The server's index. It follows the pool from generation to generation."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._index = encoder, AdapterIndex.of([], encoder.dim)

    def follow(self, live: Sequence[Task]) -> None:
        known, wanted = {record.ref.name for record in self._index.records}, {task.name: task for task in live}
        gone = [(LOCAL_TENANT, name) for name in known - wanted.keys()]
        new = {name: task.samples for name, task in wanted.items() if name not in known}
        self._index = self._index.after(gone, records_of(embedded(self._encoder, new)) if new else [])

    def route(self, texts: Sequence[str]) -> list[str]:
        return [names[0] for names in nearest(self._index, self._encoder.encode(texts), 1)]


class Classifier:
    """softmax(W e(x)) over its training tasks, e(x) the encoder's unit vector. It names no other tasks."""

    def __init__(self, encoder: Encoder, live: Sequence[Task]) -> None:
        self._encoder, self._names = encoder, [task.name for task in live]
        vectors = torch.from_numpy(encoder.encode([text for task in live for text in task.samples]))
        labels = torch.tensor([number for number, task in enumerate(live) for _ in task.samples])
        self._weight = torch.zeros(len(live), encoder.dim, requires_grad=True)
        optimizer = torch.optim.Adam([self._weight], lr=_CLASSIFIER_RATE)
        for _ in range(_CLASSIFIER_STEPS):
            optimizer.zero_grad()
            F.cross_entropy(_LOGIT_SCALE * vectors @ self._weight.T, labels).backward()
            optimizer.step()

    def follow(self, live: Sequence[Task]) -> None:
        """Do nothing: without training the classifier cannot adapt."""

    def route(self, texts: Sequence[str]) -> list[str]:
        best = self._encoder.encode(texts) @ self._weight.detach().numpy().T
        return [self._names[number] for number in best.argmax(axis=1)]


Make = Callable[[Sequence[Task]], Router]
"""The router trained on these tasks."""


def stream_rows(name: str, stream: Sequence[Epoch], make: Make, *, retrains: bool) -> pa.Table:
    """Return a row per request: was its own adapter named. `lag`: requests between a change and the end of training.

    With `retrains` a training starts at every change, or when the previous one ends. Its model answers afterwards.
    """
    routers, rows = [(0, make(stream[0].live))], []
    for number, epoch in enumerate(stream):
        start, texts = len(rows), [text for _, text in epoch.requests]
        if retrains and number:
            began = time.perf_counter()
            router = make(epoch.live)
            router.follow(epoch.live)
            took = math.ceil(REQUESTS_A_SECOND * (time.perf_counter() - began))
            routers.append((max(start, routers[-1][0]) + took, router))
        named = [""] * len(texts)
        for ready, router in _serving(routers, start, start + len(texts)):
            router.follow(epoch.live)
            place = max(0, ready - start)
            named[place:] = router.route(texts[place:])
        lag = max(0, routers[-1][0] - start)
        for (task, _), found in zip(epoch.requests, named, strict=True):
            about = {"router": name, "epoch": number, "position": len(rows), "lag": lag}
            rows.append(about | {"task": task, "arrived": task in epoch.arrived, "hit": found == task})
    return pa.Table.from_pylist(rows)


def _serving(routers: Sequence[tuple[int, Router]], start: int, end: int) -> list[tuple[int, Router]]:
    """Return the models that answer between the two positions, oldest first, each with its first position."""
    newest = [pair for pair in routers if pair[0] <= start][-1:]
    return newest + [pair for pair in routers if start < pair[0] < end]


def trained_encoder(live: Sequence[Task], target: Path) -> Encoder:
    """Train a new encoder at every call, because its duration counts. It is stored in `target`."""
    shutil.rmtree(target, ignore_errors=True)
    texts = {task.name: task.samples for task in live}
    return Encoder(train_encoder(texts, target, settings=TrainingSettings(bf16=True)))


def steps_of(
    stream: Sequence[Epoch],
    folder: Path,
    untrained: Callable[[], Encoder],
    train: Callable[[Sequence[Task]], Encoder],
) -> list[Step]:
    """Return a step per router. The unit of cost is one training of an encoder."""

    def trained(live: Sequence[Task]) -> Router:
        return IndexRouter(train(live))

    def step(name: str, make: Make, cost: float, *, retrains: bool = False) -> Step:
        path = folder / f"{name.replace(', ', '-').replace(' ', '_')}.parquet"
        return Step(name, path, cost, lambda: stream_rows(name, stream, make, retrains=retrains))

    return [
        step("index, untrained encoder", lambda _: IndexRouter(untrained()), 0.3),
        step("index, encoder trained once", trained, 1.3),
        step("index, encoder trained at each change", trained, len(stream) + 0.3, retrains=True),
        step("classifier, trained once", lambda live: Classifier(untrained(), live), 0.1),
        step("classifier, trained at each change", lambda live: Classifier(untrained(), live), 0.1, retrains=True),
    ]


def requests_until_back(hits: np.ndarray, wanted: float, window: int = WINDOW) -> int | None:
    """Return the number of requests until the share `wanted` of the next `window` hits; None: never.

    `hits`: 0 or 1 per request, from one change of the pool to the next.
    """
    for start in range(len(hits) - window + 1):
        if hits[start : start + window].mean() >= wanted:
            return start
    return None


def arrivals_table(rows: pd.DataFrame) -> str:
    """Return a row per router, over all changes."""
    lines = []
    for name, own in rows.groupby("router", sort=False):
        changed = own[own["epoch"] > 0]
        hits = {epoch: part["hit"].to_numpy(float) for epoch, part in own.sort_values("position").groupby("epoch")}
        wanted = hits.pop(0).mean() - TOLERANCE
        back = [requests_until_back(part, wanted) for part in hits.values()]
        shares = [own[own["epoch"] == 0], changed, changed[~changed["arrived"]], changed[changed["arrived"]]]
        cells = [percent(part["hit"].mean()) for part in shares]
        until_back = ", ".join("never" if count is None else str(count) for count in back)
        lags = changed.groupby("epoch")["lag"].max()
        lines.append([str(name), *cells, f"{lags.mean():.0f}", until_back])
    header = ["router", "before any change", "after", "after: kept tasks", "after: new tasks"]
    return table([*header, "requests until trained", "requests until hit@1 is back, by change"], lines)


def section(rows: pd.DataFrame) -> str:
    """Return the report's section."""
    changes = rows["epoch"].max()
    words = (
        f"{rows['position'].max() + 1} requests, {changes} changes of the pool; hit@1 in percent. A router is back"
        f" when its hit@1 over the next {WINDOW} requests is at most {100 * TOLERANCE:.0f} points below that before any"
        f" change, which is about the random variation of {WINDOW} requests. During a training {REQUESTS_A_SECOND:g}"
        " request per second arrives.\n"
    )
    return "\n".join(
        [
            "## Adapters that come and go\n",
            words,
            plot("arrivals", "hit@1 along the stream"),
            arrivals_table(rows),
        ]
    )


def _plot(rows: pd.DataFrame) -> None:
    curves = {}
    for name, own in rows.groupby("router", sort=False):
        smooth = own.sort_values("position")["hit"].astype(float).rolling(WINDOW).mean()
        curves[str(name)] = [(place, 100 * smooth.iloc[place - 1]) for place in range(WINDOW, len(own) + 1, WINDOW)]
    plots.lines("paper/arrivals", curves, "requests", f"hit@1 of the last {WINDOW}, %", log_x=False)


def write_tables(folder: Path) -> None:
    """Write the section of the report and its plot from the rows in `folder`."""
    rows = pd.read_parquet(folder / ROWS)
    (folder / "arrivals.md").write_text(section(rows), encoding="utf-8")
    _plot(rows)


def main(root: Root = DEFAULT_ROOT) -> None:
    """Run the stream through every router without results, then write rows, section and plot."""
    workspace, out = Workspace(root), Console(width=120)
    study = load_experiments(workspace).study
    stream = stream_of((*study.tasks, *study.spares))
    folder = workspace.rows / "arrivals" / study.digest
    steps = steps_of(
        stream, folder, cache(Encoder), lambda live: trained_encoder(live, workspace.encoders / "arrivals")
    )
    run_steps(steps, _TRAINING_S, out)
    write_parquet(PAPER_RESULTS / ROWS, pa.concat_tables([pq.read_table(step.path) for step in steps]))
    write_tables(PAPER_RESULTS)


if __name__ == "__main__":
    typer.run(main)
