"""Score answers, 0 to 1, and guesses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from benchmarks.training.bigbench_tasks import Item, TaskSpec, is_right

_WORD = re.compile(r"[a-z0-9]+")


def score(spec: TaskSpec, item: Item, generated: str) -> float:
    """Return exact match of the first line, or for `rouge_l` its best ROUGE-L with an accepted answer."""
    if spec.metric != "rouge_l":
        return float(is_right(item, generated))
    return max(rouge_l(generated.strip().partition("\n")[0], answer) for answer in item.answers)


def rouge_l(said: str, wanted: str) -> float:
    """Return F1 of the longest common subsequence of words, in lower case and without punctuation.

    P = LCS / |said|, R = LCS / |wanted|, F1 = 2PR / (P + R). Source: Lin, ROUGE (2004), section 3.
    """
    a, b = _WORD.findall(said.lower()), _WORD.findall(wanted.lower())
    if not a or not b:
        return float(a == b)
    return 2 * _common_len(a, b) / (len(a) + len(b))


def _common_len(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)  # row[j]: of the part of a read so far, with b[:j]
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]


def majority_scores(spec: TaskSpec, train: Sequence[Item], items: Sequence[Item]) -> list[float]:
    """Return the score of the better guess on each item: the most common answer of `train`, or a random option."""
    commonest = Counter(item.answers[0] for item in train).most_common(1)[0][0]
    same = [score(spec, item, commonest) for item in items]
    chance = [len(item.answers) / item.num_options if spec.shows_options else 0.0 for item in items]
    return max(same, chance, key=sum)
