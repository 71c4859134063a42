"""Guess the next tokens of a row from its own earlier tokens, so that one step can compute several of them.

The engine computes the guesses behind the row's last token, chooses a token after each, and keeps those up to the first
that differs from its guess. A choice depends on the logits, the seed and the position alone, so the answer is the same
as without guesses, greedy or sampled, under any plan.
Where a row's grammar leaves one token only, several times in a row, these tokens are guessed too. They are always
right, so a token is chosen only after the last of them.

Source: prompt lookup decoding, a draft without a model for speculative decoding (Leviathan et al., ICML 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_worker.front.delta_stream import joined
from gpu_worker.front.request.request import Delta
from gpu_worker.front.row import Row
from gpu_worker.native.attention.kv_cache import KvCache
from gpu_worker.native.next_tokens import Choice

Event = Delta | Exception

MOST_STEP_TOKENS = 8  # tokens of a step with guesses from the text: up to so many cost little more than one
_NGRAM = 3
_LONGEST_PAUSE = 64  # tokens without a guess, after guesses that were all wrong


class PromptLookup:
    """The guesses of one row. `most`: tokens guessed at once; fewer after wrong guesses."""

    def __init__(self, most: int) -> None:
        self._most = self._num_wanted = most
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its last occurrence
        self._num_read = 0  # tokens whose n-grams are in `_places`
        self._pause = self._num_misses = 0

    def guess(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return up to `room` tokens that followed the last n-gram when it occurred before; none during a pause."""
        end = len(tokens)
        for index in range(max(self._num_read, _NGRAM), end):
            self._places[tuple(tokens[index - _NGRAM : index])] = index
        self._num_read = end
        place = self._places.get(tuple(tokens[-_NGRAM:]))
        if self._pause:
            self._pause -= 1
        elif place is not None:
            period = end - place
            return [tokens[place + index % period] for index in range(min(room, self._num_wanted))]
        return []

    def judge(self, num_guessed: int, num_right: int) -> None:
        """Guess more after right guesses, fewer after wrong ones, and pause if all were wrong."""
        if num_right == num_guessed:
            self._num_wanted = min(self._most, 2 * self._num_wanted)
        else:
            self._num_wanted = max(1, num_right)
        self._num_misses = 0 if num_right else self._num_misses + 1
        self._pause = min(_LONGEST_PAUSE, 2**self._num_misses) if self._num_misses else 0


def may_guess(row: Row) -> bool:
    """Return whether the row's choices need no more than logits, seed, position and a grammar's mask."""
    return not row.sampling.adjusts_logits and row.sampling.prompt_logprobs is None and not row.captures_next_logits


def guess_all(rows: Sequence[Row], most: int, max_step_tokens: int, kv_cache: KvCache) -> None:
    """Set the guesses of the next step, as far as there is KV.

    Tokens that a grammar leaves no choice of are computed in any step. Other guesses, up to `most` tokens per row, are
    made neither while prompts are computed nor while many rows decode.
    """
    room, run_room = MOST_STEP_TOKENS - len(rows), max_step_tokens - len(rows)
    is_decoding = [len(row.tokens) - row.num_computed == 1 for row in rows]
    if most == 0 or not all(is_decoding):
        room = 0
    for row, decodes in zip(rows, is_decoding, strict=True):
        row.guess = []
        if row.grammar is not None:
            row.grammar.run = []
        if not decodes or not may_guess(row):
            continue
        left = row.max_new_tokens - row.num_new_tokens - 1
        if row.grammar is not None:
            row.guess = row.grammar.run = _with_kv(row, row.grammar.following(max(min(left, run_room), 0)), kv_cache)
            run_room -= len(row.guess)
        elif min(left, room) > 0:
            row.lookup = row.lookup or PromptLookup(most)
            row.guess = _with_kv(row, row.lookup.guess(row.tokens, min(left, room)), kv_cache)
            room -= len(row.guess)


def _with_kv(row: Row, guess: list[int], kv_cache: KvCache) -> list[int]:
    """Return the guess if the row gets KV for it, else none."""
    return guess if guess and kv_cache.grow(row.kv_row, len(row.tokens) + len(guess)) else []


def take(
    guess: Sequence[int], choices: Sequence[Choice], append: Callable[..., Event | None]
) -> tuple[Event | None, int]:
    """Append a row's tokens up to the first that differs from its guess, or that ends the row.

    Return their events as one, and the number of tokens. `append` takes a choice and returns its event.
    """
    whole: Event | None = None
    num_taken = 0
    for choice in choices:
        event = append(*choice)
        whole = joined(whole, event) if isinstance(whole, Delta) and isinstance(event, Delta) else event or whole
        num_taken += 1
        has_ended = isinstance(event, Exception) or (event is not None and event.finish_reason is not None)
        if has_ended or num_taken > len(guess) or choice[0] != guess[num_taken - 1]:
            break
    return whole, num_taken


def settle(row: Row, num_taken: int, kv_cache: KvCache) -> None:
    """Count the computed tokens of a row with guesses: its last token and the right guesses."""
    row.num_computed += num_taken
    kv_cache.computed(row.kv_row, row.num_computed)
    if row.lookup is not None:
        row.lookup.judge(len(row.guess), num_taken - 1)
