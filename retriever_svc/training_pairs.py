"""What the encoder is trained on: pairs of texts of one task, batches of pairs of different tasks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from retriever_svc.errors import TooFewSamples

Pair = tuple[str, str]  # anchor, positive: two texts of one task
MIN_TASKS = 2  # the other tasks of a batch are its negatives
MIN_TEXTS = 2  # a text's positive is another one


def training_texts(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Each task's texts, once each and in their order. Raises: TooFewSamples: a task, or all of it, has no pair."""
    distinct = {task: list(dict.fromkeys(own)) for task, own in texts.items()}
    if short := sorted(task for task, own in distinct.items() if len(own) < MIN_TEXTS):
        raise TooFewSamples(f"{MIN_TEXTS} different texts of each task are wanted; fewer are of {', '.join(short)}")
    if len(distinct) < MIN_TASKS:
        raise TooFewSamples(f"{MIN_TASKS} tasks are wanted, got {len(distinct)}")
    return distinct


def choose_tasks(names: Sequence[str], share: float, seed: int) -> list[str]:
    """`share` (0..1) of `names`, rounded, drawn by `seed` whatever the order of `names`; sorted."""
    return sorted(random.Random(seed).sample(sorted(names), round(share * len(names))))


def batches_of(texts: Mapping[str, Sequence[str]], num_epochs: int, max_pairs: int, seed: int) -> list[list[Pair]]:
    """The batches of a training, in order: every text is an anchor once an epoch, beside one pair of each other task.

    Its positive is drawn anew from its task's other texts. More tasks than `max_pairs` are spread evenly over batches;
    what is left of the largest tasks alone has no negatives, and is left out. `texts` as `training_texts` gives them.
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
