"""Ordinary prompts: what people ask an assistant, to compare with what a pool's adapters are for.

They are in `data/ordinary_prompts.jsonl`, one a line. This project wrote them; they come from no data set. More than
half of them are *bare words*, such as "ok" or "weather", in many languages. A bare word is near every other one, so
adapters whose samples are words are near them, too.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from retriever_svc.encoder import Vectors, unit_rows

NUM_NEAREST = 3
# A bare word is a prompt within both.
_MOST_WORDS, _MOST_CHARS = 2, 12
_FOLLOW_UP_MARGIN = -0.02  # on the tune pools nine of ten follow-ups reach it, and one everyday prompt in thirty


def ordinary_prompts() -> list[str]:
    """Return the packaged prompts."""
    return [text for _, text in _rows()]


def follow_ups() -> NDArray[np.bool_]:
    """Return which of the packaged prompts refer to the turn before them: (J,)."""
    return np.asarray([kind == "follow-up" for kind, _ in _rows()], np.bool_)


@cache
def bare_words(num: int) -> NDArray[np.bool_]:
    """Return which of `num` ordinary prompts are bare words: (num,). None is, unless they are the packaged ones."""
    if num != len(_rows()):
        return np.zeros(num, np.bool_)
    short = [len(text.split()) <= _MOST_WORDS and len(text) <= _MOST_CHARS for _, text in _rows()]
    return np.asarray(short, np.bool_)


def split_bare_words(num: int) -> list[NDArray[np.bool_]]:
    """Return which of `num` ordinary prompts are bare words, and which are not, leaving out an empty group."""
    is_word = bare_words(num)
    return [mask for mask in (~is_word, is_word) if mask.any()]


@cache
def _rows() -> list[tuple[str, str]]:
    """Return the kind and the text of each packaged prompt."""
    read = (json.loads(line) for line in _file().decode().splitlines())
    return [(row["kind"], row["input"]) for row in read]


def prompts_digest() -> str:
    """Return the sha256 of the packaged prompts."""
    return hashlib.sha256(_file()).hexdigest()


def _file() -> bytes:
    return files("retriever_svc").joinpath("data/ordinary_prompts.jsonl").read_bytes()


def centred(vectors: Vectors, centre: Vectors | None) -> Vectors:
    """Return the directions of vectors (N, D) from a centre (D,), or the vectors themselves for None.

    All texts have a part of their vectors in common, which is larger in one encoder than in another. From the mean of
    the ordinary prompts, the cosines of different encoders are alike.
    """
    return vectors if centre is None else unit_rows(vectors - centre)


def refers_back(query: Vectors, ordinary: Vectors) -> bool:
    """Return whether a text (D,) is like the packaged prompts (J, D) that refer to an earlier turn, in any language.

    It is compared with the other prompts, but not with bare words: many short turns that refer back are near these.
    """
    is_follow_up = follow_ups()
    if len(ordinary) != len(is_follow_up):
        return False
    cosines, is_other = ordinary @ query, ~is_follow_up & ~bare_words(len(ordinary))
    own, others = (np.sort(cosines[mask])[-NUM_NEAREST:].mean() for mask in (is_follow_up, is_other))
    return bool(own - others > _FOLLOW_UP_MARGIN)


def nearness(queries: Vectors, ordinary: Vectors) -> NDArray[np.float64]:
    """Return the nearness of each query (N, D) to ordinary prompts (J, D): (N,). It is -1 for too few prompts.

    The nearness is the cosine to the mean of the 3 nearest bare words, or of the 3 nearest others, if that is larger.
    An adapter is a mean of texts too, so both cosines can be compared. A row does not depend on the other rows.
    """
    nearer: NDArray[np.float64] = np.maximum(*nearness_by_group(queries, ordinary))
    return nearer


def nearness_by_group(queries: Vectors, ordinary: Vectors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the nearness of each query (N, D) to ordinary prompts (J, D) that are no bare words, and to bare words."""
    is_word = bare_words(len(ordinary))
    groups = [np.flatnonzero(mask) for mask in (~is_word, is_word)]
    found = np.full((2, len(queries)), -1.0)
    for row, query in enumerate(queries):
        cosines = np.einsum("jd,d->j", ordinary, query)  # BLAS would round by alignment
        for number, places in enumerate(groups):
            if len(places) > NUM_NEAREST:
                nearest = np.argpartition(cosines[places], -NUM_NEAREST)[-NUM_NEAREST:]
                found[number, row] = _cosine_to_mean(query, ordinary[places[np.sort(nearest)]])
    return found[0], found[1]


def nearness_to_others(ordinary: Vectors) -> NDArray[np.float64]:
    """Return the nearness of each ordinary prompt (J, D) to the others, as `nearness` measures it: (J,)."""
    found = np.full(len(ordinary), -1.0)
    cosines = ordinary @ ordinary.T
    np.fill_diagonal(cosines, -1)
    for group in split_bare_words(len(ordinary)):
        places = np.flatnonzero(group)
        if len(places) > NUM_NEAREST:
            nearest = places[np.argpartition(cosines[:, places], -NUM_NEAREST, axis=1)[:, -NUM_NEAREST:]]
            means = unit_rows(ordinary[nearest].mean(axis=1, dtype=np.float64))
            found = np.maximum(found, np.sum(means * ordinary, axis=1))
    return found


def _cosine_to_mean(query: Vectors, rows: Vectors) -> float:
    mean = rows.sum(axis=0, dtype=np.float64)
    return float(mean @ query / np.linalg.norm(mean))
