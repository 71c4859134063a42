"""What the server remembers of one request while it answers it: for its metrics, its log line and its usage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.api.responses import Planned
from deployments.auth.authenticator import ANONYMOUS_TENANT, Caller
from gpu_worker.front.request.request import Delta
from lora_store import AdapterRef

CLIENT_LEFT = 499  # what proxies log for a client that left before the end of its answer


@dataclass(slots=True)
class RowTimes:
    """When the text of one row arrived, by the request's clock, with the token counts."""

    first_at: float
    first_tokens: int
    last_at: float
    last: Delta


@dataclass(slots=True)
class RequestContext:
    """Everything the server remembers of one request while it answers it.

    The outermost middleware creates it for HTTP, the Ingress for a call through a Ray handle. `route` is the matched
    pattern, never a path that a client wrote. Times are of the process's monotonic clock.
    """

    request_id: str
    route: str
    method: str = ""
    arrived_at: float = field(default_factory=time.monotonic)
    caller: Caller | None = None  # set by the authentication, on routes that need a key
    tenant: str = ANONYMOUS_TENANT  # the caller's
    ignored_header: str = ""  # the header of the client's key, where this server has none
    status: int = CLIENT_LEFT
    code: str = ""  # of the API's error object
    model: str = ""  # as the client asked
    strategy: str = "none"
    base_model: str = ""  # that answers; "" is the first of the served ones
    adapters: tuple[str, ...] = ()  # version digests
    used: tuple[
        tuple[str, str, float], ...
    ] = ()  # `tenant/name`, digest and weight, which is the mean over its prompts
    versions: tuple[tuple[str, str], ...] = ()  # digest and role of those that answer for a name under trial
    abstained: bool = False
    ignored: tuple[str, ...] = ()  # paths of the fields that this server does not read
    plan_s: float | None = None
    num_choices: int = 1  # answers that each prompt gets
    num_read: int = 0  # tokens that the encoder read for an answer of vectors
    rows: dict[int, RowTimes] = field(default_factory=dict)
    plans: Sequence[Planned] = ()  # one for each prompt
    is_recorded: bool = False  # its status is final, and its usage is recorded where usage is kept

    def record_plans(self, plans: Sequence[Planned], seconds: float) -> None:
        """Record the plans. A request of several prompts is reported with the strategy and base model of its first."""
        self.plans, self.strategy, self.plan_s = plans, plans[0].plan.strategy, seconds
        self.base_model = plans[0].plan.base_model
        weights: dict[AdapterRef, float] = {}
        for row in (row for planned in plans for row in planned.plan.adapters):
            weights[row.ref] = weights.get(row.ref, 0.0) + row.weight / len(plans)
        self.adapters = tuple(ref.short_digest for ref in weights)
        self.used = tuple((f"{ref.tenant}/{ref.name}", ref.digest, weight) for ref, weight in weights.items())
        self.abstained = any(planned.abstained for planned in plans)

    def record_versions(self, plans: Sequence[Planned]) -> None:
        """Record the versions that generate an answer for names under trial."""
        arms = [arm for planned in plans for arm in planned.trials]
        roles = [(arm.answering.short_digest, "trial" if arm.is_chosen else "live") for arm in arms]
        self.versions = tuple(dict.fromkeys(roles))

    def record_delta(self, index: int, delta: Delta) -> None:
        """Record that a delta of row `index` arrived now."""
        now = time.monotonic()
        times = self.rows.get(index)
        if times is None:
            self.rows[index] = RowTimes(now, delta.num_new_tokens, now, delta)
        else:
            times.last_at, times.last = now, delta

    @property
    def first_token_s(self) -> float | None:
        return min((row.first_at - self.arrived_at for row in self.rows.values()), default=None)

    @property
    def queued_s(self) -> float:
        """The longest time any of its rows waited in an engine's queue."""
        return max((row.last.queued_s for row in self.rows.values()), default=0.0)

    @property
    def num_tokens(self) -> tuple[int, int, int]:
        """The tokens of prompts, those of them that were cached, and the new ones, as the answer's `usage` has them."""
        prompts: dict[int, tuple[int, int]] = {}
        num_new = 0
        for index, row in self.rows.items():
            question, cached = index // self.num_choices, row.last.num_cached_tokens
            fewest = min(cached, prompts.get(question, (0, cached))[1])
            prompts[question] = row.last.num_prompt_tokens, fewest
            num_new += row.last.num_new_tokens
        num_prompt, num_cached = (sum(counts) for counts in zip((0, 0), *prompts.values(), strict=True))
        return num_prompt + self.num_read, num_cached, num_new
