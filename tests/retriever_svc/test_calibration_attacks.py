"""No tenant can draw everyday prompts with adapters whose samples are such prompts, one at a time or together.

The tests use the packaged encoder, and everyday prompts that are not among the packaged ordinary ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lora_store.adapter import Sample
from lora_store.records import AdapterRecord
from retriever_svc import Encoder, LivePool, ProjectionFiles, Retriever, Route, RouteRequest
from retriever_svc.embedding import embed_groups
from retriever_svc.encoder_files import DEFAULT_MODEL, ENGLISH_MODEL
from retriever_svc.ordinary_prompts import ordinary_prompts
from tests.retriever_svc.pool_fakes import Source, record_of
from tests.soak import Scale

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MOST_DRAWN = 0.1


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(max_cached_texts=4096)


def _lines(path: Path) -> list[str]:
    return [json.loads(line)["input"] for line in path.read_text(encoding="utf-8").splitlines()]


def published(encoder: Encoder, groups: dict[str, Sequence[str]], tenant: str) -> list[AdapterRecord]:
    """Return approved public adapters with these samples."""
    files = ProjectionFiles()
    projected = encoder.projected(files.shipped(encoder.identity))
    embeddings = embed_groups(projected, [[Sample(text) for text in texts] for texts in groups.values()])
    vectors = zip(groups, embeddings, strict=True)
    return [
        record_of(name, e.vector, tenant=tenant, own_scores=e.own_scores.tolist(), encoder=e.encoder, approved=True)
        for name, e in vectors
        if e is not None
    ]


def routes(encoder: Encoder, records: Sequence[AdapterRecord], prompts: Sequence[str]) -> list[Route]:
    """Return what a third tenant gets."""
    retriever = Retriever(LivePool(lambda _: encoder, Source(*records), projections=ProjectionFiles()))
    answers = retriever.route([RouteRequest(prompt, tenant="initech") for prompt in prompts])
    found = [answer for answer in answers if isinstance(answer, Route)]
    assert len(found) == len(prompts)
    return found


def narrow_groups(encoder: Encoder, num_adapters: int, num_samples: int) -> dict[str, Sequence[str]]:
    """Return adapters of neighbouring ordinary prompts, spread over all of them."""
    texts = ordinary_prompts()
    rows = encoder.encode(texts)
    rng = np.random.default_rng(0)
    seeds = rng.choice(len(texts), num_adapters, replace=False)
    nearest = np.argsort(-(rows[seeds] @ rows.T), axis=1)[:, :num_samples]
    return {f"narrow-{n}": [texts[place] for place in own] for n, own in enumerate(nearest)}


@pytest.mark.parametrize(("num_adapters", "num_samples"), [(1, 200), (50, 5), (200, 1)])
def test_adapters_of_ordinary_prompts_draw_few_everyday_prompts_together(
    encoder: Encoder, num_adapters: int, num_samples: int
) -> None:
    attackers = published(encoder, narrow_groups(encoder, num_adapters, num_samples), "mallory")
    everyday = _lines(ROOT / "benchmarks" / "routing" / "held_out_prompts.jsonl")
    drawn = [not route.abstained for route in routes(encoder, attackers, everyday)]
    assert len(drawn) == 131
    assert np.mean(drawn) <= MOST_DRAWN, np.mean(drawn)


def test_the_starter_pool_answers_its_prompts_next_to_the_attackers(encoder: Encoder, scale: Scale) -> None:
    num_prompts = scale.pick("held-out prompts a task", small=4, full=12)
    folders = sorted(path.parent for path in (EXAMPLES / "starter_pool").glob("*/lora_samples.jsonl"))
    honest = {folder.name: _lines(folder / "lora_samples.jsonl") for folder in folders}
    asked = {name: _lines(EXAMPLES / "starter_heldout" / f"{name}.jsonl")[:num_prompts] for name in honest}
    records = published(encoder, dict(honest), "acme")
    records += published(encoder, narrow_groups(encoder, 50, 5), "mallory")
    for name, prompts in asked.items():
        for route in routes(encoder, records, prompts):
            assert route.plan.adapters and route.plan.adapters[0].ref.name == name


@pytest.mark.parametrize("model", [DEFAULT_MODEL, ENGLISH_MODEL])
def test_the_margins_hold_for_encoders_without_a_projection(model: str, scale: Scale) -> None:
    num_prompts = scale.pick("held-out prompts a task", small=2, full=12)
    plain = Encoder(model)
    folders = sorted(path.parent for path in (EXAMPLES / "starter_pool").glob("*/lora_samples.jsonl"))
    samples = {folder.name: [Sample(text) for text in _lines(folder / "lora_samples.jsonl")] for folder in folders}
    embeddings = zip(samples, embed_groups(plain, list(samples.values())), strict=True)
    records = [
        record_of(name, e.vector, own_scores=e.own_scores.tolist(), encoder=e.encoder)
        for name, e in embeddings
        if e is not None
    ]
    retriever = Retriever(LivePool(lambda _: plain, Source(*records), projections=ProjectionFiles(), projection="none"))

    def routed(prompts: Sequence[str]) -> list[Route]:
        answers = retriever.route([RouteRequest(prompt) for prompt in prompts])
        return [answer for answer in answers if isinstance(answer, Route)]

    asked = [(name, text) for name in samples for text in _lines(EXAMPLES / "starter_heldout" / f"{name}.jsonl")]
    asked = asked[:: 12 // num_prompts]
    own = [
        bool(route.plan.adapters) and route.plan.adapters[0].ref.name == name
        for (name, _), route in zip(asked, routed([text for _, text in asked]), strict=True)
    ]
    assert len(own) == 12 * num_prompts
    assert np.mean(own) >= 0.9, np.mean(own)
    everyday = routed(_lines(ROOT / "benchmarks" / "routing" / "held_out_prompts.jsonl"))
    away = [route.abstained for route in everyday]
    assert len(away) == 131
    assert np.mean(away) >= 0.9, np.mean(away)
