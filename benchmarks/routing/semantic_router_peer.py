"""Rank prompts with Aurelio's semantic-router 1.1 by given vectors: a peer of `benchmarks.routing.wording`.

It runs in a Python that has that package: `python semantic_router_peer.py JOB`. It prints one line of JSON: shares by
rule. The threshold of `mean` and `max` is where 5 % of the everyday prompts are answered; `calibrated` is the package's
own calibration, fitted to the samples and to ordinary prompts.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
from semantic_router import Route
from semantic_router.encoders import DenseEncoder
from semantic_router.routers import IndexedRouter

REWORDED = ("para", "typo", "last", "bare", "other")


class Known(DenseEncoder):
    """Returns vectors that are known already."""

    name: str = "known"
    vectors: dict

    def __call__(self, docs: list) -> list:
        return [self.vectors[doc] for doc in docs]

    async def acall(self, docs: list) -> list:
        return self(docs)


def shares(scores: list[dict[str, float]], prompts: list[list[str]], least: float | None = None) -> dict[str, float]:
    """Return the shares of prompts that go to their own route first, are answered by it, and are turned away."""
    best = [max(row, key=row.get) if row else None for row in scores]
    tops = np.asarray([max(row.values()) if row else -1.0 for row in scores])
    kinds = np.asarray([kind for _, kind, _ in prompts])
    first = np.asarray([name == own for name, (_, _, own) in zip(best, prompts, strict=True)])
    everyday, neighbour, reworded = kinds == "everyday", kinds == "neighbour", np.isin(kinds, REWORDED)
    kept = tops > (np.quantile(tops[everyday], 0.95) if least is None else least)
    return {
        "first": float(first[reworded].mean()),
        "right": float((first & kept)[reworded].mean()),
        "neighbours_away": float((~kept)[neighbour].mean()) if neighbour.any() else 1.0,
        "everyday_away": float((~kept)[everyday].mean()),
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    encoder = Known(vectors=job["vectors"])
    routes = [Route(name=name, utterances=list(dict.fromkeys(texts))) for name, texts in job["routes"].items()]
    texts = [text for text, _, _ in job["prompts"]]
    found = {}
    for rule in ("mean", "max"):
        router = IndexedRouter(encoder=encoder, routes=routes, top_k=5, aggregation=rule)
        scores = asyncio.run(router._scores_many(texts))
        found[rule] = shares(scores, job["prompts"])
    samples = [(text, name) for name, own in job["routes"].items() for text in own]
    ordinary = [(text, None) for text in job["ordinary"]]
    router = IndexedRouter(encoder=encoder, routes=routes, top_k=5, aggregation="max")
    router.fit([text for text, _ in samples + ordinary], [name for _, name in samples + ordinary])
    answers = [router(text, threshold=0.5) for text in texts]
    chosen = [{} if answer.name is None else {answer.name: 1.0} for answer in answers]
    found["calibrated"] = shares(chosen, job["prompts"], least=0.0)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
