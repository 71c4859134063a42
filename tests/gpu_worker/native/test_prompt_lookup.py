"""Guessed tokens: the answers are those without guesses, whatever is guessed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from gpu_worker.front.request.request import Delta, Job, SamplingParams
from gpu_worker.native.loop import Engine
from gpu_worker.native.prompt_lookup import MOST_STEP_TOKENS, PromptLookup, may_guess, take
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import Answer, MakeEngine, always_says, assert_nothing_held, by_digest, greedy
from tests.gpu_worker.rows import row_of
from tests.tiny import plan_of

SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
REPEATED = "the cat and the dog and the cat and the dog"


class Guesses(PromptLookup):
    """Guesses the tokens of `answer`, and every `wrong_every`-th of them wrongly."""

    def __init__(self, prompt_len: int, answer: Sequence[int], wrong_every: int) -> None:
        super().__init__(4)
        self._start, self._answer, self._wrong_every = prompt_len, answer, wrong_every

    def guess(self, tokens: Sequence[int], room: int) -> list[int]:
        first = len(tokens) - self._start
        places = range(first, min(first + room, first + 4, len(self._answer)))
        return [self._answer[place] ^ (place % self._wrong_every == 0) for place in places]


def ask(engine: Engine, job: Job) -> Answer:
    events: list[Delta | Exception] = []
    row = engine.prepare(job, events.append)
    engine.submit(row)
    return Answer(row, events)


def jobs_of(pool: Sequence[AdapterWeights]) -> list[Job]:
    mixture, fusion = (plan_of(strategy, (pool[0], 0.7), (pool[1], 0.3)) for strategy in ("mixture", "fusion"))
    return [
        greedy(REPEATED, BASE_PLAN, "greedy", num_new=24),
        replace(greedy(REPEATED, mixture, "sampled"), sampling=SAMPLED),
        replace(greedy("a b c", fusion, "log probabilities"), sampling=replace(SAMPLED, logprobs=2, min_tokens=3)),
    ]


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_answers_are_those_without_guesses(family: str, make_engine: MakeEngine, pool: list[AdapterWeights]) -> None:
    def answers(most: int) -> tuple[list[Answer], Engine]:
        engine = make_engine(by_digest(*pool), family, prompt_lookup_tokens=most)
        found = [ask(engine, job) for job in jobs_of(pool)]
        engine.run_until_idle()
        assert_nothing_held(engine)
        return found, engine

    expected, plain = answers(0)
    found, guessing = answers(4)
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.text) == (other.tokens, other.text), one.row.request_id
    assert guessing.counters.num_new_tokens == plain.counters.num_new_tokens


def test_the_tokens_of_a_prompt_are_counted_once_whatever_is_guessed(make_engine: MakeEngine) -> None:
    """With the last token of its prompt alone in a step, a row guesses before it has a new token."""
    length = len(REPEATED) + 1  # a token for each letter, behind <bos>
    engine = make_engine({}, prompt_lookup_tokens=4, max_step_tokens=length - 1)
    answer = ask(engine, greedy(REPEATED))
    engine.step()
    engine.step()
    assert len(answer.row.guess) == 4
    engine.run_until_idle()
    assert engine.counters.num_prompt_tokens == answer.row.num_prompt_tokens == length


def test_an_answer_that_repeats_itself_takes_fewer_steps(make_engine: MakeEngine) -> None:
    engine = make_engine({}, prompt_lookup_tokens=4)
    [letter] = engine.base.tokenizer("a", add_special_tokens=False).input_ids
    always_says(engine.base.model, letter)
    answer = ask(engine, greedy("hello", num_new=24))
    engine.run_until_idle()
    assert answer.tokens == [letter] * 24
    assert engine.num_steps == 8  # four single tokens, then five at a time


@pytest.mark.parametrize("wrong_every", [1, 2, 5, 1000])
@pytest.mark.parametrize("number", range(3))
def test_right_and_wrong_guesses_give_the_same_answer(
    number: int, wrong_every: int, make_engine: MakeEngine, pool: list[AdapterWeights]
) -> None:
    job = jobs_of(pool)[number]
    engine = make_engine(by_digest(*pool), prompt_lookup_tokens=4)
    expected = ask(engine, job)
    engine.config = replace(engine.config, prompt_lookup_tokens=0)
    engine.run_until_idle()
    engine.config = replace(engine.config, prompt_lookup_tokens=4)
    began = engine.num_steps
    found = ask(engine, job)
    found.row.lookup = Guesses(found.row.num_prompt_tokens, expected.tokens, wrong_every)
    engine.run_until_idle()
    assert (found.tokens, found.text) == (expected.tokens, expected.text)
    assert _scores(found) == pytest.approx(_scores(expected), abs=1e-4)
    num_steps = engine.num_steps - began
    assert num_steps == len(expected.tokens) if wrong_every == 1 else num_steps < len(expected.tokens)
    assert_nothing_held(engine)


def test_a_stop_string_within_guesses_ends_the_answer(make_engine: MakeEngine) -> None:
    engine = make_engine({}, prompt_lookup_tokens=4)
    whole = ask(engine, greedy("hello", num_new=12))
    engine.run_until_idle()
    stop = whole.text[4:6]
    stopping = replace(greedy("hello", num_new=12).sampling, stop=(stop,))
    plain = ask(engine, replace(greedy("hello"), sampling=stopping))
    plain.row.lookup = Guesses(plain.row.num_prompt_tokens, whole.tokens, 1)
    engine.run_until_idle()
    found = ask(engine, replace(greedy("hello"), sampling=stopping))
    found.row.lookup = Guesses(found.row.num_prompt_tokens, whole.tokens, 1000)
    engine.run_until_idle()
    assert (found.tokens, found.text) == (plain.tokens, plain.text)
    assert len(found.tokens) < len(whole.tokens)


def test_many_rows_and_prompts_in_progress_get_no_guesses(make_engine: MakeEngine) -> None:
    engine = make_engine({}, prompt_lookup_tokens=4, max_batch_size=MOST_STEP_TOKENS)
    answers = [ask(engine, greedy(REPEATED, request_id=number, num_new=12)) for number in range(MOST_STEP_TOKENS)]
    while engine.has_work:
        engine.step()
        assert not any(answer.row.guess for answer in answers) or len(engine.running) < MOST_STEP_TOKENS
    assert all(answer.is_finished for answer in answers)


@pytest.mark.parametrize("seed", range(20))
def test_guesses_are_those_of_a_slow_search(seed: int) -> None:
    draw = random.Random(seed)
    tokens, lookup = [draw.randrange(3) for _ in range(4)], PromptLookup(4)
    for _ in range(60):
        found = lookup.guess(tokens, 3)
        end = len(tokens)
        places = [p for p in range(3, end) if tokens[p - 3 : p] == tokens[end - 3 :]]
        expected: list[int] = []
        while places and len(expected) < 3:
            expected.append([*tokens, *expected][places[-1] + len(expected)])
        assert found == expected
        tokens.append(draw.randrange(3))


def test_wrong_guesses_pause_and_right_ones_grow() -> None:
    lookup, tokens = PromptLookup(4), [1, 2, 3, 4, 5] * 3
    assert lookup.guess(tokens, 7) == [1, 2, 3, 4]
    lookup.judge(4, 1)
    assert lookup.guess(tokens, 7) == [1]
    lookup.judge(1, 1)
    assert lookup.guess(tokens, 7) == [1, 2]
    lookup.judge(2, 0)
    assert [bool(lookup.guess(tokens, 7)) for _ in range(4)] == [False, False, True, True]
    lookup.judge(1, 0)
    assert [bool(lookup.guess(tokens, 7)) for _ in range(5)] == [False] * 4 + [True]


def test_rows_whose_choices_depend_on_more_get_no_guesses() -> None:
    assert may_guess(row_of())
    for changes in ({"frequency_penalty": 0.5}, {"logit_bias": ((3, 1.0),)}, {"prompt_logprobs": 1}):
        assert not may_guess(row_of(sampling=replace(SamplingParams(max_tokens=3), **changes)))
    assert not may_guess(row_of(capture_first_logits=True))


def test_tokens_are_taken_up_to_the_first_wrong_guess_or_the_end() -> None:
    appended: list[int | None] = []

    def append(token: int | None, *_: object) -> Delta | Exception | None:
        appended.append(token)
        return (
            ValueError("bad") if token is None else Delta(str(token), 1, len(appended), "stop" if token == 9 else None)
        )

    def taken(guess: list[int], *tokens: int | None) -> tuple[str, int]:
        appended.clear()
        event, count = take(guess, [(token, None, None) for token in tokens], append)  # type: ignore[misc]
        assert count == len(appended)
        return event.text if isinstance(event, Delta) else repr(event), count

    assert taken([], 4) == ("4", 1)
    assert taken([4, 5], 4, 5, 6) == ("456", 3)
    assert taken([4, 7], 4, 5, 6) == ("45", 2)
    assert taken([7, 5], 4, 5, 6) == ("4", 1)
    assert taken([9, 5], 9, 5, 6) == ("9", 1)
    assert taken([4, 5], 4, None, 6) == ("ValueError('bad')", 2)


def _scores(answer: Answer) -> list[float]:
    return [entry.logprob for event in answer.events if isinstance(event, Delta) for entry in event.logprobs]
