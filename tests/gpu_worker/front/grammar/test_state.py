"""The masks of a grammar against a byte-by-byte walk, and a state that follows the tokens of its row."""

from __future__ import annotations

import json
import random
import threading
import time
from functools import partial
from typing import cast

import numpy as np
import pytest
from llguidance import LLMatcher

from gpu_worker.front.grammar import library
from gpu_worker.front.grammar.state import LONGEST_RUN, GrammarState, num_words, only_id
from gpu_worker.front.request.grammar import Grammar
from tests.gpu_worker.engine_driver import PATIENCE_S
from tests.gpu_worker.front.grammar.schemas import random_schema
from tests.gpu_worker.front.grammar.small_vocabulary import (
    EMPTY,
    END,
    MANY_STATES,
    OTHER_END,
    SPECIAL,
    TOKENS,
    compiled,
    ids_of,
    state_of,
)
from tests.soak import Scale

GRAMMARS = [
    Grammar("regex", "(red|gr\u00fcn)+[0-9]{1,3}"),
    Grammar("choice", json.dumps(["red", "re", 'quo"te', "gr\u00fcn"])),
    Grammar("grammar", 'start: item ("," item)*\nitem: /[a-z]+/ | "{" start "}"'),
    Grammar("grammar", 'root ::= "re" [0-9]+ | "ed"'),
    *(Grammar("json_schema", json.dumps(random_schema(seed))) for seed in range(6)),
]


def allowed_slowly(grammar: Grammar, answer: bytes) -> list[int]:
    """Each token whose bytes, one at a time, continue the answer; the end tokens where it may end."""
    found = []
    answered = compiled(grammar, TOKENS[: SPECIAL + 1])
    assert answered.consume_tokens(list(answer))
    for token_id, piece in enumerate(TOKENS):
        walked = answered.deep_copy()
        if token_id in (END, OTHER_END):
            is_allowed = walked.is_accepting()
        elif token_id in (SPECIAL, EMPTY):
            is_allowed = False
        else:
            is_allowed = walked.try_consume_tokens(list(piece)) == len(piece)
        found += [token_id] if is_allowed else []
    return found


def forced(grammar: Grammar, answer: bytes) -> bool:
    """Whether all texts that may follow begin with the same byte."""
    walked = compiled(grammar, TOKENS[: SPECIAL + 1])
    assert walked.consume_tokens(list(answer))
    return bool(walked.compute_ff_bytes())


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: f"{grammar.kind}-{grammar.text[:20]}")
def test_a_token_is_allowed_iff_its_bytes_continue_the_answer(grammar: Grammar, scale: Scale) -> None:
    """Where only one text can follow, one of its tokens is enough."""
    chance = random.Random(3)
    tokens: list[int] = []
    num_free = 0
    state = state_of(grammar, tokens)
    num_steps = scale.pick("steps", small=12, full=40)
    for _ in range(num_steps):
        state.update()
        assert state.error is None
        allowed, answer = ids_of(state), b"".join(TOKENS[token_id] for token_id in tokens)
        expected, is_forced = allowed_slowly(grammar, answer), forced(grammar, answer)
        num_free += not is_forced
        assert allowed == expected or (is_forced and allowed and set(allowed) < set(expected))
        longest = max(len(TOKENS[token_id]) for token_id in allowed)
        tokens.append(chance.choice([i for i in allowed if len(TOKENS[i]) in (1, longest)]))
        if tokens[-1] in (END, OTHER_END):
            break
    assert num_free > 0


def test_a_state_follows_the_tokens_behind_the_prompt() -> None:
    tokens = [5, 6, 7]
    state = state_of(Grammar("regex", "ab"), tokens, num_prompt=3)
    assert not state.is_current
    state.update()
    assert state.is_current and ids_of(state) == [ord("a")]
    tokens.append(ord("a"))
    assert not state.is_current
    state.update()
    assert ids_of(state) == [ord("b")]
    tokens.append(ord("b"))
    state.update()
    assert ids_of(state) == [END, OTHER_END]


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "abc|ax"),
        Grammar("grammar", 'start: "abc" t | "ax" t\nt[stop="q"]: /[a-z]*/'),
        Grammar("grammar", 'start: "abc" t | "ax" t\nt[max_tokens=2]: /[a-z]*/'),
    ],
    ids=["plain", "stop", "max_tokens"],
)
def test_a_state_whose_row_has_lost_tokens_follows_the_others_again(grammar: Grammar) -> None:
    tokens = [ord("a"), ord("b")]
    state = state_of(grammar, tokens)
    state.update()
    assert ids_of(state) == [ord("c")]
    for _ in range(2):
        del tokens[1:]
        state.update()
        assert ids_of(state) == [ord("b"), ord("x")]
        tokens.append(ord("b"))
        state.update()
        assert ids_of(state) == [ord("c")] and state.error is None


def test_ids_that_must_follow_are_known_up_to_the_next_choice() -> None:
    """Each is the only one of its mask, and looking for them changes no mask."""
    grammar = Grammar("regex", "x[ab]klmn(4|5)pq")
    tokens: list[int] = []
    state, slow = state_of(grammar, tokens), state_of(grammar, tokens)
    slow.longest_run = 0
    state.update()
    assert state.following(8) == []  # the run begins with the next token, which is not chosen yet
    for text, run in (("x", ""), ("a", ""), ("k", "lmn"), ("l", "mn"), ("m", "n"), ("n", ""), ("4", ""), ("p", "q")):
        tokens.append(ord(text))
        assert bytes(state.following(8)) == run.encode() and state.following(1) == [*run.encode()][:1]
        assert state.following(0) == [] and slow.following(8) == []
        state.update()
        slow.update()
        assert ids_of(state) == ids_of(slow)
    tokens.append(ord("q"))
    state.update()
    assert ids_of(state) == [END, OTHER_END] and state.following(8) == []


def test_a_run_is_consumed_before_the_next_mask_and_may_be_given_up() -> None:
    tokens = [ord("a")]
    state = state_of(Grammar("regex", "a?klmn[xy]"), tokens)
    state.update()
    tokens.append(ord("k"))
    state.run = state.following(8)
    assert state.run == [ord("l"), ord("m"), ord("n")] and not state.is_current
    state.update()
    assert state.is_current and ids_of(state) == [ord("x"), ord("y")]
    masks = [[i for i in range(len(TOKENS)) if state.mask(ahead)[i // 32] >> i % 32 & 1] for ahead in range(4)]
    assert masks == [[ord("l")], [ord("m")], [ord("n")], [ord("x"), ord("y")]]
    state.run = []  # there was no memory for it
    tokens.append(ord("l"))
    assert state.following(8) == [], "the tokens known are those behind the run"
    state.update()
    assert ids_of(state) == [ord("m")]


def test_a_run_is_not_longer_than_the_limit() -> None:
    tokens: list[int] = []
    state = state_of(Grammar("regex", "0{40}"), tokens)
    state.update()
    tokens.append(ord("0"))
    assert state.following(100) == [ord("0")] * (LONGEST_RUN - 1)


@pytest.mark.parametrize("ids", [[], [0], [31], [32], [95], [0, 1], [0, 64], [95, 94]])
def test_the_only_id_of_a_mask(ids: list[int]) -> None:
    mask = np.zeros(3, np.uint32)
    for token_id in ids:
        mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    assert only_id(mask) == (ids[0] if len(ids) == 1 else None)


def test_a_token_that_the_grammar_does_not_allow_is_an_error() -> None:
    state = state_of(Grammar("regex", "ab"), [ord("z")])
    state.update()
    assert state.error is not None and state.is_current


@pytest.mark.parametrize(
    ("answer", "is_whole"),
    [
        ([*b"ab", END], True),
        ([*b"ab", OTHER_END], True),
        ([*b"a", END], False),
        ([END], False),
        ([*b"a"], True),  # a client's stop token
        ([SPECIAL, *b"b", END], True),  # vLLM takes some markers for text
    ],
)
def test_an_answer_that_ends_before_its_grammar_fails(answer: list[int], is_whole: bool) -> None:
    when_slow = list[bool]()
    tokens, grammar, renewed = [7, *answer], Grammar("regex", "ab"), list[LLMatcher]()

    def renew() -> LLMatcher:
        renewed.append(compiled(grammar))
        return renewed[-1]

    slow = partial(when_slow.append, True)
    state = GrammarState(compiled(grammar), tokens, 1, len(TOKENS), when_slow=slow, renew=renew)
    state.check_end()
    assert (state.error is None, not when_slow) == (is_whole, is_whole) and not renewed


@pytest.mark.parametrize(("answer", "is_whole"), [(b"axby" * 3, True), (b"axby", False), (b"axb", False)])
def test_the_end_of_an_answer_is_checked_after_others_have_used_up_the_states_of_their_lexer(
    answer: bytes, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_MAX_LEXER_STATES", 100)
    shared = compiled(MANY_STATES)
    monkeypatch.undo()
    other = GrammarState(shared, tokens := list[int](), 0, len(TOKENS))
    while other.error is None:
        other.update()
        tokens.append(ord("a"))
    state = GrammarState(shared, [*answer, END], 0, len(TOKENS), renew=lambda: compiled(MANY_STATES))
    state.check_end()
    assert (state.error is None) == is_whole


def test_a_mask_has_a_bit_for_every_id() -> None:
    assert [num_words(vocabulary) for vocabulary in (1, 32, 33, 262_144)] == [1, 1, 2, 8192]


class StuckMatcher:
    """A matcher whose next call waits for `may_end`, and computes meanwhile if it `is_busy`."""

    def __init__(self, is_busy: bool) -> None:
        self._is_busy, self.has_begun, self.may_end = is_busy, threading.Event(), threading.Event()

    def deep_copy(self) -> StuckMatcher:
        return self

    def consume_tokens(self, tokens: list[int]) -> bool:
        self.has_begun.set()
        while not self.may_end.wait(0 if self._is_busy else PATIENCE_S):
            pass
        return False

    def is_error(self) -> bool:
        return False


@pytest.mark.parametrize("is_busy", [True, False], ids=["computes", "waits for the machine"])
def test_a_grammar_that_is_given_up_is_slow_only_if_it_took_the_processor(
    is_busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_worker.front.grammar.state._FREE_S", 0.1)
    matcher, slow = StuckMatcher(is_busy), threading.Event()
    state = GrammarState(cast(LLMatcher, matcher), [], 0, len(TOKENS), when_slow=slow.set)
    updating = threading.Thread(target=state.update)
    updating.start()
    assert matcher.has_begun.wait(PATIENCE_S)
    end = time.monotonic() + (PATIENCE_S if is_busy else 0.3)
    while not slow.is_set() and time.monotonic() < end:
        time.sleep(0.05)
        state.give_up("it took too long")
    matcher.may_end.set()
    updating.join()
    assert slow.is_set() == is_busy and state.error is not None


def test_an_answer_whose_masks_take_long_together_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them delays the step of all rows."""
    now, when_slow = [0.0], list[float]()

    def thread_time() -> float:
        now[0] += 0.035
        return now[0]

    monkeypatch.setattr("gpu_worker.front.grammar.state.time.thread_time", thread_time)
    tokens = list[int]()
    state = GrammarState(
        compiled(Grammar("regex", "[ab]*")), tokens, 0, len(TOKENS), when_slow=lambda: when_slow.append(now[0])
    )
    while state.error is None and len(tokens) < 100:
        state.update()
        tokens.append(ord("a"))
    assert state.error == "it takes too long to find the tokens that may follow"
    assert len(tokens) == 10 and len(when_slow) == 1, "a quarter of a second, and a hundredth for each token"
    state.update()
    assert len(when_slow) == 1
