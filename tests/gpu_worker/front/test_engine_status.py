from __future__ import annotations

from gpu_worker.front.engine_status import Counters
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import MakeEngine, Shapes, by_digest, greedy, only
from tests.tiny import random_adapter


def test_an_engine_counts_requests_tokens_and_where_adapters_were(make_engine: MakeEngine, shapes: Shapes) -> None:
    weights, other = random_adapter(shapes, 1), random_adapter(shapes, 2)
    engine = make_engine(by_digest(weights, other))
    before, prompts = engine.status().counters, []
    for number, plan in enumerate([only(weights), only(weights), only(other), BASE_PLAN]):
        row = engine.prepare(greedy(f"job {number}", plan, num_new=3), lambda event: None)
        prompts.append(row.num_prompt_tokens)
        engine.submit(row)
        engine.run_until_idle()
    counters = engine.status().counters
    assert before == Counters() != counters, "a status does not change"
    assert (counters.num_requests, counters.num_prompt_tokens) == (4, sum(prompts))
    assert (counters.num_bank_hits, counters.num_host_hits, counters.num_fetches) == (1, 0, 2)
    assert counters.num_new_tokens == 12
    assert counters.num_steps == engine.num_steps == 12 and counters.step_s > 0


def test_weights_that_left_the_bank_are_found_in_host_memory(make_engine: MakeEngine, shapes: Shapes) -> None:
    weights = random_adapter(shapes, 1)
    engine = make_engine(by_digest(weights))
    for _ in range(2):
        engine.submit(engine.prepare(greedy("job", only(weights), num_new=1), lambda event: None))
        engine.run_until_idle()
        engine.residency.evict(weights.weights_digest)
    counters = engine.status().counters
    assert (counters.num_bank_hits, counters.num_host_hits, counters.num_fetches) == (0, 1, 1)


def test_the_status_has_the_tokens_in_the_cache(make_engine: MakeEngine) -> None:
    engine = make_engine({})
    row = engine.prepare(greedy("job", num_new=3), lambda event: None)
    engine.submit(row)
    assert engine.status().kv_tokens == 0
    engine.step()
    engine.step()
    assert engine.status().kv_tokens == row.num_prompt_tokens + 1
    engine.run_until_idle()
    assert engine.status().kv_tokens == 0
