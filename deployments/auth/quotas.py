"""What each key has used: requests, tokens, and rows in progress, as this Ingress replica sees it.

Work is counted and not requests: a row is one prompt times one of its `n` answers, and tokens are those of prompts
and answers, and about those that the encoder reads.

Replicas do not talk about it. Each gives out its part, 1 / replicas of a rate and ceil(limit / replicas) of the rows
at once, so a limit holds approximately: less than it passes where a key's requests fall unevenly on the replicas, and
up to replicas - 1 more rows may run at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from deployments.api.requested_work import Work
from deployments.auth.caller import Caller, KeyLimits
from deployments.auth.token_bucket import TokenBucket
from deployments.errors import RateLimited, RequestInvalid

_BUSY_RETRY_S = 1.0
_SWEEP_ABOVE = 1024  # accounts: keys come and go with their file


@dataclass
class TokenUsage:
    """The tokens one request has used so far, over all of its answers."""

    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)  # by answer: (question, estimate of its prompt)
    _prompts: dict[int, int] = field(default_factory=dict)  # by question
    _new: dict[str, int] = field(default_factory=dict)  # by answer

    def sent(self, answer_id: str, question: int, num_prompt_tokens: int) -> None:
        """Charge a prompt of about that many tokens, once for all answers to a question, as a Worker gets it.

        It stays charged where the request ends before its first token: by then the Worker may have computed it.
        """
        self._sent[answer_id] = (question, num_prompt_tokens)

    def not_started(self, answer_id: str) -> None:
        """Take back what `sent` charged for an answer: the server had no room for it."""
        self._sent.pop(answer_id, None)

    def saw(self, answer_id: str, question: int, num_prompt_tokens: int, num_new_tokens: int) -> None:
        """Charge an answer's new tokens so far, and in place of the estimate the prompt's real tokens."""
        self._prompts[question] = num_prompt_tokens
        self._new[answer_id] = num_new_tokens

    @property
    def num_tokens(self) -> int:
        prompts = dict(self._sent.values()) | self._prompts
        return sum(prompts.values()) + sum(self._new.values())


@dataclass
class _Account:
    limits: KeyLimits
    requests: TokenBucket | None
    tokens: TokenBucket | None
    max_running: float
    num_running: int = 0

    @property
    def is_forgettable(self) -> bool:
        """Whether a new account would grant exactly the same."""
        buckets = (self.requests, self.tokens)
        return self.num_running == 0 and all(bucket is None or bucket.is_full for bucket in buckets)

    def adopt(self, other: _Account) -> None:
        """Take over the limits and rates of `other`; what runs goes on running."""
        self.limits, self.requests, self.tokens = other.limits, other.requests, other.tokens
        self.max_running = other.max_running


class Limiter:
    """The limits of all keys, on one event loop. Limits that change hold at once, with full rates."""

    def __init__(
        self, num_replicas: int, *, clock: Callable[[], float] = time.monotonic, sweep_above: int = _SWEEP_ABOVE
    ) -> None:
        self._num_replicas, self._clock = num_replicas, clock
        self._accounts: dict[str, _Account] = {}
        self._sweep_above = self._next_sweep = sweep_above

    def count_request(self, caller: Caller) -> None:
        """Raises: RateLimited: the key has made as many as it may."""
        bucket = self._account(caller).requests
        if bucket is not None and (wait_s := bucket.take(1)) > 0:
            raise RateLimited(f"{caller.limits.requests_per_minute} requests per minute", wait_s)

    @contextmanager
    def running(self, caller: Caller, work: Work) -> Iterator[TokenUsage]:
        """Hold the rows and tokens of `work` while the request runs, then charge what it read and what it used.

        Raises: RateLimited; RequestInvalid: the request alone is more than the key may use.
        """
        account, meter = self._account(caller), TokenUsage()
        _require_rows(caller, account, work)
        bucket = account.tokens  # the key's limits may change meanwhile
        if bucket is not None:
            _reserve(caller, bucket, work.reserved, work.tokens_field)
        account.num_running += work.num_rows
        try:
            yield meter
        finally:
            account.num_running -= work.num_rows
            if bucket is not None:
                bucket.settle(work.reserved, work.num_read + meter.num_tokens)

    def charge(self, caller: Caller, num_read: int, field: str) -> None:
        """Charge what the encoder is about to read. Raises: as `running` does."""
        bucket = self._account(caller).tokens
        if bucket is not None:
            _reserve(caller, bucket, num_read, field)

    def _account(self, caller: Caller) -> _Account:
        account = self._accounts.get(caller.key_id)
        if account is None:
            self._sweep()
            account = self._accounts[caller.key_id] = self._opened(caller.limits)
        elif account.limits != caller.limits:
            account.adopt(self._opened(caller.limits))
        return account

    def _opened(self, limits: KeyLimits) -> _Account:
        def bucket(per_minute: int | None) -> TokenBucket | None:
            if per_minute is None:
                return None
            return TokenBucket(max(1.0, per_minute / self._num_replicas), clock=self._clock)

        at_once = limits.concurrent_requests
        max_running = math.inf if at_once is None else math.ceil(at_once / self._num_replicas)
        return _Account(limits, bucket(limits.requests_per_minute), bucket(limits.tokens_per_minute), max_running)

    def _sweep(self) -> None:
        """Forget the accounts that hold nothing, each time their number has doubled: O(1) a new account."""
        if len(self._accounts) >= self._next_sweep:
            self._accounts = {key: account for key, account in self._accounts.items() if not account.is_forgettable}
            self._next_sweep = max(self._sweep_above, 2 * len(self._accounts))


def _require_rows(caller: Caller, account: _Account, work: Work) -> None:
    if work.num_rows > account.max_running:
        raise RequestInvalid(
            f"{work.rows_field}: the request has {work.num_rows} rows (prompts × n), and the key may have"
            f" {account.max_running:.0f} at once: send fewer prompts or a smaller n",
            work.rows_field,
        )
    if account.num_running + work.num_rows > account.max_running:
        raise RateLimited(f"{caller.limits.concurrent_requests} rows (prompts × n) at once", _BUSY_RETRY_S)


def _reserve(caller: Caller, bucket: TokenBucket, num_tokens: int, field: str) -> None:
    if num_tokens > bucket.per_minute:
        raise RequestInvalid(
            f"{field}: the request may use {num_tokens} tokens (of prompts, of answers, and of what the encoder reads),"
            f" and the key may use {int(bucket.per_minute)} per minute: send less text, or ask for fewer new tokens",
            field,
        )
    if (wait_s := bucket.take(num_tokens)) > 0:
        raise RateLimited(f"{caller.limits.tokens_per_minute} tokens per minute", wait_s)
