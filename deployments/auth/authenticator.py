"""Authenticate requests and apply the limits of their keys."""

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
    """Maps `Authorization` headers to callers. Each Ingress replica has one.

    Without a keys file every request belongs to the local caller.
    Raises: ValueError, OSError: the keys file cannot be used.
    """

    def __init__(self, config: AppConfig, limiter: Limiter | None = None) -> None:
        self._keys = (
            None if config.keys_file is None else KeyFile(config.keys_file, missing_grace_s=config.keys_missing_grace_s)
        )
        self._limiter = limiter or Limiter(config.ingress_scaling.max_replicas)

    def authenticate(self, authorization: str | None) -> Caller:
        """Return the caller of a request and count the request. Raises: KeyRefused, RateLimited."""
        if self._keys is None:
            return LOCAL_CALLER
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != _SCHEME or not key:
            raise KeyRefused("this server requires an API key: send `Authorization: Bearer KEY`")
        caller = self._keys.find(key.strip())
        if caller is None:
            raise KeyRefused("the API key is not valid on this server")
        self._limiter.count_request(caller)
        return caller

    @contextmanager
    def running(self, caller: Caller, work: Work) -> Iterator[TokenUsage]:
        """Reserve quota for a request that generates, routes or places prompts. Raises: RateLimited, RequestInvalid."""
        with self._limiter.running(caller, work) as usage:
            yield usage

    def charge(self, caller: Caller, num_read: int, field: str) -> None:
        """Charge the tokens that the encoder reads for a publish. Raises: RateLimited, RequestInvalid."""
        self._limiter.charge(caller, num_read, field)
