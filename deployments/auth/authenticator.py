"""Where requests come in: who asks, and whether there is room for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deployments.api.requested_work import Work
from deployments.auth.caller import LOCAL_CALLER, Caller
from deployments.auth.key_file import KeyFile
from deployments.auth.quotas import Limiter, TokenUsage
from deployments.config.app import AppConfig
from deployments.errors import KeyRefused

_SCHEME = "bearer"


class Authenticator:
    """One for each Ingress replica. Without a keys file everybody is the local caller.

    Raises: ValueError, OSError: the keys file cannot be used.
    """

    def __init__(self, config: AppConfig, limiter: Limiter | None = None) -> None:
        self._keys = (
            None if config.keys_file is None else KeyFile(config.keys_file, missing_grace_s=config.keys_missing_grace_s)
        )
        self._limiter = limiter or Limiter(config.ingress_scaling.max_replicas)

    def enter(self, authorization: str | None) -> Caller:
        """Who makes one more request with this `Authorization` header. Raises: KeyRefused, RateLimited."""
        if self._keys is None:
            return LOCAL_CALLER
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != _SCHEME or not key:
            raise KeyRefused("this server takes a key, as `Authorization: Bearer KEY`")
        caller = self._keys.find(key.strip())
        if caller is None:
            raise KeyRefused("the key is not one of this server's")
        self._limiter.count_request(caller)
        return caller

    @contextmanager
    def running(self, caller: Caller, work: Work) -> Iterator[TokenUsage]:
        """Count a request that generates, routes or places prompts. Raises: RateLimited, RequestInvalid."""
        with self._limiter.running(caller, work) as meter:
            yield meter

    def charge(self, caller: Caller, num_read: int, field: str) -> None:
        """Charge what the encoder is about to read for a publish. Raises: RateLimited, RequestInvalid."""
        self._limiter.charge(caller, num_read, field)
