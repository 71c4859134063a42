"""Split texts into the tokens of a large Unigram vocabulary, in a sixth of the memory that `tokenizers` takes.

`tokenizers` keeps a trie of hash maps: 280 MB for the packaged encoder's 250,000 pieces. Here they are in one dict. The
tokens are the same: `tokenizers` normalizes the texts, and the sums of scores are computed in its order and precision.
sentencepiece sums in float32, which decides otherwise where two splits of a long word have nearly the same score.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Tokens = tuple[NDArray[np.int64], NDArray[np.int64]]  # (N, T) ids, and 1 where they are no padding

_SPACE = "\u2581"  # what a space becomes; each word begins with it
_WORD = re.compile(f"{_SPACE}[^{_SPACE}]*")
_UNKNOWN_PENALTY = 10.0  # how far the score of an unknown character is below the lowest score
_CACHED_WORDS, _CACHED_CHARS = 8192, 24  # about 2 MB
_FIRST_CHECK = 1024  # characters of a word, before it is checked whether the rest matters
_LOOKED_BACK = 256  # characters, by one check
RULES, _PIECES, _SCORES = "rules.json", "pieces.json", "scores.npy"
_NO_PIECES: dict[str, Any] = {"model": {"type": "Unigram", "unk_id": None, "vocab": []}}
# What the class does, in the words of the file of `tokenizers`.
_SPLIT = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": True}
_TEMPLATE = ["SpecialToken", "Sequence", "SpecialToken"]
_ADDED = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


class UnigramTokenizer:
    """The tokenizer that `save_unigram` has saved in a folder."""

    def __init__(self, place: Path, max_tokens: int, pad: int) -> None:
        """Load it. `max_tokens`: kept of each text, with those around it. `pad`: the token after shorter texts."""
        rules = json.loads((place / RULES).read_text(encoding="utf-8"))
        pieces = json.loads((place / _PIECES).read_text(encoding="utf-8"))
        without_pieces = _NO_PIECES | {"normalizer": rules["normalizer"]}
        self._normalizer = Tokenizer.from_str(json.dumps(without_pieces)).normalizer
        self._special, self._ends, self._unknown = rules["special"], rules["ends"], rules["unknown"]
        longest_first = sorted(self._special, key=len, reverse=True)
        self._any_special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._ids = {piece: number for number, piece in enumerate(pieces)}
        self._longest = dict[str, int]()  # the length of the longest piece by its first character
        for piece in pieces:
            self._longest[piece[:1]] = max(len(piece), self._longest.get(piece[:1], 1))
        self._longest_of_all = max(self._longest.values())
        self._scores = array("d", np.load(place / _SCORES).tobytes())
        self._unknown_score = min(self._scores) - _UNKNOWN_PENALTY
        self._max_tokens, self._pad = max_tokens, pad
        self._cached_split = lru_cache(_CACHED_WORDS)(self._split)

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Return the tokens of each text, padded to the longest one."""
        first, last = self._ends
        read = [[first, *islice(self._tokens(text), self._max_tokens - 2), last] for text in texts]
        ids = np.full((len(read), max(map(len, read))), self._pad)
        mask = np.zeros_like(ids)
        for row, own in enumerate(read):
            ids[row, : len(own)], mask[row, : len(own)] = own, 1
        return ids, mask

    def _tokens(self, text: str) -> Iterator[int]:
        """Yield the tokens of a text, without those around it."""
        for part in self._any_special.split(text):
            if part in self._special:
                yield self._special[part]
                continue
            spaced = self._normalizer.normalize_str(part).replace(" ", _SPACE)
            if spaced and spaced[0] != _SPACE:
                spaced = _SPACE + spaced
            for word in _WORD.findall(spaced):
                yield from self._cached_split(word) if len(word) <= _CACHED_CHARS else self._split(word)

    def _split(self, word: str) -> list[int]:
        """Return the word's tokens with the largest sum of scores; among equals, those that begin first.

        A long word, as in a language without spaces, is read only until the tokens that are kept are known.
        Source: Kudo, Subword Regularization (2018), section 3.2: the Viterbi algorithm.
        """
        known, scores, unknown, num = self._ids, self._scores, self._unknown, len(word)
        best, starts, ids = [-math.inf] * (num + 1), [0] * (num + 1), [0] * (num + 1)  # of the last token to each end
        best[0], check = 0.0, _FIRST_CHECK
        for start in range(num):
            if start == check:
                found = self._found(starts, ids, _last_common(starts, start, self._longest_of_all))
                if len(found) >= self._max_tokens:
                    return found
                check *= 2
            for end in range(start + 1, min(start + self._longest.get(word[start], 1), num) + 1):
                token = known.get(word[start:end])
                if token is not None:
                    score = best[start] + scores[token]
                elif end == start + 1:
                    token, score = unknown, best[start] + self._unknown_score
                else:
                    continue
                if score > best[end]:
                    best[end], starts[end], ids[end] = score, start, token
        return self._found(starts, ids, num)

    def _found(self, starts: Sequence[int], ids: Sequence[int], end: int) -> list[int]:
        """Return the tokens up to `end`. `starts`, `ids`: of the last token to each end."""
        found = list[int]()
        while end:
            start, token = starts[end], ids[end]
            if token == self._unknown:  # several in a row are one
                while start and ids[start] == token:
                    start = starts[start]
            found.append(token)
            end = start
        return found[::-1]


def _last_common(starts: Sequence[int], end: int, longest: int) -> int:
    """Return the last end that the best splits of a word have in common, whatever comes after `end`; 0 if it is far.

    Each has one of the last `longest` ends, and before it the best tokens to this end.
    """
    ends = set(range(max(end - longest, 0) + 1, end + 1))
    while len(ends) > 1:
        last = max(ends)
        if last < end - _LOOKED_BACK:  # of "....": how many there are decides where the first token ends
            return 0
        ends.remove(last)
        ends.add(starts[last])
    return ends.pop()


def save_unigram(place: Path, tokenizer: Tokenizer) -> bool:
    """Save a tokenizer for `UnigramTokenizer`. Return False, and save nothing, if it is of another kind."""
    read = json.loads(tokenizer.to_str())
    model, ends = read["model"], tokenizer.encode("").ids
    if not _is_supported(read) or len(ends) != len(_TEMPLATE) - 1:
        return False
    vocabulary = model.pop("vocab")
    rules = {
        "normalizer": read["normalizer"],
        "special": {token["content"]: token["id"] for token in read["added_tokens"]},
        "ends": ends,
        "unknown": model["unk_id"],
    }
    (place / RULES).write_text(json.dumps(rules), encoding="utf-8")
    (place / _PIECES).write_text(json.dumps([piece for piece, _ in vocabulary], ensure_ascii=False), encoding="utf-8")
    np.save(place / _SCORES, np.array([score for _, score in vocabulary], np.float64))
    return True


def _is_supported(read: Mapping[str, Any]) -> bool:
    """Return whether the class does what this file of `tokenizers` says."""
    model, template, added = read["model"], read["post_processor"] or {}, read["added_tokens"]
    return (
        model["type"] == "Unigram"
        and model["unk_id"] is not None
        and not model["byte_fallback"]
        and read["normalizer"] is not None
        and read["pre_tokenizer"] == _SPLIT
        and template.get("type") == "TemplateProcessing"
        and [kind for part in template["single"] for kind in part] == _TEMPLATE
        and bool(added)
        and all(token.items() >= _ADDED.items() for token in added)
    )
