from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.routing.learning import (
    NUM_LIES,
    Run,
    Shares,
    World,
    halves,
    labels_of,
    lies_about,
    proposed_by,
    runs_of,
    table_of,
)
from benchmarks.routing.wording_pools import REWORDED, WordedPool, read_everyday, read_pools
from lora_store import Sample
from lora_store.feedback import MAX_PER_KEY
from retriever_svc import Encoder, ProjectionFiles


def small(num_adapters: int) -> WordedPool:
    """Return the first tune pool with few adapters, samples and neighbours."""
    pool = read_pools("tune")[0]
    adapters = tuple(replace(adapter, inputs=adapter.inputs[:6]) for adapter in pool.adapters[:num_adapters])
    names = {adapter.name for adapter in adapters}
    own = [prompt for prompt in pool.of_kind("same", *REWORDED) if prompt.own in names]
    return WordedPool(pool.name, adapters, (*own, *pool.of_kind("neighbour")[:2]))


def test_traffic_and_held_prompts_are_apart_and_of_every_adapter() -> None:
    pool = small(3)
    traffic, held = halves(pool, 0)
    assert len(traffic) + len(held) == len(pool.of_kind(*REWORDED))
    assert not {prompt.text for prompt in traffic} & {prompt.text for prompt in held}
    assert {prompt.own for prompt in traffic} == {prompt.own for prompt in held} == {a.name for a in pool.adapters}
    assert halves(pool, 0) != halves(pool, 1)


def test_one_request_in_twenty_is_labelled_and_one_label_in_ten_is_wrong() -> None:
    pool = small(3)
    traffic, _ = halves(pool, 0)
    owners = {prompt.text: prompt.own for prompt in traffic}
    labels = labels_of(pool, traffic, 20_000, 0)
    assert len(labels) == pytest.approx(1000, rel=0.15)
    num_wrong = sum(owners[text] != name for text, name, _ in labels)
    assert num_wrong == pytest.approx(len(labels) * 0.1 * 2 / 3, rel=0.4), "a third of the random names is right"


def test_proposals_keep_the_bounds_of_the_server() -> None:
    labels = [(f"text {number}", "a", "key") for number in range(9)] + [("text", "b", "other")]
    assert proposed_by(labels) == {"a": [f"text {n}" for n in (8, 7, 6)], "b": ["text"]}
    assert MAX_PER_KEY == 3


def test_lies_are_prompts_of_the_victims_for_another_adapter() -> None:
    pool = small(4)
    victims, lies = lies_about(pool, 3, 2)
    owners = {prompt.text: prompt.own for prompt in pool.of_kind("same", *REWORDED)}
    assert (len(lies), {owners[text] for text, _, _ in lies}) == (NUM_LIES, set(victims))
    assert {name for _, name, _ in lies} == {pool.adapters[3].name}
    assert {key for _, _, key in lies} == {"key 0", "key 1"}


def test_a_small_pool_learns_within_its_bounds(projected: Encoder) -> None:
    everyday = [prompt for prompt in read_everyday("tune") if prompt.kind == "everyday"][:4]
    runs = list(runs_of(small(3), everyday, "one", projected, num_requests=120, num_seeds=1))
    assert [run.what for run in runs] == [
        "120 requests",
        *[f"{NUM_LIES} lies of {num_keys} keys about {num}" for num in (1, 5) for num_keys in (1, NUM_LIES)],
    ]
    assert 0 < runs[0].num_accepted <= 3 * 2, "at most two for six samples"
    assert all(run.num_accepted <= 2 for run in runs[1:]), "the liar's adapter has six samples of its own"
    table, figures = table_of(runs)
    assert table.row_count == len(runs)
    assert len(figures) == 5 * len(runs)


def test_a_world_keeps_its_samples_when_others_accept(projected: Encoder) -> None:
    pool = small(2)
    texts = {adapter.name: [Sample(text) for text in adapter.samples("one")] for adapter in pool.adapters}
    world = World(texts, projected, ProjectionFiles())
    first, second = texts
    after, num_accepted, num_refused = world.accepting({first: ["Please do this quite other thing for me"]})
    assert (num_accepted, num_refused) == (1, 0)
    assert (world.texts, after.texts[second]) == (texts, texts[second])
    assert [sample.is_accepted for sample in after.texts[first]] == [False] * 6 + [True]


def test_means_are_over_the_runs_of_one_event() -> None:
    before, after = Shares(0.5, 0.5, 1, 0.5, 1), Shares(0.5, 0.75, 1, 0.25, 1)
    runs = [Run("p", "one", "1 requests", seed, 1, 0, before, after) for seed in range(2)]
    _, figures = table_of(runs)
    assert figures["one 1 requests right points"] == pytest.approx(25)
    assert figures["one 1 requests neighbours_away points"] == pytest.approx(-25)
