"""Measure whether `auto` recognises a task in other words than the samples': `python -m benchmarks.routing.wording`.

Each pool of `benchmarks/routing/pools` is published to a Retriever with samples of one wording, of three wordings, a
description, or both, and is asked with prompts in the samples' wording, reworded, and wrapped in other text. Nothing is
generated. `--part tune` is for choosing constants; results are those of `test`. The pools of `tune_words` and
`test_words` have samples of one wording only: bare words. `--abstain` chooses another operating point, and
`--no-projected` plain vectors. With `--semantic-router PYTHON`, a Python that has Aurelio's package of that name, the
same vectors are ranked by it too, each at the same rate of everyday prompts.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.paper.retrieval.ranking import retriever_of
from benchmarks.results_file import write_results
from benchmarks.routing.wording_pools import (
    REWORDED,
    Part,
    Prompt,
    Samples,
    WordedAdapter,
    WordedPool,
    read_everyday,
    read_pools,
)
from deployments.cli.routing import auroc
from deployments.generation.conversation import choose_texts
from gpu_worker.front.request.prompts import Message
from retriever_svc import Encoder, ProjectionFiles, Retriever, Route, RouteRequest
from retriever_svc.calibration import Abstain
from retriever_svc.ordinary_prompts import ordinary_prompts

CONDITIONS: tuple[Samples, ...] = get_args(Samples)
WRAPPED = ("context", "context_last", "agent", "system", "followup")
_BATCH = 64
_BINS = 10  # of confidences
out = Console(width=200)


@dataclass(frozen=True, slots=True)
class Choice:
    """The choice for one prompt. `margin`: of the best candidate, above its threshold."""

    prompt: Prompt
    is_first: bool
    is_kept: bool
    margin: float
    confidence: float

    @property
    def is_right(self) -> bool:
        return self.is_first and self.is_kept


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares of the prompts of one pool. `right`: its own adapter answers; `away`: the base model answers."""

    pool: str
    samples: str
    adapters: int
    same_kept: float
    same_right: float
    first: float
    right: float
    neighbours_away: float
    everyday_away: float
    chats_away: float
    context: float  # right behind or before retrieved text, per right without it
    agent: float
    system: float
    followup: float
    everyday_auroc: float  # of the margin of right choices
    neighbours_auroc: float
    calibration_error: float  # of the confidence, over in-pool and everyday prompts alike


def samples_of(adapter: WordedAdapter, kind: Samples, number: int | None = None) -> list[str]:
    """Return the texts by which an adapter is found; in a `mixed` pool every second one has its description only."""
    if kind != "mixed":
        return adapter.samples(kind, number)
    return adapter.samples("description" if sum(adapter.name.encode()) % 2 else "one", number)


def measure(
    pool: WordedPool, everyday: Sequence[Prompt], kind: Samples, encoder: Encoder, abstain: Abstain = "balanced"
) -> list[Choice]:
    """Publish the pool with samples of this kind and return the choices for its prompts and for everyday ones."""
    retriever = retriever_of({adapter.name: samples_of(adapter, kind) for adapter in pool.adapters}, encoder)
    prompts = [*pool.prompts, *everyday]
    routes: list[Route] = []
    for start in range(0, len(prompts), _BATCH):
        routes += [route_of(retriever, prompt, abstain) for prompt in prompts[start : start + _BATCH]]
    return [_choice(prompt, route) for prompt, route in zip(prompts, routes, strict=True)]


def route_of(retriever: Retriever, prompt: Prompt, abstain: Abstain) -> Route:
    """Return the choice for a conversation, by the texts that the server reads of it."""
    reading = choose_texts([Message(role, content) for role, content in prompt.messages])
    for text in reading.texts:
        [route] = retriever.route([RouteRequest(text, abstain=abstain)])
        assert isinstance(route, Route)
        if not route.abstained:
            return route
    if route.refers_back and reading.previous:
        [earlier] = retriever.route([RouteRequest(reading.previous[0][0], abstain=abstain)])
        assert isinstance(earlier, Route)
        return earlier
    return route


def _choice(prompt: Prompt, route: Route) -> Choice:
    best = max(route.candidates, key=lambda candidate: candidate.score)
    lead = route.plan.adapters[0].ref.name if route.plan.adapters else best.ref.name
    return Choice(prompt, lead == prompt.own, not route.abstained, best.score - best.threshold, best.confidence)


def outcome_of(pool: WordedPool, kind: str, choices: Sequence[Choice]) -> Outcome:
    """Return the shares of one pool."""

    def of(*kinds: str) -> list[Choice]:
        return [choice for choice in choices if choice.prompt.kind in kinds]

    def right(*kinds: str) -> float:
        return _mean([choice.is_right for choice in of(*kinds)])

    alone = right("para")
    reworded, same = of(*REWORDED), of("same")
    sure = [choice.margin for choice in reworded if choice.is_first]
    return Outcome(
        pool=pool.name,
        samples=kind,
        adapters=len(pool.adapters),
        same_kept=_mean([choice.is_kept for choice in same]),
        same_right=_mean([choice.is_right for choice in same]),
        first=_mean([choice.is_first for choice in reworded]),
        right=_mean([choice.is_right for choice in reworded]),
        neighbours_away=_mean([not choice.is_kept for choice in of("neighbour")]),
        everyday_away=_mean([not choice.is_kept for choice in of("everyday")]),
        chats_away=_mean([not choice.is_kept for choice in of("everyday_chat")]),
        context=right("context", "context_last") / max(alone, 1e-9),
        agent=right("agent") / max(alone, 1e-9),
        system=right("system") / max(alone, 1e-9),
        followup=right("followup") / max(alone, 1e-9),
        everyday_auroc=auroc(sure, [choice.margin for choice in of("everyday")]),
        neighbours_auroc=auroc(sure, [choice.margin for choice in of("neighbour")]),
        calibration_error=calibration_error([*reworded, *same], of("everyday")),
    )


def calibration_error(inside: Sequence[Choice], everyday: Sequence[Choice]) -> float:
    """Return the expected calibration error of the confidence, with equal weight for in-pool and everyday prompts."""
    weights = np.concatenate([np.full(len(group), 0.5 / len(group)) for group in (inside, everyday)])
    rows = [*inside, *everyday]
    confidences = np.asarray([choice.confidence for choice in rows])
    correct = np.asarray([choice.is_first for choice in rows], float)
    bins = np.minimum((confidences * _BINS).astype(int), _BINS - 1)
    errors = [abs(float((weights * (confidences - correct))[bins == number].sum())) for number in range(_BINS)]
    return sum(errors)


def _mean(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else float("nan")


def peer_outcomes(
    python: Path, pool: WordedPool, everyday: Sequence[Prompt], kind: Samples, encoder: Encoder
) -> Mapping[str, Mapping[str, float]]:
    """Return what semantic-router finds with the same plain vectors, at 5 % of everyday prompts and calibrated."""
    prompts = [prompt for prompt in (*pool.prompts, *everyday) if prompt.kind in (*REWORDED, "neighbour", "everyday")]
    texts = {adapter.name: samples_of(adapter, kind) for adapter in pool.adapters}
    ordinary = ordinary_prompts()
    every = [*ordinary, *(text for own in texts.values() for text in own), *(prompt.text for prompt in prompts)]
    vectors = dict(zip(every, encoder.encode_plain(every, ["local"] * len(every)).tolist(), strict=True))
    job = {
        "vectors": vectors,
        "routes": texts,
        "ordinary": ordinary,
        "prompts": [[prompt.text, prompt.kind, prompt.own] for prompt in prompts],
    }
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "job.json")
        source.write_text(json.dumps(job), encoding="utf-8")
        command = [str(python), str(Path(__file__).with_name("semantic_router_peer.py")), str(source)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    outcomes: Mapping[str, Mapping[str, float]] = json.loads(found.stdout.splitlines()[-1])
    return outcomes


def _outcomes(
    pools: Sequence[WordedPool],
    everyday: Sequence[Prompt],
    encoder: Encoder,
    abstain: Abstain,
    conditions: Sequence[Samples],
) -> Iterator[Outcome]:
    for pool in pools:
        for kind in conditions:
            outcome = outcome_of(pool, kind, measure(pool, everyday, kind, encoder, abstain))
            yield outcome
            out.print(f"{pool.name} {kind}: first {outcome.first:.3f} right {outcome.right:.3f}", highlight=False)


def main(
    part: Annotated[Part, typer.Option(help="which pools")] = "test",
    semantic_router: Annotated[Path | None, typer.Option(help="a Python with semantic-router")] = None,
    abstain: Annotated[Abstain, typer.Option(help="the operating point")] = "balanced",
    projected: Annotated[bool, typer.Option(help="with the packaged projection")] = True,
    write: bool = True,
) -> None:
    """Measure every pool of a part, print the table and write results/wording, if the options are the defaults."""
    plain = Encoder(max_cached_texts=100_000)
    encoder = plain.projected(ProjectionFiles().shipped(plain.identity)) if projected else plain
    pools, everyday = read_pools(part), read_everyday(part)
    conditions: Sequence[Samples] = ("one",) if part.endswith("_words") else CONDITIONS
    outcomes = list(_outcomes(pools, everyday, encoder, abstain, conditions))
    names = [field.name for field in fields(Outcome)]
    table = Table(*names, title=f"{part} pools at {abstain}; shares of prompts")
    for outcome in outcomes:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3g}" for value in asdict(outcome).values()))
    peers = []
    if semantic_router is not None:
        for pool in pools:
            for kind in ("one", "three"):
                peer = peer_outcomes(semantic_router, pool, everyday, kind, plain)
                peers += [{"pool": pool.name, "samples": kind, "rule": rule} | row for rule, row in peer.items()]
                out.print(peers[-1])
    with out.capture() as capture:
        out.print(table)
    figures = {
        f"{kind}_{name}": float(np.nanmean([getattr(o, name) for o in outcomes if o.samples == kind]))
        for kind in conditions
        for name in names[3:]
    }
    if write and (part, abstain, projected) == ("test", "balanced", True):
        runs = [*map(asdict, outcomes), *peers]
        write_results("wording", figures=figures, table=capture.get(), runs=runs)
    out.print(table)
    out.print(figures)


if __name__ == "__main__":
    typer.run(main)
