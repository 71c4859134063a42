"""The requests and answers of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from gpu_worker.errors import SamplingInvalid
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.tools import ToolCall, ToolCallPiece, Tools, joined_calls
from lora_store.adapter import LOCAL_TENANT
from lora_store.plan import BASE_PLAN, Plan

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "tool_calls"]
EXPECTED_NEW_TOKENS = 256  # estimate for an answer without `max_tokens`
MAX_CHARS_PER_TOKEN = 64  # a longer text cannot fit, so it is not tokenized
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_BIASED_IDS = 300
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_repeats")
"""The parameters for which the settings, or a base model's `generation_config.json`, may have values."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling parameters of a request. Raises: SamplingInvalid, which names the parameter."""

    max_tokens: int | None = None  # None: the rest of the context, within the worker's own limit
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all ids
    min_p: float = 0.0  # minimum probability of an id, relative to the most likely one
    presence_penalty: float = 0.0  # subtracted from logits of generated ids
    frequency_penalty: float = 0.0  # subtracted from the logit for each time an id was generated
    repetition_penalty: float = 1.0  # divides positive logits of ids in prompt or answer, multiplies others
    max_repeats: int = 0  # times in a row that the answer may end with the same tokens; 0: no limit
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, value added to its logit)
    logprobs: int | None = None  # number of most likely ids to report per token; None: report no log probabilities
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None  # what the answer must follow; it ends the answer
    unset: frozenset[str] = frozenset()  # names of SAMPLING_DEFAULTS that the server's values replace
    max_tokens_is_default: bool = False  # the client set none: less is given where the context has less room

    def __post_init__(self) -> None:
        self._require("max_tokens", self.max_tokens is None or self.max_tokens >= 0, "be at least 0")
        self._require("min_tokens", self.min_tokens >= 0, "be at least 0")
        if self.max_tokens is not None:
            is_within = self.min_tokens <= self.max_tokens
            self._require("min_tokens", is_within, f"be between 0 and max_tokens ({self.max_tokens})")
        self._require("temperature", 0 <= self.temperature <= 100, "be between 0 and 100")
        self._require("top_p", 0 < self.top_p <= 1, "be above 0 and at most 1")
        self._require("top_k", self.top_k >= 0, "be 0 (all) or more")
        self._require("min_p", 0 <= self.min_p <= 1, "be between 0 and 1")
        self._require("max_repeats", self.max_repeats >= 0, "be 0 (no limit) or more")
        for name in ("logprobs", "prompt_logprobs"):
            is_valid = getattr(self, name) is None or 0 <= getattr(self, name) <= MAX_LOGPROBS
            self._require(name, is_valid, f"be between 0 and {MAX_LOGPROBS}")
        self._require("seed", self.seed is None or 0 <= self.seed < 2**63, "be between 0 and 2**63 - 1")
        self._check_penalties()
        self._check_stops()
        self._check_grammar()

    def _check_penalties(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, -2 <= getattr(self, name) <= 2, "be between -2 and 2")
        self._require("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "be between 0.01 and 100")
        if len(self.logit_bias) > MAX_BIASED_IDS:
            message = f"logit_bias must have at most {MAX_BIASED_IDS} ids, got {len(self.logit_bias)}"
            raise SamplingInvalid(message, "logit_bias")
        for token_id, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                message = f"logit_bias of id {token_id} must be between -100 and 100, got {bias}"
                raise SamplingInvalid(message, "logit_bias")

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise SamplingInvalid(f"stop must have at most {MAX_STOPS} strings, got {len(self.stop)}", "stop")
        for stop in self.stop:
            if not 0 < len(stop) <= MAX_STOP_CHARS:
                message = f"each string of stop must have 1 to {MAX_STOP_CHARS} characters, got {len(stop)}"
                raise SamplingInvalid(message, "stop")

    def _check_grammar(self) -> None:
        for name in ("min_tokens", "ignore_eos"):
            is_free = self.grammar is None or not getattr(self, name)
            self._require(name, is_free, "be absent with structured output, because the grammar ends the answer")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise SamplingInvalid(f"{name} must {rule}, got {getattr(self, name)}", name)

    def with_defaults(self, defaults: Mapping[str, float]) -> SamplingParams:
        """Return the parameters with the server's values, by name, for those that the client left unset."""
        own = {name: value for name, value in defaults.items() if name in self.unset}
        return replace(self, **own, unset=self.unset - own.keys()) if own else self  # type: ignore[arg-type]

    @property
    def adjusts_logits(self) -> bool:
        """Return whether penalties or a bias change the logits."""
        changes = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return bool(changes) or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A prompt that the client has tokenized."""

    ids: tuple[int, ...]


Prompt = str | TokenIds | tuple[Message, ...]
"""A raw text, token ids, or a conversation, which a template turns into text."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a worker: its prompt, and the plan of adapters."""

    request_id: str
    prompt: Prompt
    plan: Plan = BASE_PLAN
    sampling: SamplingParams = field(default_factory=SamplingParams)
    template: str = "auto"  # for messages; a raw prompt is used unchanged
    tenant: str = LOCAL_TENANT  # tenants take turns in the engine's queue
    time_left_s: float | None = None  # when it is sent; a duration, as clocks of machines differ
    tools: Tools | None = None  # functions that the answer to messages may call


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The tokens of a prompt. `max_len`: the tokens of prompt and answer that fit."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]  # one for each token, if requested
    max_len: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of an answer and the most likely alternatives, best first.

    Tokens are bytes, because some are part of a character. Log probabilities are those of the model, before
    temperature, penalties and bias. `is_end`: the id that ended the answer, outside its text. `is_call`: a token of a
    call of a function, outside the text too.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    text_offset: int  # characters of the answer before this token
    is_end: bool = False
    is_call: bool = False


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of a prompt. The first one has no log probability, because nothing is before it.

    `rank`: the token's place among all ids by log probability, from 1; of equal ids the smaller one comes first.
    `top`: (id, token, log probability) of the most likely ids, best first.
    `text_offset`: characters of the prompt's text before this token.
    """

    token_id: int
    token: bytes
    text_offset: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one request. The last one carries the finish reason."""

    text: str
    num_prompt_tokens: int
    num_new_tokens: int  # so far, including this delta
    finish_reason: FinishReason | None = None
    first_logits: Tensor | None = None  # (V,) float32 after the prompt, if requested by a probe
    logprobs: tuple[TokenLogprob, ...] = ()  # for the tokens since the last delta, if requested
    queued_s: float = 0.0  # time in the engine's queue
    prompt: tuple[PromptToken, ...] = ()  # in the first delta, if requested
    tool_calls: tuple[ToolCallPiece, ...] = ()
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    stop: str | None = None  # the client's stop string that ended the answer

    @property
    def num_logprobs(self) -> int:
        """Return how many log probabilities it reports: one for each token, and one for each of its alternatives."""
        of_prompt = sum(1 + len(token.top) for token in self.prompt)
        return of_prompt + sum(1 + len(entry.top) for entry in self.logprobs)


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer."""

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt: tuple[PromptToken, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    num_cached_tokens: int = 0
    stop: str | None = None

    @staticmethod
    def joined(deltas: Sequence[Delta]) -> Completion:
        """Join the deltas of a finished answer."""
        last = deltas[-1]
        assert last.finish_reason is not None
        text = "".join(delta.text for delta in deltas)
        logprobs = tuple(entry for delta in deltas for entry in delta.logprobs)
        calls = joined_calls(piece for delta in deltas for piece in delta.tool_calls)
        counts, cached = (last.num_prompt_tokens, last.num_new_tokens), last.num_cached_tokens
        return Completion(text, *counts, last.finish_reason, logprobs, deltas[0].prompt, calls, cached, last.stop)
