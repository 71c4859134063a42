"""A prompt is tokenized once for all its rows, and separately for each tenant."""

from __future__ import annotations

import copy
import gc
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from gpu_worker.errors import GpuWorkerError, PromptInvalid, PromptTooLong, SamplingInvalid
from gpu_worker.front.preprocess import RequestPreprocessor
from gpu_worker.front.request.prompt_memo import PromptMemo
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Job
from gpu_worker.front.request.tools import Function, ToolCall, Tools
from gpu_worker.model.base_model import BaseModel

JOB = Job("r", "hello")


class Tokenize:
    """Counts its calls; returns the length of the prompt."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.jobs: list[Job] = []
        self.failure = failure

    def __call__(self, job: Job) -> Sequence[int]:
        self.jobs.append(job)
        if self.failure is not None:
            raise self.failure
        return [len(job.prompt)]


def test_the_same_prompt_is_tokenized_once() -> None:
    memo, tokenize = PromptMemo(), Tokenize()
    assert [memo.tokens(replace(JOB, request_id=f"r-{n}"), tokenize) for n in range(16)] == [[5]] * 16
    assert len(tokenize.jobs) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "another"},
        {"template": "chat"},
        {"prompt": "hello!"},
        {"prompt": "he\ud800llo"},
        {"prompt": (Message("system", "hello"),)},
        {"prompt": (Message("user", "hel"), Message("user", "lo"))},
        {"prompt": (Message("tool", "hello", (), "c1", "f"),)},
        {"prompt": (Message("assistant", "hello", (ToolCall("c1", "f", "{}"),)),)},
        {"prompt": (Message("user", "hello"),), "tools": Tools((Function("f"),))},
    ],
    ids=str,
)
def test_nothing_else_is_the_same_prompt(other: dict[str, Any]) -> None:
    memo, tokenize = PromptMemo(), Tokenize()
    memo.tokens(JOB, tokenize)
    for _ in range(2):
        memo.tokens(replace(JOB, prompt=(Message("user", "hello"),)), tokenize)
    assert len(tokenize.jobs) == 2
    memo.tokens(replace(JOB, **other), tokenize)
    assert len(tokenize.jobs) == 3


def test_rows_that_come_together_wait_for_the_first() -> None:
    memo, entered, goes_on, calls = PromptMemo(), threading.Event(), threading.Event(), []

    def tokenize(job: Job) -> Sequence[int]:
        calls.append(job)
        entered.set()
        assert goes_on.wait(120)
        return [7]

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(memo.tokens, JOB, tokenize) for _ in range(8)]
        assert entered.wait(120)
        goes_on.set()
        assert [future.result() for future in asked] == [[7]] * 8
    assert len(calls) == 1


def test_a_refusal_is_cached_and_another_error_is_not() -> None:
    for failure, num_calls in ((PromptTooLong("too long"), 1), (MemoryError(), 3)):
        memo, tokenize = PromptMemo(), Tokenize(failure)
        for _ in range(3):
            with pytest.raises(type(failure)):
                memo.tokens(JOB, tokenize)
        assert len(tokenize.jobs) == num_calls


class Marker:
    """An object in a frame, which lives as long as a traceback refers to the frame."""


def refusals(
    memo: PromptMemo, failure: GpuWorkerError, num_calls: int
) -> tuple[list[str], list[weakref.ref[BaseException]], list[weakref.ref[Marker]]]:
    """Request the same prompt repeatedly.

    Return the formatted traceback of each refusal, references to the refusals, and to objects in the first frames.
    """
    texts, raised, markers = list[str](), list[weakref.ref[BaseException]](), list[weakref.ref[Marker]]()

    def tokenize(job: Job) -> Sequence[int]:
        marker = Marker()
        markers.append(weakref.ref(marker))
        try:
            raise UnicodeError(job.prompt)
        except UnicodeError as exc:
            raise copy.copy(failure) from exc

    for _ in range(num_calls):
        with pytest.raises(type(failure)) as caught:
            memo.tokens(JOB, tokenize)
        assert caught.value.args == failure.args and vars(caught.value) == vars(failure)
        assert str(caught.value) == str(failure)
        texts.append("".join(traceback.format_exception(caught.value)))
        raised.append(weakref.ref(caught.value))
    return texts, raised, markers


@pytest.mark.parametrize(
    "failure",
    [PromptTooLong("too long"), PromptInvalid("not a prompt"), SamplingInvalid("too large", "top_p")],
    ids=lambda failure: type(failure).__name__,
)
def test_a_cached_refusal_does_not_grow_and_keeps_no_frames(failure: GpuWorkerError) -> None:
    memo = PromptMemo()
    texts, raised, markers = refusals(memo, failure, 50)
    assert {len(text) for text in texts[2:]} == {len(texts[1])} and len(texts[1]) <= len(texts[0])
    gc.collect()
    assert [marker() for marker in markers] == [None], "tokenized once, and its frame is gone"
    assert {error() for error in raised} == {None}, "no raised exception is kept"


def test_rows_that_waited_for_an_unexpected_error_tokenize_themselves() -> None:
    memo, entered, goes_on, calls = PromptMemo(), threading.Event(), threading.Event(), list[Job]()

    def tokenize(job: Job) -> Sequence[int]:
        calls.append(job)
        if len(calls) > 1:
            return [7]
        entered.set()
        assert goes_on.wait(120)
        raise MemoryError

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(memo.tokens, JOB, tokenize)
        assert entered.wait(120)
        second = threads.submit(memo.tokens, JOB, tokenize)
        goes_on.set()
        assert second.result() == [7]
        assert isinstance(first.exception(), MemoryError)


def test_the_least_recent_prompt_is_forgotten() -> None:
    memo, tokenize = PromptMemo(max_prompts=2), Tokenize()
    for prompt in ("a", "b", "a", "c", "a", "b"):
        memo.tokens(replace(JOB, prompt=prompt), tokenize)
    assert [job.prompt for job in tokenize.jobs] == ["a", "b", "c", "b"]


def test_the_rows_of_a_request_have_separate_equal_prompts(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base()
    counted: list[str] = []

    class Counting:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            counted.extend(texts)
            return base.backend_tokenizer.encode_batch_fast(texts, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(base.backend_tokenizer, name)

    class Tokenizer:
        backend_tokenizer = Counting()

        def __getattr__(self, name: str) -> Any:
            return getattr(base.tokenizer, name)

    prepare = RequestPreprocessor(replace(base, tokenizer=Tokenizer()), 64)
    rows = [prepare(replace(JOB, request_id=f"r-{n}"), lambda event: None) for n in range(4)]
    assert counted == ["hello"]
    assert all(row.tokens == rows[0].tokens for row in rows)
    rows[0].tokens.append(1)
    assert rows[1].tokens == rows[2].tokens != rows[0].tokens
    for _ in range(3):
        with pytest.raises(PromptTooLong, match="maximum context length is 64"):
            prepare(replace(JOB, prompt="too long " * 30), lambda event: None)
    assert len(counted) == 2
