from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import results_file
from benchmarks.routing import draws
from benchmarks.routing.draws import Market, Outcome, in_other_words, measure, outcome_of
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


def test_both_parts_are_in_one_result_file(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = read_pools("tune")[0]
    ways = ("honest", "copies in other words")
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(draws, "Encoder", lambda **_: encoder)
    monkeypatch.setattr(draws, "read_pools", lambda _: [pool])
    monkeypatch.setattr(draws, "measure", lambda _, pool: [Outcome(pool.name, way, 2, 1, 0.1, 0.2) for way in ways])
    for part in ("tune", "test"):
        draws.main(part)
    found = json.loads((tmp_path / "draws" / "results.json").read_text())
    assert [run["part"] for run in found["runs"]] == ["test", "tune"]
    assert found["figures"][f"tune_{pool.name}_copies_in_other_words_num_adapters"] == 2
    assert len(found["figures"]) == 16
