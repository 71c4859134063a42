"""A worker with scripted answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from deployments.calls.worker_client import Usage
from gpu_worker.errors import EngineStopped, PromptInvalid
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.request.request import Delta, Job, Prompt, TokenIds, Tokenized
from gpu_worker.front.request.tools import Tools
from tests.deployments.adapter_records import digest_of, given

DELTAS = (Delta("Hel", 5, 1), Delta("lo", 5, 2), Delta("", 5, 3, "stop"))
NOTHING_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}  # in the usage of an answer
BROKEN = (DELTAS[0], EngineStopped("it stopped"))  # a stream that ends with an error
_NUM_IDS = 0xD800  # characters before the surrogates
SHAPES = {"model.layers.0.mlp.up_proj": (8, 6)}


@dataclass
class FakeWorker:
    """Streams `events`, raising exceptions among them. Probes return `shifts` by adapter name, 0.5 by default.

    `forgets`: answers of `forget`, in turn; then True.
    """

    events: Sequence[Delta | Exception] = DELTAS
    shifts: dict[str, float | Exception] = field(default_factory=dict)
    forgets: list[bool | Exception] = field(default_factory=list)
    failure: Exception | None = None  # error of a probe
    usages: Mapping[str, Usage] = field(default_factory=dict)

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        for event in self.events:
            yield given(event)

    async def probe_many(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        if self.failure is not None:
            raise self.failure
        by_digest = {digest_of(f"weights {name} "): shift for name, shift in self.shifts.items()}
        return [by_digest.get(digest, 0.5) for digest in weights_digests]

    async def tokenize(
        self,
        tenant: str,
        prompt: Prompt,
        template: str,
        add_special_tokens: bool | None,
        with_texts: bool,
        tools: Tools | None = None,
    ) -> Tokenized:
        """Return a token for each character, after one for a conversation's template, and those of its tools."""
        text = prompt if isinstance(prompt, str) else f"{template}|{prompt}"
        text += "" if tools is None else str(tools.functions)
        return Tokenized(tuple(map(ord, text)), tuple(text) if with_texts else (), 64)

    async def detokenize(self, tenant: str, prompts: Sequence[TokenIds], skip_special_tokens: bool) -> list[str]:
        """Return the character of each token. Raises: PromptInvalid for ids outside the vocabulary."""
        if unknown := [token_id for prompt in prompts for token_id in prompt.ids if token_id >= _NUM_IDS]:
            raise PromptInvalid(f"the prompt has the token id {unknown[0]}")
        return ["".join(map(chr, prompt.ids)) for prompt in prompts]

    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        return SHAPES

    async def load(self) -> EngineStatus:
        raise NotImplementedError

    async def usage(self) -> Mapping[str, Usage]:
        return self.usages

    async def forget(self, weights_digests: Collection[str]) -> bool:
        return given(self.forgets.pop(0)) if self.forgets else True
