"""Measure what accepted prompts change: `python -m benchmarks.routing.learning`.

Requests draw their prompts from one half of each adapter's reworded prompts. A share of them names an adapter, and of
these a share names a wrong one. The server proposes their prompts as samples within its bounds, and every owner accepts
all of them, without looking. Then the other half of the prompts is asked, neighbouring tasks that no adapter is for,
and everyday prompts. A liar does the same with prompts of its victims. Nothing is generated.
"""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.paper.retrieval.ranking import records_of
from benchmarks.pool_scale import Source
from benchmarks.results_file import write_results
from benchmarks.routing.wording_pools import (
    REWORDED,
    Part,
    Prompt,
    Samples,
    WordedPool,
    read_everyday,
    read_pools,
)
from lora_store import Feedback, Location, Sample, Snapshot
from lora_store.feedback import FeedbackFiles
from retriever_svc import (
    Encoder,
    IndexSettings,
    LivePool,
    ProjectionFiles,
    Retriever,
    Route,
    RouteRequest,
    embed_groups,
)
from retriever_svc.learning import accept
from retriever_svc.pool import Pool

LABELLED, WRONG = 0.05, 0.1  # of the requests; of the labelled ones
NUM_KEYS = 20
NUM_LIES = 20
TENANT = "local"
Texts = Mapping[str, Sequence[Sample]]
out = Console(width=160)


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of the prompts that were not in the traffic."""

    first: float
    right: float
    same_right: float
    neighbours_away: float
    everyday_away: float


@dataclass(frozen=True, slots=True)
class Run:
    """One pool before and after its traffic, or before and after the lies. Lies: of the victims' own prompts only."""

    pool: str
    samples: str
    what: str
    seed: int
    num_accepted: int
    num_refused: int  # adapters whose change was refused
    before: Shares
    after: Shares


class World:
    """A pool whose samples may change, with the encoder and the bounds of the server."""

    def __init__(self, texts: Texts, encoder: Encoder, files: ProjectionFiles) -> None:
        self.texts, self._encoder, self._files = dict(texts), encoder, files
        embeddings = embed_groups(encoder, list(texts.values()), [TENANT] * len(texts))
        pairs = zip(texts, embeddings, strict=True)
        self._records = records_of({name: embedding for name, embedding in pairs if embedding is not None})

    def retriever(self) -> Retriever:
        source = Source(self._records)
        return Retriever(LivePool(lambda _: self._encoder, source, projections=self._files, projection="none"))

    def pool(self) -> Pool:
        snapshot = Snapshot(1, {(record.ref.tenant, record.ref.name): record for record in self._records})
        return Pool.of(snapshot, self._encoder, IndexSettings(), ordinary=self._files.ordinary(self._encoder))

    def accepting(self, proposed: Mapping[str, Sequence[str]]) -> tuple[World, int, int]:
        """Return the world after all owners accepted, how many prompts count, and how many changes were refused."""
        texts, num_refused, pool = dict(self.texts), 0, self.pool()
        for name, prompts in proposed.items():
            live = next(record for record in self._records if record.ref.name == name)
            resampled = accept(pool, live, prompts, lambda record: self.texts[record.ref.name], "balanced")
            if resampled.effect.refusal is None:
                texts[name] = resampled.samples
            else:
                num_refused += 1
        num_accepted = sum(sample.is_accepted for own in texts.values() for sample in own)
        return World(texts, self._encoder, self._files), num_accepted, num_refused


def proposed_by(labels: Sequence[tuple[str, str, str]]) -> Mapping[str, list[str]]:
    """Return what the server proposes for each adapter of these labels (prompt, adapter, key), newest first."""
    with tempfile.TemporaryDirectory() as folder:
        files = FeedbackFiles(Location(folder))
        for text, name, key in labels:
            files.put(TENANT, "proposed", Feedback.proposed(text, name, key), datetime.now(UTC))
        names = dict.fromkeys(name for _, name, _ in labels)
        return {name: [item.text for item in files.all(TENANT, "proposed", name)] for name in names}


def halves(pool: WordedPool, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Return the reworded prompts of the traffic, and those that are asked afterwards."""
    traffic, held = [], []
    by_adapter: defaultdict[str | None, list[Prompt]] = defaultdict(list)
    for prompt in pool.of_kind(*REWORDED):
        by_adapter[prompt.own].append(prompt)
    for own in by_adapter.values():
        random.Random(f"{seed} {own[0].own}").shuffle(own)
        traffic += own[: len(own) // 2]
        held += own[len(own) // 2 :]
    return traffic, held


def labels_of(pool: WordedPool, traffic: Sequence[Prompt], num_requests: int, seed: int) -> list[tuple[str, str, str]]:
    """Return (prompt, adapter, key) of the requests that name an adapter."""
    chance, names, labels = random.Random(seed), [adapter.name for adapter in pool.adapters], []
    for _ in range(num_requests):
        prompt = chance.choice(traffic)
        if chance.random() < LABELLED:
            name = chance.choice(names) if chance.random() < WRONG else prompt.own
            assert name is not None, "reworded prompts have an adapter"
            labels.append((prompt.text, name, f"key {chance.randrange(NUM_KEYS)}"))
    return labels


def lies_about(pool: WordedPool, num_victims: int, num_keys: int) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Return the victims, and lies: prompts in their samples' wording, as labels of the last adapter."""
    *others, liar = [adapter.name for adapter in pool.adapters]
    asked = pool.of_kind("same", *REWORDED)
    prompts = {name: [p.text for p in asked if p.own == name] for name in others}
    victims = [name for name in others if prompts[name]][:num_victims]
    lies = []
    for number in range(NUM_LIES):
        own = prompts[victims[number % len(victims)]]
        lies.append((own[number // len(victims) % len(own)], liar, f"key {number % num_keys}"))
    return victims, lies


def shares_of(world: World, pool: WordedPool, held: Sequence[Prompt], everyday: Sequence[Prompt]) -> Shares:
    """Ask all prompts and return the shares."""
    retriever = world.retriever()

    def asked(prompts: Sequence[Prompt]) -> list[tuple[bool, bool]]:
        """Return for each prompt whether its own adapter is first, and whether an adapter answers."""
        found = []
        for prompt in prompts:
            [route] = retriever.route([RouteRequest(prompt.text)])
            assert isinstance(route, Route)
            best = max(route.candidates, key=lambda candidate: candidate.score).ref.name
            lead = route.plan.adapters[0].ref.name if route.plan.adapters else best
            found.append((lead == prompt.own, not route.abstained))
        return found

    def right(found: Sequence[tuple[bool, bool]]) -> float:
        return float(np.mean([is_first and is_kept for is_first, is_kept in found])) if found else float("nan")

    def away(found: Sequence[tuple[bool, bool]]) -> float:
        return float(np.mean([not is_kept for _, is_kept in found])) if found else float("nan")

    reworded = asked(held)
    return Shares(
        first=float(np.mean([is_first for is_first, _ in reworded])),
        right=right(reworded),
        same_right=right(asked([p for p in pool.of_kind("same") if p.own in {h.own for h in held}])),
        neighbours_away=away(asked(pool.of_kind("neighbour"))),
        everyday_away=away(asked([p for p in everyday if p.kind == "everyday"])),
    )


def runs_of(
    pool: WordedPool,
    everyday: Sequence[Prompt],
    kind: Samples,
    encoder: Encoder,
    *,
    num_requests: int = 1000,
    num_seeds: int = 3,
) -> Iterator[Run]:
    """Yield the runs of one pool: traffic of several seeds, then one and five victims of a liar with one or 20 keys."""
    texts = {adapter.name: [Sample(text) for text in adapter.samples(kind)] for adapter in pool.adapters}
    world = World(texts, encoder, ProjectionFiles())
    for seed in range(num_seeds):
        traffic, held = halves(pool, seed)
        labels = labels_of(pool, traffic, num_requests, seed)
        after, num_accepted, num_refused = world.accepting(proposed_by(labels))
        before = shares_of(world, pool, held, everyday)
        then = shares_of(after, pool, held, everyday)
        yield Run(pool.name, kind, f"{num_requests} requests", seed, num_accepted, num_refused, before, then)
    for num_victims in (1, 5):
        for num_keys in (1, NUM_LIES):
            victims, lies = lies_about(pool, num_victims, num_keys)
            asked = [prompt for prompt in pool.of_kind("same", *REWORDED) if prompt.own in victims]
            after, num_accepted, num_refused = world.accepting(proposed_by(lies))
            shares = [shares_of(one, pool, asked, everyday) for one in (world, after)]
            what = f"{NUM_LIES} lies of {num_keys} keys about {num_victims}"
            yield Run(pool.name, kind, what, 0, num_accepted, num_refused, *shares)


def table_of(runs: Sequence[Run]) -> tuple[Table, dict[str, float]]:
    """Return means over pools and seeds for each kind of samples and event, and the changes in points."""
    names = [field.name for field in fields(Shares)]
    table = Table("samples", "event", "accepted", "refused", *[f"{name} before, after" for name in names])
    figures: dict[str, float] = {}
    groups: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.samples, run.what].append(run)
    for (kind, what), own in groups.items():
        cells = []
        for name in names:
            before, after = (
                float(np.nanmean([getattr(s, name) for s in ss]))
                for ss in zip(*[(r.before, r.after) for r in own], strict=True)
            )
            figures[f"{kind} {what} {name} points"] = 100 * (after - before)
            cells.append(f"{100 * before:.1f}, {100 * after:.1f}")
        counts = [f"{np.mean([getattr(run, name) for run in own]):.1f}" for name in ("num_accepted", "num_refused")]
        table.add_row(kind, what, *counts, *cells)
    return table, figures


def main(
    part: Annotated[str, typer.Option(help="tune or test")] = "test",
    only: Annotated[list[str] | None, typer.Option("--pool", help="this pool; repeatable; default: all")] = None,
    num_requests: int = 1000,
    num_seeds: int = 3,
    write: bool = True,
) -> None:
    """Measure the pools of a part, print the table and write results/learning."""
    chosen: Part = "tune" if part == "tune" else "test"
    plain = Encoder(max_cached_texts=100_000)
    encoder = plain.projected(ProjectionFiles().shipped(plain.identity))
    runs: list[Run] = []
    for pool in read_pools(chosen):
        if only and pool.name not in only:
            continue
        for kind in ("one", "three"):
            for run in runs_of(
                pool, read_everyday(chosen), kind, encoder, num_requests=num_requests, num_seeds=num_seeds
            ):
                runs.append(run)
                out.print(f"{run.pool} {run.samples} {run.what}: {run.before.right:.3f} {run.after.right:.3f}")
    table, figures = table_of(runs)
    with out.capture() as capture:
        out.print(table)
    if write:
        write_results("learning", figures=figures, table=capture.get(), runs=list(map(asdict, runs)))
    out.print(table)


if __name__ == "__main__":
    typer.run(main)
