"""A request inside the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.errors import GrammarFailed, LogitsNotFinite
from gpu_worker.front.draw import Draw
from gpu_worker.front.grammar.state import GrammarState
from gpu_worker.front.logprobs import Scored
from gpu_worker.front.prefix import Prefix
from gpu_worker.front.request.request import (
    EXPECTED_NEW_TOKENS,
    Delta,
    FinishReason,
    PromptToken,
    SamplingParams,
    TokenLogprob,
)
from gpu_worker.front.request.tool_parser import ToolCallParser
from gpu_worker.front.request.tools import ToolCallPiece
from gpu_worker.front.text.incremental_detokenizer import IncrementalDetokenizer
from gpu_worker.front.text.token_bytes import TokenBytes
from lora_store.adapter import LOCAL_TENANT
from lora_store.plan import Plan

LONGEST_REPEATED = 64  # tokens of a passage whose repetition is noticed
_LEAST_REPEATED = 24  # tokens of all its repetitions: shorter ones are often meant

Sink = Callable[[Delta | Exception], None]
"""Receives a request's deltas, the last with a finish reason, or an exception. Runs on the engine's thread."""


class Lookup(Protocol):
    """Guesses the next tokens of one row from its own earlier tokens."""

    def guess(self, tokens: Sequence[int], room: int) -> list[int]: ...
    def judge(self, num_guessed: int, num_right: int) -> None: ...


@dataclass(slots=True, eq=False)
class Row:
    """A request from submission to its last token. `tokens`: the prompt and the new tokens."""

    request_id: str
    plan: Plan
    sampling: SamplingParams
    tokens: list[int]
    num_prompt_tokens: int
    max_new_tokens: int
    end_ids: frozenset[int]  # ids that end the answer
    seed: int
    detokenizer: IncrementalDetokenizer
    sink: Sink
    token_bytes: TokenBytes
    grammar: GrammarState | None = None
    tool_calls: ToolCallParser | None = None
    capture_first_logits: bool = False
    tenant: str = LOCAL_TENANT
    deadline: float = math.inf  # by the engine's clock
    start_by: float = math.inf
    arrived_at: float = 0.0
    queued_s: float = 0.0  # from arrival to its first step
    adapter_set: tuple[str, ...] = field(init=False)  # weights digests of the plan's adapters, sorted
    loads: dict[str, Future[DeviceAdapter]] = field(
        default_factory=dict
    )  # digest -> load, for adapters that were not in the bank
    kv_row: int = -1
    is_pinned: bool = False  # its adapters are pinned: while it runs or is preempted
    num_computed: int = 0  # tokens in the KV cache
    skips_prefix_cache: bool = False  # it needs logits of its whole prompt, so nothing of it may be skipped
    prefix: Prefix | None = None  # its keys in the prefix cache; None: it does not use the cache
    guess: list[int] = field(default_factory=list)  # tokens that the next step computes behind `tokens`
    lookup: Lookup | None = None  # makes the guesses
    has_started: bool = False
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at its first start
    num_passes: int = 0  # rows behind it that entered the bank while it had no room there
    first_logits: torch.Tensor | None = None
    pending_logprobs: list[TokenLogprob] = field(default_factory=list)  # since the last delta
    prompt_offsets: Sequence[
        int
    ] = ()  # where the prompt's tokens begin in its text, if their log probabilities are wanted
    prompt: list[PromptToken] = field(default_factory=list)  # those of its tokens that are scored so far
    has_unsound_prompt: bool = False  # the logits of a prompt token are not finite
    is_prompt_sent: bool = False

    def __post_init__(self) -> None:
        self.adapter_set = tuple(sorted(self.weights_digests))
        needs_all_logits = self.sampling.logprobs is not None or self.sampling.prompt_logprobs is not None
        if self.grammar is not None and (needs_all_logits or self.sampling.adjusts_logits):
            self.grammar.longest_run = 0
        if self.sampling.prompt_logprobs is not None:
            self.prompt.append(PromptToken(self.tokens[0], self.token_bytes(self.tokens[0]), 0))

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def captures_next_logits(self) -> bool:
        return self.capture_first_logits and self.first_logits is None

    @property
    def longest_len(self) -> int:
        return self.num_prompt_tokens + self.max_new_tokens

    @property
    def expected_len(self) -> int:
        """Return about how long the row becomes."""
        is_open = self.sampling.max_tokens is None
        num_new = min(self.max_new_tokens, EXPECTED_NEW_TOKENS) if is_open else self.max_new_tokens
        return self.num_prompt_tokens + num_new

    @property
    def most_left(self) -> int:
        """Return how many more new tokens the row makes at most."""
        return self.longest_len - len(self.tokens)

    @property
    def expected_left(self) -> int:
        """Return about how many more new tokens the row makes."""
        return self.expected_len - len(self.tokens)

    @property
    def weights_digests(self) -> list[str]:
        return [adapter.weights_digest for adapter in self.plan.adapters]

    @property
    def failure(self) -> GrammarFailed | LogitsNotFinite:
        """Return why no token could be chosen for the row."""
        if self.grammar is not None and self.grammar.error is not None:
            return GrammarFailed(f"the grammar of request {self.request_id} cannot be followed: {self.grammar.error}")
        return LogitsNotFinite(
            f"request {self.request_id} produced non-finite logits; use smaller adapter weights or other adapters"
        )

    def positions_to_score(self, start: int, end: int) -> range:
        """Return the positions in [start, end) whose logits score a token of the prompt that has no score yet.

        The logits at a position score the token after it.
        """
        if self.sampling.prompt_logprobs is None:
            return range(0)
        return range(max(start, len(self.prompt) - 1), min(end, self.num_prompt_tokens - 1))

    def add_prompt_scores(self, scores: Sequence[Scored | None]) -> None:
        """Append the scores of the next tokens of the prompt; None for logits that are not finite."""
        for scored in scores:
            token, offset = self.tokens[len(self.prompt)], self.prompt_offsets[len(self.prompt)]
            self.has_unsound_prompt |= scored is None
            scored = scored or Scored(0.0, ())
            top = tuple((token_id, self.token_bytes(token_id), logprob) for token_id, logprob in scored.top)
            found = PromptToken(token, self.token_bytes(token), offset, scored.logprob, scored.rank, top)
            self.prompt.append(found)

    def step_tokens(self, start: int, end: int) -> list[int]:
        """Return the tokens and guesses at the positions [start, end)."""
        known = self.tokens[start:end]
        return known + self.guess[: end - start - len(known)]

    def choices(self, total_len: int) -> range:
        """Return how many guesses are before each token to choose, if the step computes the first `total_len` tokens.

        The tokens of a grammar's run are known and need no logits.
        """
        num = total_len - len(self.tokens) + 1
        is_known = self.grammar is not None and num == len(self.guess) + 1
        return range(len(self.guess) if is_known else 0, num)

    def draw(self, ahead: int = 0) -> Draw:
        """Return the inputs for choosing the next token, or the one `ahead` tokens later if these are the guesses."""
        forbidden = tuple(self.end_ids) if self.num_new_tokens + ahead < self.sampling.min_tokens else ()
        allowed = None if self.grammar is None or self.grammar.error is not None else self.grammar.mask(ahead)
        position = len(self.tokens) + ahead
        return Draw(self.sampling, self.seed, position, forbidden, self.tokens, self.num_prompt_tokens, allowed)

    def append_token(self, token: int, scored: Scored | None = None) -> Delta | None:
        """Append a token. Return the released text, with the finish reason after the last token, or None.

        A row without new tokens ends instead: only its prompt was computed.
        """
        if self.max_new_tokens == 0:
            return self._delta("", "length")
        if scored is not None:
            self.pending_logprobs.append(self._logprob(token, scored))
        self.tokens.append(token)
        reason: FinishReason | None = None
        text = ""
        if token in self.end_ids:
            reason = "stop"
        else:
            text = self.detokenizer.push(token, may_stop=self.num_new_tokens >= self.sampling.min_tokens)
            if self.detokenizer.stopped:
                reason = "stop"
            elif self.num_new_tokens >= self.max_new_tokens:
                reason = "length"
            elif self._repeats():
                reason = "stop"
        if reason is not None and not self.detokenizer.stopped:
            text += self.detokenizer.finish()
        calls: tuple[ToolCallPiece, ...] = ()
        if self.tool_calls is not None:
            text, calls, reason = self.tool_calls.read(text, reason)
        if not text and not calls and reason is None:
            return None
        return self._delta(text, reason, calls)

    def _repeats(self) -> bool:
        """Return whether the answer ends with the same passage more often than it may. A grammar decides by itself."""
        given = self.sampling
        if not given.max_repeats or given.grammar is not None or self.num_new_tokens < given.min_tokens:
            return False
        tokens, end = self.tokens, len(self.tokens)
        for length in range(1, LONGEST_REPEATED + 1):
            total = max((given.max_repeats + 1) * length, _LEAST_REPEATED)
            if total > self.num_new_tokens:
                return False
            if tokens[-1] == tokens[-1 - length] and tokens[end - total + length :] == tokens[end - total : -length]:
                return True
        return False

    def _delta(self, text: str, reason: FinishReason | None, calls: tuple[ToolCallPiece, ...] = ()) -> Delta:
        logprobs = self._released_logprobs(is_last=reason is not None) if self.pending_logprobs else ()
        if self.tool_calls is not None:
            begin = self.tool_calls.content_at if text else math.inf
            logprobs = tuple(replace(entry, is_call=entry.text_offset < begin) for entry in logprobs)
        prompt = () if self.is_prompt_sent else tuple(self.prompt)
        self.is_prompt_sent = True
        counts = self.num_prompt_tokens, self.num_new_tokens
        cached = self.num_cached_tokens
        stop = self.detokenizer.stop if self.detokenizer.stop in self.sampling.stop else None  # not a template's
        return Delta(text, *counts, reason, self.first_logits, logprobs, self.queued_s, prompt, calls, cached, stop)

    def _logprob(self, token: int, scored: Scored) -> TokenLogprob:
        top = tuple((self.token_bytes(token_id), logprob) for token_id, logprob in scored.top)
        offset, is_end = self.detokenizer.num_chars, token in self.end_ids
        return TokenLogprob(self.token_bytes(token), scored.logprob, top, offset, is_end)

    def _released_logprobs(self, *, is_last: bool) -> tuple[TokenLogprob, ...]:
        """Return the log probabilities of the tokens whose text is sent. The last delta has those of all others,
        except for tokens that a stop string removed completely."""
        pending, end = self.pending_logprobs, self.detokenizer.num_released
        if is_last and not self.detokenizer.stopped:
            end = self.detokenizer.num_chars + 1
        elif self.tool_calls is not None and not is_last:
            end = self.tool_calls.num_settled
        self.pending_logprobs = [] if is_last else [entry for entry in pending if entry.text_offset >= end]
        return tuple(entry for entry in pending if entry.text_offset < end)
