from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_svc.shared_wording import (
    FEW_WORDED,
    RIGHT_BY_DESCRIPTION,
    RIGHT_BY_ONE_WORDING,
    RIGHT_BY_THREE,
    choose_varied,
    num_wordings,
    without_shared_wording,
    wording_warning,
)

REVIEWS = ["the plot was dull", "a joyful little film", "I walked out early"]
BEFORE = "Classify the sentiment of this review: "
AFTER = "\nAnswer with one word, positive or negative."


def test_the_beginning_and_the_ending_that_samples_share_are_left_out() -> None:
    assert without_shared_wording([BEFORE + review for review in REVIEWS]) == REVIEWS
    assert without_shared_wording([review + AFTER for review in REVIEWS]) == REVIEWS
    assert without_shared_wording([BEFORE + review + AFTER for review in REVIEWS]) == REVIEWS


def test_each_text_loses_what_it_shares_with_any_other() -> None:
    other = "Is this film worth seeing? "
    texts = [BEFORE + REVIEWS[0], other + REVIEWS[1], BEFORE + "two lost hours", other + REVIEWS[2], "What is 45 - 18?"]
    assert without_shared_wording(texts) == [REVIEWS[0], REVIEWS[1], "two lost hours", REVIEWS[2], "What is 45 - 18?"]


def test_a_text_of_which_hardly_anything_would_remain_is_kept_whole() -> None:
    texts = ["Translate this word to German: cat", "Translate this word to German: grandfather"]
    assert without_shared_wording(texts) == [texts[0], "grandfather"]
    assert without_shared_wording(["the same text, twice"] * 2) == ["the same text, twice"] * 2


def test_short_common_beginnings_are_chance() -> None:
    texts = ["How many apples are left?", "How many tickets do I need?"]
    assert without_shared_wording(texts) == texts
    assert num_wordings(texts) == 2


def test_words_are_not_cut() -> None:
    texts = ["Summarise the following article about winter", "Summarise the following artistic statement"]
    assert without_shared_wording(texts) == ["article about winter", "artistic statement"]


def test_the_texts_are_chosen_that_share_fewest_words_with_those_before() -> None:
    texts = [*(BEFORE + review for review in REVIEWS), "Is it worth seeing?", "WORTH SEEING? Say it.", "ja oder nein"]
    assert choose_varied(texts, 4) == [0, 3, 5, 4]  # 3 and 5 share no word with 0, and 3 is earlier; 4 shares with 3
    assert choose_varied(texts, 1) == [0]
    assert sorted(choose_varied(texts, 100)) == list(range(6))
    assert choose_varied([], 3) == [] and choose_varied(["a"], 0) == []
    many = ["the same words"] * 950 + ["quite another text"] * 50
    assert [many[place] for place in choose_varied(many, 2)] == ["the same words", "quite another text"]
    in_turn = [
        f"{wording} number {place}" for place in range(100) for wording in ("say", "please repeat", "what about")
    ]
    assert len({in_turn[place].split()[0] for place in choose_varied(in_turn, 3)}) == 3
    assert sorted(choose_varied(in_turn, 150)) == sorted(set(choose_varied(in_turn, 150))), "as many as asked for"
    assert len(choose_varied(in_turn, 150)) == 150 and sorted(choose_varied(in_turn, 999)) == list(range(300))


def test_one_text_or_none_shares_nothing() -> None:
    assert without_shared_wording([]) == []
    assert without_shared_wording([" a single sample \n"]) == ["a single sample"]
    assert num_wordings([]) == 0
    assert num_wordings(["a single sample"] * 3) == 1


def test_ways_of_wording_are_counted() -> None:
    one = [BEFORE + review for review in REVIEWS]
    assert num_wordings(one) == 1
    assert num_wordings([*one, *(review + AFTER for review in REVIEWS)]) == 2
    assert num_wordings(REVIEWS) == 3
    assert num_wordings([*one, "What is 45 minus 18?", "Say it in German."]) == 3
    assert num_wordings([*one, *REVIEWS]) == 1  # each bare review is the ending of another sample


def test_a_text_that_shares_its_beginning_with_one_and_its_ending_with_another_joins_them() -> None:
    texts = [BEFORE + REVIEWS[0], REVIEWS[1] + AFTER, BEFORE + REVIEWS[2] + AFTER]
    assert num_wordings(texts[:2]) == 2
    assert num_wordings(texts) == 1


@given(st.lists(st.text(alphabet="ab \n漢", max_size=40), max_size=8))
def test_a_core_is_a_part_of_its_text_whatever_the_order_of_texts(texts: list[str]) -> None:
    cores = without_shared_wording(texts)
    assert all(core in text for core, text in zip(cores, texts, strict=True))
    assert all(core or not text.strip() for core, text in zip(cores, texts, strict=True))
    assert without_shared_wording(texts[::-1]) == cores[::-1]
    assert num_wordings(texts) == num_wordings(texts[::-1]) <= len(set(texts))


def test_samples_of_one_wording_are_warned_of_with_what_it_costs() -> None:
    one = [f"Translate to German, please: {text}" for text in ("a cat", "two dogs", "the sea", "my hat", "his pen")]
    assert wording_warning(one[: FEW_WORDED - 1]) is None
    warning = wording_warning(one)
    assert warning is not None
    assert "61% of cases with one wording, and in 69% with three" in warning
    assert wording_warning([*one, "How do you say bread in German?"]) is None


def test_a_description_alone_is_warned_of() -> None:
    warning = wording_warning(["Translates English into German."])
    assert warning is not None
    assert "51% of cases by a description" in warning
    assert wording_warning([]) is None


def test_the_shares_are_those_of_the_benchmark() -> None:
    """The page has means of the test pools in percent: right is the second column."""
    page = (Path(__file__).parents[2] / "docs" / "benchmarks" / "index.md").read_text(encoding="utf-8")
    shares = {
        "one wording": RIGHT_BY_ONE_WORDING,
        "three wordings": RIGHT_BY_THREE,
        "description only": RIGHT_BY_DESCRIPTION,
    }
    for words, share in shares.items():
        [right] = re.findall(
            rf"^\| {words} \| before .*\n\| \| untrained .*\n\| \| now \| [\d.]+ \| ([\d.]+) \|", page, re.MULTILINE
        )
        assert float(right) / 100 == pytest.approx(share, abs=0.005)
