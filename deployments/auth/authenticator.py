"""Authenticate requests: find the caller of a key, and apply the limits of the key and of the server."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import KeyRefused, RateLimited, RequestInvalid, ServerOverloaded
from gpu_worker.front.fair_share import FairShare
from lora_store import LOCAL_TENANT, TenantQuota

Role = Literal["infer", "publish", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
ANONYMOUS_TENANT = ""  # no tenant has this name; it sees public adapters only
_BUSY_RETRY_S = 1.0
_SWEEP_ABOVE = 1024  # accounts; keys come and go with the keys file
_SCHEME = "bearer"
WAITS_S = 10.0  # a refused client retries after a second or more


class KeyLimits(BaseModel):
    """Limits of one key; None means unlimited. `max_adapters` and `max_bytes` apply to the tenant's whole pool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(default=None, ge=1)
    # tokens of prompts, of answers, and of text that the encoder reads
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrent_requests: int | None = Field(default=None, ge=1)  # rows in progress: prompts × n over all requests
    max_adapters: int | None = Field(default=None, ge=0)
    max_bytes: int | None = Field(default=None, ge=0)  # of weights, including older versions

    @property
    def tenant_quota(self) -> TenantQuota | None:
        if self.max_adapters is None and self.max_bytes is None:
            return None
        return TenantQuota(self.max_adapters, self.max_bytes)


_NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated client. No role implies another. The catalogue records `key_id` as the author of changes."""

    tenant: str
    roles: frozenset[Role]
    key_id: str
    limits: KeyLimits = _NO_LIMITS


LOCAL_CALLER = Caller(LOCAL_TENANT, frozenset(ROLES), "local")
"""The caller where no keys are set, and the default caller of Ray handles."""


@dataclass(frozen=True, slots=True)
class Work:
    """The amount of work that a request asks for. The fields name the cause for error messages."""

    num_rows: int = 1  # prompts × n; 0 for texts that are only embedded or tokenized
    num_tokens: int = 0  # prompt tokens, once per prompt, plus the maximum of new tokens; settled by real usage
    num_read: int = 0  # tokens for the encoder; charged if it may have read any, whatever the request's outcome
    rows_field: str = "prompt"
    tokens_field: str = "prompt"

    @property
    def reserved(self) -> int:
        return self.num_tokens + self.num_read


class TokenBucket:
    """A rate limit that refills evenly to `per_minute` and starts full. Its level may become negative.

    level(t) = min(per_minute, level(s) + (t - s) · per_minute / 60)
    """

    def __init__(self, per_minute: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start full. `clock` returns seconds and is monotonic."""
        self.per_minute = per_minute
        self._clock = clock
        self._level, self._at = per_minute, clock()

    def take(self, amount: float) -> float:
        """Take `amount` and return 0, or take nothing and return the seconds until it is available.

        A full bucket gives more than it holds: its level becomes negative, so the rate holds over the time after.
        """
        self._refill()
        needed = min(amount, self.per_minute)
        if self._level >= needed:
            self._level -= amount
            return 0.0
        return (needed - self._level) * 60 / self.per_minute

    def settle(self, taken: float, used: float) -> None:
        """Replace an estimate that was `taken` by the amount really `used`."""
        self._refill()
        self._level = min(self.per_minute, self._level + taken - used)

    def resize(self, per_minute: float) -> None:
        """Change the rate. A bucket that was full is full, and the time until it is full stays the same."""
        self._refill()
        self._level *= per_minute / self.per_minute
        self.per_minute = per_minute

    @property
    def level(self) -> float:
        """What can be taken now."""
        self._refill()
        return self._level

    @property
    def is_full(self) -> bool:
        """Whether a new bucket would grant the same."""
        return self.level >= self.per_minute

    @property
    def seconds_until_full(self) -> float:
        return (self.per_minute - self.level) * 60 / self.per_minute

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now


@dataclass
class TokenUsage:
    """Tokens used by one request so far, over all of its answers.

    `num_readings`: the calls in which the encoder may have read text. Without any, `Work.num_read` is not charged.
    """

    num_readings: int = 0
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)  # by answer: (question, estimate of its prompt)
    _prompts: dict[int, int] = field(default_factory=dict)  # by question
    _new: dict[str, int] = field(default_factory=dict)  # by answer

    def sent(self, answer_id: str, question: int, num_prompt_tokens: int) -> None:
        """Charge the estimated tokens of a prompt that was sent to a Worker, once for all answers to it.

        The charge stays if the request ends before its first token, because the Worker may have computed the prompt.
        """
        self._sent[answer_id] = (question, num_prompt_tokens)

    def not_started(self, answer_id: str) -> None:
        """Undo the charge of `sent` for an answer that the server had no room for."""
        self._sent.pop(answer_id, None)

    def saw(self, answer_id: str, question: int, num_prompt_tokens: int, num_new_tokens: int) -> None:
        """Set an answer's new tokens so far, and replace the prompt's estimate by its real token count."""
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
    num_running: int = 0

    @property
    def is_forgettable(self) -> bool:
        """Whether a new account would grant the same."""
        buckets = (self.requests, self.tokens)
        return self.num_running == 0 and all(bucket is None or bucket.is_full for bucket in buckets)

    def adopt(self, other: _Account) -> None:
        """Take over the limits and rates of `other`, but keep the count of running rows."""
        self.limits, self.requests, self.tokens = other.limits, other.requests, other.tokens


class Limiter:
    """Enforces this replica's part of the limits of all keys, on one event loop.

    Changed limits apply at once and start with full buckets. A request that fits the key's limit but not this replica's
    part of it is not refused for good. It is admitted once the replica's part of the rate has refilled completely, or
    once no other row of the key runs here.
    """

    def __init__(
        self, num_replicas: int, *, clock: Callable[[], float] = time.monotonic, sweep_above: int = _SWEEP_ABOVE
    ) -> None:
        self._num_replicas, self._clock = num_replicas, clock
        self._accounts: dict[str, _Account] = {}
        self._sweep_above = self._next_sweep = sweep_above

    def divide_by(self, num_replicas: int) -> None:
        """Give out this part of all limits from now on: that many replicas share them."""
        if num_replicas == self._num_replicas:
            return
        self._num_replicas = num_replicas
        for account in self._accounts.values():
            limits = account.limits
            for bucket, per_minute in (
                (account.requests, limits.requests_per_minute),
                (account.tokens, limits.tokens_per_minute),
            ):
                if bucket is not None and per_minute is not None:
                    bucket.resize(self._part(per_minute))

    def count_request(self, caller: Caller) -> None:
        """Count one request. Raises: RateLimited: the key is above its request rate."""
        bucket = self._account(caller).requests
        if bucket is not None and (wait_s := bucket.take(1)) > 0:
            raise RateLimited(f"{caller.limits.requests_per_minute} requests per minute", wait_s)

    @contextmanager
    def running(self, caller: Caller, work: Work) -> Iterator[TokenUsage]:
        """Reserve the rows and tokens of `work` while the request runs, then charge the tokens it used.

        Raises: RateLimited; RequestInvalid: the request by itself exceeds the key's limits.
        """
        account, usage = self._account(caller), TokenUsage()
        self._require_rows(caller, account, work)
        bucket = account.tokens  # the key's limits may change before it is settled
        if bucket is not None:
            _reserve(caller, bucket, work.reserved, work.tokens_field)
        account.num_running += work.num_rows
        try:
            yield usage
        finally:
            account.num_running -= work.num_rows
            if bucket is not None:
                num_read = work.num_read if usage.num_readings else 0
                bucket.settle(work.reserved, num_read + usage.num_tokens)

    def rate_headers(self, caller: Caller) -> dict[str, str]:
        """Return the state of the key's rates as OpenAI's headers; none for a key without rates.

        What remains is this replica's part times the number of replicas: with several it is an estimate.
        """
        account, headers = self._account(caller), {}
        rates = {
            "requests": (account.requests, caller.limits.requests_per_minute),
            "tokens": (account.tokens, caller.limits.tokens_per_minute),
        }
        for kind, (bucket, per_minute) in rates.items():
            if bucket is not None and per_minute is not None:
                headers[f"x-ratelimit-limit-{kind}"] = str(per_minute)
                left = min(per_minute, int(bucket.level * self._num_replicas))
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, left))
                headers[f"x-ratelimit-reset-{kind}"] = _duration(bucket.seconds_until_full)
        return headers

    def charge(self, caller: Caller, num_read: int, field: str) -> None:
        """Charge tokens that the encoder is about to read. Raises: RateLimited, RequestInvalid."""
        bucket = self._account(caller).tokens
        if bucket is not None:
            _reserve(caller, bucket, num_read, field)

    def _account(self, caller: Caller) -> _Account:
        account = self._accounts.get(caller.key_id)
        if account is None:
            self._sweep()
            account = self._accounts[caller.key_id] = self._open(caller.limits)
        elif account.limits != caller.limits:
            account.adopt(self._open(caller.limits))
        return account

    def _open(self, limits: KeyLimits) -> _Account:
        def bucket(per_minute: int | None) -> TokenBucket | None:
            return None if per_minute is None else TokenBucket(self._part(per_minute), clock=self._clock)

        return _Account(limits, bucket(limits.requests_per_minute), bucket(limits.tokens_per_minute))

    def _part(self, per_minute: int) -> float:
        return max(1.0, per_minute / self._num_replicas)

    def _require_rows(self, caller: Caller, account: _Account, work: Work) -> None:
        at_once = caller.limits.concurrent_requests
        if at_once is None or not work.num_rows:
            return
        if work.num_rows > at_once:
            raise RequestInvalid(
                f"{work.rows_field}: the request has {work.num_rows} rows (prompts × n); the key allows"
                f" {at_once} at once: send fewer prompts or a smaller n",
                work.rows_field,
            )
        part = math.ceil(at_once / self._num_replicas)
        if account.num_running and account.num_running + work.num_rows > part:
            raise RateLimited(f"{at_once} concurrent rows (prompts × n)", _BUSY_RETRY_S)

    def _sweep(self) -> None:
        """Forget idle accounts each time their number has doubled. Amortised cost: O(1) per new account."""
        if len(self._accounts) >= self._next_sweep:
            self._accounts = {key: account for key, account in self._accounts.items() if not account.is_forgettable}
            self._next_sweep = max(self._sweep_above, 2 * len(self._accounts))


def _duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: `20ms`, `7.5s` or `1m12s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 59.95:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"


def _reserve(caller: Caller, bucket: TokenBucket, num_tokens: int, field: str) -> None:
    per_minute = caller.limits.tokens_per_minute
    if per_minute is not None and num_tokens > per_minute:
        raise RequestInvalid(
            f"{field}: the request may use {num_tokens} tokens (prompts, answers, and text that the encoder reads);"
            f" the key allows {per_minute} per minute: send less text, or lower max_tokens",
            field,
        )
    if (wait_s := bucket.take(num_tokens)) > 0:
        raise RateLimited(f"{per_minute} tokens per minute", wait_s)


class InFlight:
    """Counts the requests of one replica, each until the last byte of its answer.

    Tenants share the places by the rule of FairShare. A request that runs keeps its place, so a tenant that was refused
    below its share waits: for `WAITS_S`, tenants that have their share are refused, and a free place is left when it
    retries.

    Requests without a caller take places too, but the anonymous tenant has no share: it never waits, makes no other
    share smaller, and is refused while any tenant waits.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._places = FairShare(without_share=ANONYMOUS_TENANT)
        self._waits_until: dict[str, float] = {}

    @property
    def count(self) -> int:
        return self._places.num_held

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Hold a place until the block ends. Raises: ServerOverloaded."""
        now = self._clock()
        self._waits_until = {other: until for other, until in self._waits_until.items() if until > now}
        has_share = self._places.has_share(tenant, self._limit, self._waits_until)
        if self.count >= self._limit:
            if not has_share:
                self._waits_until[tenant] = now + WAITS_S
            raise ServerOverloaded(self._limit)
        if has_share and any(other != tenant for other in self._waits_until):
            raise ServerOverloaded(self._limit)
        self._waits_until.pop(tenant, None)
        self._places.take(tenant)
        try:
            yield
        finally:
            self._places.give(tenant)


FindCaller = Callable[[str], Caller | None]
"""Return the caller that owns a key, or None. Raises: KeysUnavailable; KeyRefused: it has expired."""


class Authenticator(Limiter):
    """Maps `Authorization` headers to callers, and enforces their limits. Each Ingress replica has one.

    Without keys every request belongs to the local caller.
    """

    def __init__(self, find_caller: FindCaller | None, num_replicas: int) -> None:
        super().__init__(num_replicas)
        self._find_caller = find_caller

    def authenticate(self, authorization: str | None) -> Caller:
        """Return the caller of a request. Raises: KeyRefused, KeysUnavailable."""
        if self._find_caller is None:
            return LOCAL_CALLER
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != _SCHEME or not key:
            raise KeyRefused("this server requires an API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`")
        caller = self._find_caller(key.strip())
        if caller is None:
            raise KeyRefused("the API key is not valid on this server")
        return caller
