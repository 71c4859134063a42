"""No tenant can draw everyday prompts with adapters whose samples are such prompts, one at a time or together.

The tests use the packaged encoder, and everyday prompts that are not among the packaged ordinary ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.routing.wording_pools import read_everyday
from lora_store.adapter import Sample
from retriever_svc import Encoder, LivePool, ProjectionFiles, Retriever, Route, RouteRequest
from retriever_svc.embedding import embed_groups
from retriever_svc.encoder_files import DEFAULT_MODEL, ENGLISH_MODEL
from tests.retriever_svc.attacks import (
    OWNER,
    everyday_prompts,
    held_out,
    narrow_groups,
    published,
    routes,
    starter_samples,
)
from tests.retriever_svc.pool_fakes import Source, record_of
from tests.shared_encoders import shared_encoder
from tests.soak import Scale

MOST_DRAWN = 0.1


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return shared_encoder(max_cached_texts=8192)


@pytest.mark.parametrize(("num_adapters", "num_samples"), [(1, 200), (50, 5), (200, 1)])
def test_adapters_of_ordinary_prompts_draw_few_everyday_prompts_together(
    encoder: Encoder, num_adapters: int, num_samples: int
) -> None:
    attackers = published(encoder, narrow_groups(encoder, num_adapters, num_samples), "mallory")
    drawn = [not route.abstained for route in routes(encoder, attackers, everyday_prompts())]
    assert len(drawn) == 131
    assert np.mean(drawn) <= MOST_DRAWN, np.mean(drawn)


@pytest.mark.parametrize(
    ("num_adapters", "num_samples", "most"), [(1, 200, MOST_DRAWN), (50, 5, MOST_DRAWN), (200, 1, 0.25)]
)
def test_adapters_of_bare_words_draw_few_everyday_words_together(
    encoder: Encoder, num_adapters: int, num_samples: int, most: float
) -> None:
    attackers = published(encoder, narrow_groups(encoder, num_adapters, num_samples, of_words=True), "mallory")
    words = [prompt.text for prompt in read_everyday("tune_words")]
    drawn = [not route.abstained for route in routes(encoder, attackers, words)]
    assert len(drawn) == 70
    assert np.mean(drawn) <= most, np.mean(drawn)


def test_the_starter_pool_answers_its_prompts_next_to_the_attackers(encoder: Encoder, scale: Scale) -> None:
    num_prompts = scale.pick("held-out prompts a task", small=4, full=12)
    honest = starter_samples()
    asked = {name: held_out(name)[:num_prompts] for name in honest}
    records = published(encoder, honest, "acme")
    records += published(encoder, narrow_groups(encoder, 50, 5), "mallory")
    for name, prompts in asked.items():
        for route in routes(encoder, records, prompts):
            assert route.plan.adapters and route.plan.adapters[0].ref.name == name


@pytest.mark.parametrize("model", [DEFAULT_MODEL, ENGLISH_MODEL])
def test_the_margins_hold_for_encoders_without_a_projection(model: str, encoder: Encoder, scale: Scale) -> None:
    num_prompts = scale.pick("held-out prompts a task", small=2, full=12)
    plain = encoder if model == DEFAULT_MODEL else shared_encoder(model)
    samples = {name: [Sample(text) for text in texts] for name, texts in starter_samples().items()}
    groups = list(samples.values())
    embeddings = zip(samples, embed_groups(plain, groups, [OWNER] * len(groups)), strict=True)
    records = [
        record_of(name, e.vector, own_scores=e.own_scores.tolist(), encoder=e.encoder)
        for name, e in embeddings
        if e is not None
    ]
    retriever = Retriever(LivePool(lambda _: plain, Source(*records), projections=ProjectionFiles(), projection="none"))

    def routed(prompts: Sequence[str]) -> list[Route]:
        answers = retriever.route([RouteRequest(prompt) for prompt in prompts])
        return [answer for answer in answers if isinstance(answer, Route)]

    asked = [(name, text) for name in samples for text in held_out(name)]
    asked = asked[:: 12 // num_prompts]
    own = [
        bool(route.plan.adapters) and route.plan.adapters[0].ref.name == name
        for (name, _), route in zip(asked, routed([text for _, text in asked]), strict=True)
    ]
    assert len(own) == 12 * num_prompts
    assert np.mean(own) >= 0.9, np.mean(own)
    everyday = routed(everyday_prompts())
    away = [route.abstained for route in everyday]
    assert len(away) == 131
    assert np.mean(away) >= 0.9, np.mean(away)
