from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from benchmarks.routing.wording_pools import (
    INPUT,
    Part,
    WordedAdapter,
    read_everyday,
    read_pools,
)

PARTS: tuple[Part, ...] = ("tune", "test")
WORDS: tuple[Part, ...] = ("tune_words", "test_words")
RUN = 4  # words in a row that a prompt may not share with its own samples' wordings
ADAPTER = WordedAdapter(
    "a", "Adds numbers.", ("Add {input}.", "Sum: {input}", "{input} =?"), ("1 2", "3 4", "5 6", "7 8")
)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def runs_of(text: str) -> Iterator[tuple[str, ...]]:
    words = words_of(text)
    return zip(*[words[start:] for start in range(RUN)], strict=False)


def test_the_samples_have_the_wordings_in_turn() -> None:
    assert ADAPTER.samples("one") == ["Add 1 2.", "Add 3 4.", "Add 5 6.", "Add 7 8."]
    assert ADAPTER.samples("three") == ["Add 1 2.", "Sum: 3 4", "5 6 =?", "Add 7 8."]
    assert ADAPTER.samples("three", 2) == ["Add 1 2.", "Sum: 3 4"]
    assert ADAPTER.samples("description") == ["Adds numbers."]
    assert ADAPTER.samples("both", 1) == ["Add 1 2.", "Adds numbers."]


def test_there_are_pools_of_both_parts_and_none_is_in_both() -> None:
    tune, test = ({pool.name for pool in read_pools(part)} for part in PARTS)
    assert (len(tune), len(test)) == (6, 9)
    assert not tune & test


def test_pools_of_words_have_adapters_prompts_and_neighbours_of_bare_words_only() -> None:
    for part in WORDS:
        pools, everyday = read_pools(part), read_everyday(part)
        assert len(pools) == 2 and len(everyday) >= 70
        assert {prompt.own for prompt in everyday} == {None}
        for pool in pools:
            names = {adapter.name for adapter in pool.adapters}
            samples = [text for adapter in pool.adapters for text in adapter.samples("one")]
            assert {prompt.own for prompt in pool.of_kind("bare")} == names
            assert len(pool.of_kind("neighbour")) == 8
            texts = [*samples, *(prompt.text for prompt in (*pool.prompts, *everyday))]
            assert all(len(text.split()) <= 3 for text in texts)
            assert not set(samples) & {prompt.text for prompt in pool.prompts}
    tune, test = ({prompt.text.casefold() for prompt in read_everyday(part)} for part in WORDS)
    assert not tune & test


@pytest.mark.parametrize("part", PARTS)
def test_each_pool_has_adapters_with_samples_and_prompts_of_every_kind(part: str) -> None:
    for pool in read_pools(part):
        names = [adapter.name for adapter in pool.adapters]
        assert len(names) == len(set(names)) >= 5, pool.name
        assert all(adapter.description.strip() and adapter.inputs for adapter in pool.adapters), pool.name
        assert all(INPUT in wording for adapter in pool.adapters for wording in adapter.wordings), pool.name
        assert all(len(set(adapter.wordings)) == len(adapter.wordings) >= 3 for adapter in pool.adapters), pool.name
        owners = {prompt.own for prompt in pool.of_kind("para")}
        assert owners == set(names), pool.name
        assert {prompt.own for prompt in pool.of_kind("same")} == set(names), pool.name
        assert {prompt.own for prompt in pool.of_kind("neighbour")} == {None}, pool.name
        assert not [prompt for prompt in pool.prompts if not prompt.text.strip() or INPUT in prompt.text], pool.name


def test_no_prompt_shares_four_words_in_a_row_with_the_wordings_of_its_own_adapter() -> None:
    shared = []
    for part in PARTS:
        for pool in read_pools(part):
            wordings = {adapter.name: adapter.wordings for adapter in pool.adapters}
            for prompt in pool.of_kind("para"):
                own = {run for wording in wordings[prompt.own or ""] for run in runs_of(wording.replace(INPUT, " "))}
                shared += [(pool.name, prompt.own, " ".join(run)) for run in runs_of(prompt.text) if run in own]
    assert shared == []


def test_no_content_of_a_prompt_is_that_of_a_sample() -> None:
    for part in PARTS:
        for pool in read_pools(part):
            samples = {text for adapter in pool.adapters for text in adapter.samples("three")}
            samples |= {text for adapter in pool.adapters for text in adapter.samples("one")}
            assert not samples & {prompt.text for prompt in pool.prompts}, pool.name


def test_everyday_prompts_are_for_no_adapter_and_of_one_part_only() -> None:
    tune, test = (read_everyday(part) for part in PARTS)
    for prompts in (tune, test):
        assert {prompt.kind for prompt in prompts} == {"everyday", "everyday_chat"}
        assert {prompt.own for prompt in prompts} == {None}
        assert all(bool(prompt.previous) == (prompt.kind == "everyday_chat") for prompt in prompts)
        assert len([prompt for prompt in prompts if prompt.kind == "everyday"]) >= 100
    assert not {prompt.text for prompt in tune if not prompt.previous} & {p.text for p in test if not p.previous}
