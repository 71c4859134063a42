from __future__ import annotations

from benchmarks.routing.draws import Market, in_other_words, measure, outcome_of
from benchmarks.routing.wording_pools import WordedPool, read_pools
from retriever_svc import Encoder


def test_copies_in_other_words_are_caught_and_honest_adapters_are_not(projected: Encoder) -> None:
    pool = read_pools("tune")[0]
    names = [adapter.name for adapter in pool.adapters[:4]]
    prompts = tuple(prompt for prompt in pool.of_kind("para") if prompt.own in names)
    honest, copies = measure(projected, WordedPool(pool.name, pool.adapters[:4], prompts))
    assert (honest.num_adapters, honest.num_confirmed) == (2, 0)
    assert honest.drawn == honest.drawn_if_all
    assert copies.num_adapters == 4 and copies.num_confirmed >= 3
    assert copies.drawn < copies.drawn_if_all / 2


def test_a_confirmed_adapter_is_approved_and_an_unconfirmed_one_is_not(projected: Encoder) -> None:
    adapter = read_pools("tune")[0].adapters[0]
    market = Market(projected, {adapter.name: adapter.samples("one")}, {"copy": adapter.samples("one")})
    prompt = adapter.samples("one")[:1]
    refused, confirmed = (outcome_of("p", "w", market, prompt, confirms=confirms) for confirms in (False, True))
    assert (refused.num_confirmed, refused.drawn, confirmed.drawn) == (1, 0.0, confirmed.drawn_if_all)
    assert set(in_other_words(adapter)).isdisjoint(adapter.samples("one"))
