from __future__ import annotations

from collections import Counter

import pytest

from retriever_svc import TooFewSamples, choose_tasks
from retriever_svc.training_pairs import Pair, make_batches, training_texts


def numbered(**sizes: int) -> dict[str, list[str]]:
    """Return texts `task:number`."""
    return {task: [f"{task}:{number}" for number in range(size)] for task, size in sizes.items()}


def task_of(pair: Pair) -> str:
    anchor, positive = pair
    assert anchor.partition(":")[0] == positive.partition(":")[0]
    return anchor.partition(":")[0]


def test_every_text_is_an_anchor_once_per_epoch_with_one_pair_of_each_other_task() -> None:
    texts = numbered(a=5, b=5, c=5)
    batches = make_batches(texts, num_epochs=3, max_pairs=64, seed=0)
    assert len(batches) == 15
    assert batches == make_batches(texts, 3, 64, seed=0) != make_batches(texts, 3, 64, seed=1)
    assert all(sorted(map(task_of, batch)) == ["a", "b", "c"] for batch in batches)
    assert all(anchor != positive for batch in batches for anchor, positive in batch)
    for epoch in range(3):
        anchors = Counter(anchor for batch in batches[5 * epoch : 5 * epoch + 5] for anchor, _ in batch)
        assert anchors == Counter(text for own in texts.values() for text in own)


def test_positives_are_drawn_from_all_other_texts_each_time() -> None:
    batches = make_batches(numbered(a=4, b=4), num_epochs=100, max_pairs=64, seed=0)
    positives = Counter(positive for batch in batches for anchor, positive in batch if anchor == "a:0")
    assert positives.keys() == {"a:1", "a:2", "a:3"}
    assert min(positives.values()) > 15


def test_many_tasks_are_spread_evenly_over_batches() -> None:
    texts = numbered(**{f"t{number}": 2 for number in range(10)})
    batches = make_batches(texts, num_epochs=1, max_pairs=4, seed=0)
    assert [len(batch) for batch in batches] == [4, 3, 3] * 2
    assert all(len(set(map(task_of, batch))) == len(batch) for batch in batches)
    lonely = make_batches(numbered(a=2, b=2, c=5), num_epochs=1, max_pairs=64, seed=0)
    assert [len(batch) for batch in lonely] == [3, 3], "a single pair has no negatives"


def test_equal_texts_of_a_task_count_once() -> None:
    assert training_texts({"a": ["x", "y", "x"], "b": ["z", "w"]}) == {"a": ["x", "y"], "b": ["z", "w"]}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "at least 2 tasks, got 0"),
        ({"a": ["x", "y"]}, "at least 2 tasks, got 1"),
        ({"a": ["x", "y"], "c": ["z"], "b": ["z", "z"]}, "too few for: b, c"),
    ],
)
def test_texts_without_pairs_or_negatives_are_refused(texts: dict[str, list[str]], message: str) -> None:
    with pytest.raises(TooFewSamples, match=message):
        training_texts(texts)


def test_the_drawn_share_of_tasks_depends_on_the_seed_only() -> None:
    names = [f"t{number:02}" for number in range(48)]
    drawn = choose_tasks(names, 0.4, seed=3)
    assert len(drawn) == 19
    assert drawn == choose_tasks(names[::-1], 0.4, seed=3) == sorted(drawn)
    assert drawn != choose_tasks(names, 0.4, seed=4)
    assert choose_tasks(names, 1.0, seed=3) == names
    assert choose_tasks(names, 0.0, seed=3) == []
