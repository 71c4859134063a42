"""Tokenize for clients that only count or read tokens, on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from gpu_worker.front.fair_threads import FairThreads
from gpu_worker.front.preprocess import RequestPreprocessor
from gpu_worker.front.request.request import Prompt, TokenIds, Tokenized
from gpu_worker.front.request.tools import Tools

_BELOW_ENGINE = 10  # nice values: the steps of answers come first on cores that both want


class Tokenizing:
    """One thread that tokenizes, with tenants in turn, after the engine's thread.

    It is never one of the threads that prepare prompts, so that no amount of such calls delays an answer's first token.
    """

    def __init__(self, prepare: RequestPreprocessor, *, max_waiting: int, niceness: int = 0) -> None:
        """`niceness`: of the engine's thread."""
        self._prepare = prepare
        self._thread = FairThreads(
            "tokenize",
            num_threads=1,
            max_calls=max_waiting,
            full=f"the queue of the tokenizer is full ({max_waiting} requests); retry later",
            niceness=niceness + _BELOW_ENGINE,
        )

    async def tokenize(
        self,
        prompt: Prompt,
        template: str,
        *,
        tenant: str,
        add_special_tokens: bool | None = None,
        with_texts: bool = False,
        tools: Tools | None = None,
    ) -> Tokenized:
        """Return the tokens of a prompt, which may exceed the context; `with_texts`: also the text of each.

        Tenants take turns, and no number of calls delays a job. `add_special_tokens`: None for what a job with this
        prompt does. Raises: PromptInvalid, PromptTooLong, EngineFull.
        """
        work = partial(
            self._prepare.tokenize,
            prompt,
            template,
            add_special_tokens=add_special_tokens,
            with_texts=with_texts,
            tools=tools,
        )
        return await asyncio.wrap_future(self._thread.submit(tenant, work))

    async def detokenize(self, prompts: Sequence[TokenIds], *, tenant: str, skip_special_tokens: bool) -> list[str]:
        """Return the text of each prompt, in the same turns.

        Raises: PromptInvalid for an id outside the vocabulary, EngineFull.
        """
        work = partial(self._prepare.detokenize, prompts, skip_special_tokens=skip_special_tokens)
        return await asyncio.wrap_future(self._thread.submit(tenant, work))

    def close(self) -> None:
        """End waiting calls with EngineStopped."""
        self._thread.close()
