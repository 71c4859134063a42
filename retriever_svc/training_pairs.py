"""Training data for the encoder: pairs of texts of one task, in batches of pairs of different tasks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from retriever_svc.errors import TooFewSamples

Pair = tuple[str, str]  # anchor, positive: two texts of one task
MIN_TASKS = 2  # the other tasks of a batch are its negatives
MIN_TEXTS = 2  # a text's positive is another one


def training_texts(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the distinct texts of each task, in order. Raises: TooFewSamples if there are too few for pairs."""
    distinct = {task: list(dict.fromkeys(own)) for task, own in texts.items()}
    if short := sorted(task for task, own in distinct.items() if len(own) < MIN_TEXTS):
        raise TooFewSamples(f"each task needs at least {MIN_TEXTS} distinct texts; too few for: {', '.join(short)}")
    if len(distinct) < MIN_TASKS:
        raise TooFewSamples(f"training needs at least {MIN_TASKS} tasks, got {len(distinct)}")
    return distinct


def choose_tasks(names: Sequence[str], share: float, seed: int) -> list[str]:
    """Draw `share` (0..1) of `names`, rounded, and sort them. The draw depends on `seed`, not on the order of names."""
    return sorted(random.Random(seed).sample(sorted(names), round(share * len(names))))


def make_batches(texts: Mapping[str, Sequence[str]], num_epochs: int, max_pairs: int, seed: int) -> list[list[Pair]]:
    """Return the batches of a training, in order. Each text is an anchor once per epoch.

    A batch has one pair per task; more tasks than `max_pairs` are spread evenly over several batches. The positive is
    drawn each time from the task's other texts. Drop batches of fewer than `MIN_TASKS` pairs, which have no negatives.
    `texts`: as returned by `training_texts`.
    """
    rng = random.Random(seed)
    batches = []
    for _ in range(num_epochs):
        anchors = {task: rng.sample(own, len(own)) for task, own in texts.items()}
        for turn in range(max(map(len, anchors.values()))):
            tasks = [task for task, own in anchors.items() if turn < len(own)]
            rng.shuffle(tasks)
            pairs = [_pair(anchors[task], turn, rng) for task in tasks]
            num_batches = -(-len(pairs) // max_pairs)
            batches += [pairs[start::num_batches] for start in range(num_batches)]
    return [pairs for pairs in batches if len(pairs) >= MIN_TASKS]


def _pair(texts: Sequence[str], anchor: int, rng: random.Random) -> Pair:
    positive = rng.randrange(len(texts) - 1)
    return texts[anchor], texts[positive + (positive >= anchor)]
