"""The thread that tokenizes for clients: one call at a time, with tenants in turn."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from gpu_worker.errors import EngineFull
from gpu_worker.front.request.request import Prompt, TokenIds, Tokenized
from gpu_worker.front.tokenizing import Tokenizing

PATIENCE_S = 60.0  # only a failing test waits this long


class HeldPreprocessor:
    """Records its calls, with their threads. The first one waits until `released` is set."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.threads: set[int] = set()
        self.began, self.released = threading.Event(), threading.Event()

    def tokenize(self, prompt: Prompt, template: str, **options: object) -> Tokenized:
        self._note((prompt, template, options))
        return Tokenized((1,), (), 8)

    def detokenize(self, prompts: Sequence[TokenIds], *, skip_special_tokens: bool) -> list[str]:
        self._note(prompts)
        return ["text" for _ in prompts]

    def _note(self, call: object) -> None:
        self.began.set()
        assert self.released.wait(PATIENCE_S)
        self.calls.append(call)
        self.threads.add(threading.get_ident())


def over(prepare: HeldPreprocessor, max_waiting: int) -> Tokenizing:
    return Tokenizing(prepare, max_waiting=max_waiting)  # type: ignore[arg-type]


def asked(tokenizing: Tokenizing, tenant: str, prompt: str) -> asyncio.Task[Tokenized]:
    async def ask() -> Tokenized:
        return await tokenizing.tokenize(prompt, "auto", tenant=tenant, add_special_tokens=None, with_texts=False)

    return asyncio.create_task(ask())


def read(tokenizing: Tokenizing, tenant: str, number: int) -> asyncio.Task[list[str]]:
    async def ask() -> list[str]:
        return await tokenizing.detokenize([TokenIds((number,))], tenant=tenant, skip_special_tokens=True)

    return asyncio.create_task(ask())


async def test_both_calls_take_the_same_turns_on_one_thread_apart_from_the_loops() -> None:
    prepare = HeldPreprocessor()
    tokenizing = over(prepare, max_waiting=19)
    first = asked(tokenizing, "flood", "first")
    await asyncio.to_thread(prepare.began.wait, PATIENCE_S)
    flood = [asked(tokenizing, "flood", str(number)) for number in range(16)]
    others = [read(tokenizing, "a", 7), asked(tokenizing, "b", "other")]
    await asyncio.sleep(0)
    with pytest.raises(EngineFull, match=r"tokenizer is full \(19 requests\); retry later"):
        await asked(tokenizing, "flood", "too many")
    prepare.released.set()
    await asyncio.gather(first, *flood, *others)
    order = [call[0] for call in prepare.calls]
    assert order[:5] == ["first", "0", TokenIds((7,)), "other", "1"] and len(order) == 19
    assert len(prepare.threads) == 1
    tokenizing.close()


async def test_the_thread_leaves_contested_cores_to_the_engines_thread() -> None:
    class Nice(HeldPreprocessor):
        def _note(self, call: object) -> None:
            self.calls.append(os.nice(0))  # on Linux of this thread

    tokenizing = Tokenizing(prepare := Nice(), max_waiting=1, niceness=3)  # type: ignore[arg-type]
    await asked(tokenizing, "a", "text")
    assert prepare.calls == [min(19, os.nice(0) + 3 + 10)]
