"""Separate what an adapter's samples share from what differs between them.

The samples of a training set often repeat one instruction around changing contents. Users word it in other ways, so the
contents say more about their prompts than the shared words do.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise

FEW_WORDED = 5  # fewer samples say nothing about their wording
# How often `auto` answers a reworded prompt with the right adapter, by what its owner gave: means of the test pools of
# `python -m benchmarks.routing.wording`.
RIGHT_BY_DESCRIPTION, RIGHT_BY_ONE_WORDING, RIGHT_BY_THREE = 0.513, 0.613, 0.692
MOST_COMPARED = 100  # texts among which the most different ones are looked for, spread over all
_CHARS_PER_TEXT = 500
_LEAST_CHARS = 12  # a shorter beginning is shared by chance
_LEAST_REST = 8  # a text of which less would remain is kept whole


def without_shared_wording(texts: Sequence[str]) -> list[str]:
    """Return each text without the longest beginning and the longest ending that it shares with another text.

    Cuts are at white space. A text is kept whole where hardly anything would remain.
    """
    beginnings = _shared_lengths(texts)
    endings = _shared_lengths([text[::-1] for text in texts])
    return [_core(text, first, last) for text, first, last in zip(texts, beginnings, endings, strict=True)]


def num_wordings(texts: Sequence[str]) -> int:
    """Return in how many ways samples are worded. Texts with a long beginning or ending in common count as one way."""
    distinct = list(dict.fromkeys(texts))
    group_of = {text: place for place, text in enumerate(distinct)}
    for step in (1, -1):  # by their beginnings, then by their endings
        ordered = sorted(distinct, key=lambda text: text[::step])
        for text, other in pairwise(ordered):
            if _up_to_space(text[::step], _common(text[::step], other[::step])):
                old, new = group_of[other], group_of[text]
                group_of = {key: new if group == old else group for key, group in group_of.items()}
    return len(set(group_of.values()))


def choose_varied(texts: Sequence[str], count: int) -> list[int]:
    """Return the places of `count` texts, or of all: the first one, then each time the one that shares fewest words.

    Of equal ones the earlier is chosen, and the places are in the order of choice. If more texts are wanted than are
    compared, the others follow in their order.
    """
    size = min(len(texts), MOST_COMPARED)
    bounds = [part * len(texts) // max(1, size) for part in range(size + 1)]
    # By chance in each part: every third text, say, might have the same one of three wordings.
    chance = random.Random(len(texts))
    compared = [part and chance.randrange(*part_bounds) for part, part_bounds in enumerate(pairwise(bounds))]
    words = {place: set(texts[place][:_CHARS_PER_TEXT].casefold().split()) for place in compared}
    shared, chosen = dict.fromkeys(words, 0.0), list[int]()
    while shared and len(chosen) < count:
        place = min(shared, key=lambda place: shared[place])
        del shared[place]
        chosen.append(place)
        for other in shared:
            common = len(words[place] & words[other]) / max(1, len(words[place] | words[other]))
            shared[other] = max(shared[other], common)
    others = (place for place in range(len(texts)) if place not in words)
    return [*chosen, *islice(others, count - len(chosen))]


def has_one_wording(num_samples: int, num_wordings: int) -> bool:
    """Return whether samples, if there are enough to say so, repeat one instruction."""
    return num_samples >= FEW_WORDED and num_wordings == 1


def wording_cost() -> str:
    """Return what samples of one wording cost, and the remedy."""
    return (
        f"requests in other words get the right adapter in about {RIGHT_BY_ONE_WORDING:.0%} of cases with one wording, "
        f"and in {RIGHT_BY_THREE:.0%} with three. Give the samples three wordings or more, as clients write"
    )


def wording_warning(texts: Sequence[str]) -> str | None:
    """Return what the owner of these samples should know about their wording, if anything."""
    if has_one_wording(len(texts), num_wordings(texts)):
        return f"its samples have one wording: {wording_cost()}."
    if len(texts) == 1:
        return (
            f"it is found by one text only: requests get the right adapter in about {RIGHT_BY_DESCRIPTION:.0%} of "
            f"cases by a description, and in {RIGHT_BY_THREE:.0%} by 14 samples in three wordings."
        )
    return None


def _core(text: str, first: int, last: int) -> str:
    core = text[first : len(text) - last].strip() if first + last < len(text) else ""
    return core if len(core) >= _LEAST_REST else text.strip()


def _shared_lengths(texts: Sequence[str]) -> list[int]:
    """Return the length of the longest beginning, up to white space, that each text shares with a different one."""
    ordered = sorted(set(texts))  # so the one that shares most is a neighbour
    lengths = {
        text: _up_to_space(text, max(_common(text, other) for other in _neighbours(ordered, place)))
        for place, text in enumerate(ordered)
    }
    return [lengths[text] for text in texts]


def _neighbours(ordered: Sequence[str], place: int) -> Iterable[str]:
    found = [ordered[near] for near in (place - 1, place + 1) if 0 <= near < len(ordered)]
    return found or [""]


def _common(text: str, other: str) -> int:
    pairs = zip(text, other, strict=False)
    return next((place for place, (one, two) in enumerate(pairs) if one != two), min(len(text), len(other)))


def _up_to_space(text: str, length: int) -> int:
    while 0 < length < len(text) and not text[length - 1].isspace():
        length -= 1
    return length if length >= _LEAST_CHARS else 0
