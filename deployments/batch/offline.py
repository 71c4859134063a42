"""`LoraRetriever`: answer prompts in this process, without a server and without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from deployments.batch.answering import OfflineEngines
from deployments.batch.planning import BatchRouting, ask_planner
from deployments.batch.rows import Asked, make_columns, make_request
from deployments.batch.run import check_devices, open_pool
from deployments.config.app import AppConfig
from deployments.config.loading import load_config
from deployments.errors import RequestInvalid, Unsupported
from deployments.field_problems import did_you_mean
from deployments.generation.planner import Planner
from deployments.json_types import JsonMapping, JsonObject
from deployments.retriever_factory import live_pool, retriever_over
from lora_store import LOCAL_TENANT

_MAX_PROMPTS = 1_000_000  # of one call; they wait in the engine's queue
_PLANNED_AT_ONCE = 64  # prompts; an interrupted call ends when those that are being encoded are done
_NOT_RETURNED = (
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "echo",
    "tools",
    "tool_choice",
)
Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation as a chat request has them."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The answer to one prompt. `error` is the API's error object; then there is no text."""

    text: str = ""
    finish_reason: str | None = None
    strategy: str | None = None
    adapters: Sequence[JsonObject] = ()  # name, digest, weight and score of each that answered
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    error: JsonObject | None = field(default=None)
    base_model: str | None = None  # of several, the one that answered


class LoraRetriever:
    """The server's planner over a pool, and the engines of its base models on one device of this process.

    Each call answers from the pool's newest generation, and starts all its prompts together. Calls from several threads
    take turns. Use it as a context manager, or call `close`.
    """

    def __init__(
        self, settings: AppConfig | Path | str | None = None, tenant: str = LOCAL_TENANT, **changes: Any
    ) -> None:
        """`settings`: those of the server, or a file of them. `changes`: settings that replace those of the file.

        Raises: SettingsInvalid, BatchRefused, StoreUnavailable, EncoderUnusable, and what keeps an only base model from
        being served; several are loaded when the first prompt needs them.
        """
        path = None if settings is None or isinstance(settings, AppConfig) else Path(settings)
        self._config = settings if isinstance(settings, AppConfig) else load_config(path, **changes)
        check_devices(self._config)
        self._tenant = tenant
        store = open_pool(self._config)
        self._pools = live_pool(self._config, store.snapshot)
        self._planner = Planner(
            self._config.served_models,
            self._config.retrieval,
            BatchRouting(retriever_over(self._pools, self._config)),
        )
        self._engines = OfflineEngines(self._config, store, _MAX_PROMPTS)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offline")  # a notebook's own event loop is running

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        lora: JsonMapping | Sequence[JsonMapping | None] | None = None,
        *,
        model: str = "auto",
        as_is: bool = False,
        **fields: Any,
    ) -> list[Generated]:
        """Return one answer for each prompt, in order. A bad prompt gets an error, and the others their answers.

        A text is the user's message of a chat; with `as_is` it is continued without a template. `lora`: options of a
        request's `lora` object, for all prompts or one for each. `fields`: other fields of a request, such as
        `max_tokens`, `temperature` and `seed`. An interrupt, such as Ctrl-C, ends the call and its rows.

        Raises: ValueError for fields that would be ignored, such as a misspelt one, or that ask for more than
        `Generated` returns; EngineStopped, StoreUnavailable; of several base models, what keeps one that a prompt needs
        from being served.
        """
        _refuse_lost_results(fields)
        _refuse_ignored(fields, as_is)
        given: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        if isinstance(prompts, Mapping) or any(isinstance(prompt, Mapping) for prompt in given):
            raise ValueError("prompts: a conversation is a list of messages: send a list of conversations")
        options = list(lora) if isinstance(lora, Sequence) else [lora] * len(given)
        if len(options) != len(given):
            raise ValueError(
                f"lora: {len(options)} options for {len(given)} prompts: give one for each, or one for all"
            )
        bodies = [
            {"model": model, **fields, **({} if own is None else {"lora": _as_dict(own)}), **_asking(prompt, as_is)}
            for prompt, own in zip(given, options, strict=True)
        ]
        running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

        async def answer() -> list[Generated]:
            answering = asyncio.ensure_future(self._answer(bodies))
            running.set_result((asyncio.get_running_loop(), answering))
            return await answering

        answered = self._thread.submit(lambda: asyncio.run(answer()))
        try:
            return answered.result()
        except BaseException:  # also an interrupt of the caller, as by Ctrl-C, which the thread does not see
            if not answered.cancel() and not answered.done():
                loop, task = running.result()
                with suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(task.cancel)
            raise

    def close(self) -> None:
        """Stop the engines and free their memory."""
        self._thread.shutdown()
        self._engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def _answer(self, bodies: Sequence[JsonObject]) -> list[Generated]:
        await asyncio.to_thread(self._pools.catch_up)
        call, asked = uuid4().hex, list[Asked]()
        for start in range(0, len(bodies), _PLANNED_AT_ONCE):
            together = enumerate(bodies[start : start + _PLANNED_AT_ONCE], start)
            asked += await asyncio.gather(*[self._ask(f"{call}-prompt-{number}", body) for number, body in together])
        outcomes = iter(await self._engines.complete([item.job for item in asked if item.job is not None]))
        return [Generated(**make_columns(item, None if item.job is None else next(outcomes))) for item in asked]

    async def _ask(self, name: str, body: JsonObject) -> Asked:
        return await ask_planner(self._planner, self._config, self._tenant, name, body)


def _refuse_lost_results(fields: JsonMapping) -> None:
    """Raises: ValueError for fields that ask for more than `Generated` returns."""
    lost = [name for name in _NOT_RETURNED if fields.get(name) is not None and fields[name] is not False]
    if fields.get("n") not in (None, 1):
        lost.append("n")
    if lost:
        raise ValueError(f"{', '.join(lost)}: an answer here is one text; send such requests to a server")


def _refuse_ignored(fields: JsonMapping, as_is: bool) -> None:
    """Raises: ValueError for fields that would have no effect on a text. Wrong values are errors of each prompt."""
    if given := [name for name in ("prompt", "messages") if name in fields]:
        raise ValueError(f"{given[0]}: send texts and conversations in prompts")
    if fields.get("timeout_s") is not None:
        raise ValueError("timeout_s: answers here have no deadline; leave it out, or send such requests to a server")
    try:
        request = make_request({**fields, **_asking("Hi", as_is)})
    except (RequestInvalid, Unsupported):
        return
    for name in request.model_extra or ():
        raise ValueError(f"{name}: unknown field{did_you_mean(name, request.keys())}")


def _asking(prompt: object, as_is: bool) -> JsonObject:
    """Return the field of a request that has the prompt. The request refuses what is no text or conversation."""
    if isinstance(prompt, str):
        return {"prompt": prompt} if as_is else {"messages": [{"role": "user", "content": prompt}]}
    if isinstance(prompt, Iterable):
        return {"messages": [_as_dict(message) for message in prompt]}
    return {"prompt": prompt}


def _as_dict(value: object) -> object:
    """Return a mapping as the dictionary that a request has, and any other value as it is."""
    return dict(value) if isinstance(value, Mapping) else value
