"""Tokenize and detokenize: the ids of a job's prompt, without delaying any job."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from gpu_worker.errors import PromptInvalid
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Completion, TokenIds
from tests.gpu_worker.conformance.driver import PATIENCE_S, HostedEngine, collect, job
from tests.gpu_worker.conformance.reference import Reference


def test_tokenize_gives_the_ids_that_a_job_has(hosted: HostedEngine, reference: Reference) -> None:
    async def ask() -> None:
        engine = hosted.engine
        found = await engine.tokenizer.tokenize("some text", "auto", tenant="a", with_texts=True)
        assert list(found.ids) == reference.tokens_of("some text") and found.max_len == 256
        assert found.texts[1:] == tuple("some text")
        bare = await engine.tokenizer.tokenize("some text", "auto", tenant="a", add_special_tokens=False)
        assert (bare.ids, bare.texts) == (found.ids[1:], ()), "texts are made only where they are requested"
        long = await engine.tokenizer.tokenize("x" * 500, "auto", tenant="a")
        assert len(long.ids) == 501, "a count may exceed the context"
        chat = await engine.tokenizer.tokenize((Message("user", "hi"),), "alpaca", tenant="a")
        [answer] = await engine.generate([replace(job(""), prompt=(Message("user", "hi"),), template="alpaca")])
        assert isinstance(answer, Completion) and answer.num_prompt_tokens == len(chat.ids)
        with_end, without = [
            await engine.tokenizer.detokenize([TokenIds(found.ids)], tenant="a", skip_special_tokens=skip)
            for skip in (False, True)
        ]
        assert without == ["some text"] and with_end[0].endswith("some text") and len(with_end[0]) > 9
        with pytest.raises(PromptInvalid, match=r"token id 300.*from 0 to 299"):
            await engine.tokenizer.detokenize([TokenIds((300,))], tenant="a", skip_special_tokens=True)

    hosted.run(ask())


class HeldIds(tuple[int, ...]):
    """Token ids that cannot be read until `released` is set."""

    released: threading.Event

    def __iter__(self) -> Iterator[int]:
        assert self.released.wait(PATIENCE_S)
        return super().__iter__()


def test_no_number_of_tokenizing_calls_delays_the_prompt_of_a_job(hosted: HostedEngine) -> None:
    held = HeldIds((104, 105))
    held.released = threading.Event()

    tokenizer = hosted.engine.tokenizer

    async def ask() -> None:
        calls = [
            asyncio.ensure_future(tokenizer.detokenize([TokenIds(held)], tenant="a", skip_special_tokens=True))
            for _ in range(48)
        ]
        await asyncio.sleep(0)
        answer = await collect(hosted.engine, job("hello", tenant="b"), lambda deltas: False)
        assert answer[-1].finish_reason == "length" and not any(call.done() for call in calls)
        held.released.set()
        texts = await asyncio.gather(*calls)
        assert len(texts) == 48 and all(text == texts[0] for text in texts)

    try:
        hosted.run(ask())
    finally:
        held.released.set()


def test_a_prompt_is_prepared_after_at_most_one_more_of_another_tenant(hosted: HostedEngine) -> None:
    prompts = [HeldIds((104, 105)) for _ in range(20)]
    for held in prompts:
        held.released = threading.Event()

    async def ask() -> None:
        flood = [asyncio.create_task(hosted.engine.generate([job(TokenIds(held))])) for held in prompts]
        single = asyncio.create_task(hosted.engine.generate([job("hello", tenant="single")]))
        await asyncio.sleep(0.1)
        for held in prompts[:2]:  # the turn may be the flood's, once
            held.released.set()
        [answer] = await single
        assert isinstance(answer, Completion) and not any(task.done() for task in flood[2:])
        for task in flood:
            task.cancel()

    try:
        hosted.run(ask())
    finally:
        for held in prompts:
            held.released.set()
