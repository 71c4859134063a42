"""Concurrent requests of every kind while replicas die, and their outcomes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from tests.deployments.key_files import bearer
from tests.tiny import byte_tokenizer

CLIENTS = 24
KEY = "key-of-the-operator"  # of the tenant that owns the adapters
_KEYS = {"message", "type", "param", "code"}
LETTERS = {
    str(id): 100 for token, id in byte_tokenizer().get_vocab().items() if len(token) == 1 and "a" <= token <= "z"
}
# Tokens are letters drawn by a seed: every token is visible, and answers differ if plans or prompts do.
SAMPLING: dict[str, Any] = {"temperature": 1, "seed": 11, "logit_bias": LETTERS}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, streamed or not."""

    model: str
    prompt: str
    max_tokens: int
    is_streamed: bool = False

    @property
    def body(self) -> dict[str, Any]:
        body = {"model": self.model, "prompt": self.prompt, "max_tokens": self.max_tokens, **SAMPLING}
        return body | ({"lora": {"strategy": "selection"}} if self.model == "auto" else {})


@dataclass(frozen=True, slots=True)
class Outcome:
    """`end`: the finish reason, `[DONE]`, an error's code, or a description of any other end.

    `retries`: how often the client sent the request again.
    """

    ask: Ask
    text: str
    end: str
    is_answer: bool
    retries: int = 0


@dataclass
class Load:
    """`expected`: the text of each request. A text that differs from it, or is not its beginning, is not an answer."""

    url: str
    expected: Mapping[tuple[str, str], str] = field(default_factory=dict)
    max_retries: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    num_streaming: int = 0  # streams between their first token and their end

    async def run(self, asks: Iterable[Ask], faults: Callable[[Load], Awaitable[None]] | None = None) -> list[Outcome]:
        """Send all of `asks`, as released by `faults`; all at once without faults."""
        self._held, self._released = list(asks)[::-1], asyncio.Queue[Ask | None]()
        limits = httpx.Limits(max_connections=2 * CLIENTS)
        async with (
            openai.AsyncOpenAI(
                base_url=f"{self.url}/v1", api_key=KEY, max_retries=self.max_retries, timeout=300
            ) as client,
            httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits, headers=bearer(KEY)) as http,
            asyncio.TaskGroup() as tasks,
        ):
            for _ in range(CLIENTS):
                tasks.create_task(self._client(client, http))
            if faults is not None:
                await faults(self)
            self.release(len(self._held))
            for _ in range(CLIENTS):
                self._released.put_nowait(None)
        return self.outcomes

    def release(self, count: int) -> None:
        """Let this many more requests be sent."""
        for _ in range(min(count, len(self._held))):
            self._released.put_nowait(self._held.pop())

    @asynccontextmanager
    async def kept_running(self, count: int) -> AsyncIterator[None]:
        """Release a request whenever fewer than this many run, and none after the block."""

        async def feed() -> None:
            num_released = 0
            while self._held:
                missing = len(self.outcomes) + count - num_released
                self.release(missing)
                num_released += missing
                await asyncio.sleep(0.05)

        feeding = asyncio.create_task(feed())
        try:
            yield
        finally:
            feeding.cancel()
            self._held.clear()

    async def until(self, check: Callable[[], bool]) -> None:
        async with asyncio.timeout(120):
            while not check():
                await asyncio.sleep(0.01)

    async def _client(self, client: openai.AsyncOpenAI, http: httpx.AsyncClient) -> None:
        while (ask := await self._released.get()) is not None:
            self.outcomes.append(await (self._stream(http, ask) if ask.is_streamed else self._whole(client, ask)))

    async def _whole(self, client: openai.AsyncOpenAI, ask: Ask) -> Outcome:
        body = dict(ask.body)
        extra = {"ignore_eos": True} | ({"lora": body.pop("lora")} if "lora" in body else {})
        try:
            raw = await client.with_raw_response.completions.create(**body, extra_body=extra)
        except openai.APIStatusError as exc:
            return Outcome(ask, "", f"{exc.status_code} {exc.code}", False)
        except openai.OpenAIError as exc:
            return Outcome(ask, "", repr(exc), False)
        choice = raw.parse().choices[0]
        is_right = choice.text == self._expected(ask, choice.text)
        return Outcome(ask, choice.text, str(choice.finish_reason), is_right, raw.retries_taken)

    async def _stream(self, http: httpx.AsyncClient, ask: Ask) -> Outcome:
        """Read byte for byte, to see errors that a lenient client would skip."""
        events: list[str] = []
        has_begun = False
        try:
            body = ask.body | {"ignore_eos": True, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as got:
                if got.status_code != 200:
                    return Outcome(ask, "", f"{got.status_code} {(await got.aread())!r}", False)
                async for line in got.aiter_lines():
                    # Comments keep a stream open that waits, as on a busy machine.
                    events += [line] if line and not line.startswith(":") else []
                    if len(events) == 2 and not has_begun:
                        has_begun, self.num_streaming = True, self.num_streaming + 1
        except httpx.HTTPError as exc:
            return Outcome(ask, "", repr(exc), False)
        finally:
            self.num_streaming -= has_begun
        return self._judged(ask, events)

    def _judged(self, ask: Ask, events: list[str]) -> Outcome:
        """Check the stream: chunks, then `[DONE]` after a reason, or one API error, and nothing more."""
        if not events or not all(event.startswith("data: ") for event in events):
            return Outcome(ask, "", f"no events: {events!r}", False)
        *chunks, last = [event.removeprefix("data: ") for event in events]
        reported = [json.loads(chunk)["choices"][0] for chunk in chunks]
        text = "".join(choice["text"] for choice in reported)
        expected = self._expected(ask, text)
        if last == "[DONE]":
            return Outcome(ask, text, last, text == expected and reported[-1]["finish_reason"] == "length")
        error = json.loads(last)["error"]
        is_answer = error.keys() == _KEYS and bool(error["message"]) and expected.startswith(text)
        return Outcome(ask, text, error["code"], is_answer)

    def _expected(self, ask: Ask, found: str) -> str:
        return self.expected.get((ask.model, ask.prompt), found)
