"""No tenant can draw everyday prompts with adapters whose samples are such prompts, one at a time or together.

The tests use the packaged encoder, and everyday prompts that are not among the packaged ordinary ones.
"""

from __future__ import annotations

import numpy as np
import pytest

from retriever_svc import Encoder
from tests.retriever_svc.attacks import everyday_prompts, held_out, narrow_groups, published, routes, starter_samples
from tests.soak import Scale

MOST_DRAWN = 0.1


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(max_cached_texts=4096)


@pytest.mark.parametrize(("num_adapters", "num_samples"), [(1, 200), (50, 5), (200, 1)])
def test_adapters_of_ordinary_prompts_draw_few_everyday_prompts_together(
    encoder: Encoder, num_adapters: int, num_samples: int
) -> None:
    attackers = published(encoder, narrow_groups(encoder, num_adapters, num_samples), "mallory")
    drawn = [not route.abstained for route in routes(encoder, attackers, everyday_prompts())]
    assert len(drawn) == 131
    assert np.mean(drawn) <= MOST_DRAWN, np.mean(drawn)


def test_the_starter_pool_answers_its_prompts_next_to_the_attackers(encoder: Encoder, scale: Scale) -> None:
    num_prompts = scale.pick("held-out prompts a task", small=4, full=12)
    honest = starter_samples()
    asked = {name: held_out(name)[:num_prompts] for name in honest}
    records = published(encoder, honest, "acme")
    records += published(encoder, narrow_groups(encoder, 50, 5), "mallory")
    for name, prompts in asked.items():
        for route in routes(encoder, records, prompts):
            assert route.plan.adapters and route.plan.adapters[0].ref.name == name
