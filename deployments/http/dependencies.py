"""Inject the services of the replica, the request's context and the authenticated caller into routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from deployments.auth.authenticator import Authenticator
from deployments.auth.caller import Caller, Role
from deployments.calls.background_tasks import Background
from deployments.calls.retriever_client import RetrieverClient
from deployments.calls.store_client import StoreClient
from deployments.config.app import AppConfig
from deployments.errors import KeyRefused
from deployments.generation.completions import CompletionService
from deployments.generation.planner import Planner
from deployments.http.middleware.concurrency_limit import InFlight
from deployments.http.middleware.request_context import context_of
from deployments.http.readiness import Readiness
from deployments.http.shared_bytes import SharedBytes
from deployments.http.streaming import KEEP_ALIVE_S
from deployments.http.upload_budget import UploadBudget
from deployments.observability.cluster_stats import StatsReader
from deployments.observability.request_context import RequestContext
from deployments.observability.request_metrics import RequestMetrics
from deployments.publishing.preload import Preload
from deployments.publishing.publisher import Publisher


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that routes and middleware use. The Ingress makes one, and `build_api` builds the routes on it."""

    config: AppConfig
    authenticator: Authenticator
    planner: Planner
    completions: CompletionService
    publisher: Publisher
    store: StoreClient
    retriever: RetrieverClient
    readiness: Readiness
    stats: StatsReader
    metrics: RequestMetrics
    background: Background
    in_flight: InFlight
    bodies: SharedBytes
    uploads: UploadBudget
    preload: Preload
    keep_alive_s: float = KEEP_ALIVE_S

    @property
    def has_keys(self) -> bool:
        return self.config.keys_file is not None


_SCHEME = HTTPBearer(auto_error=False, description="a key of the server's keys file; none where the server has none")


def services_of(http: Request) -> Services:
    """Return the services that `build_api` was given."""
    services: Services = http.app.state.services
    return services


def request_context(http: Request) -> RequestContext:
    """Return the context of this request."""
    return context_of(http.scope)


def caller_of(http: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_SCHEME)] = None) -> Caller:
    """Return the authenticated caller. Raises: KeyRefused."""
    caller = context_of(http.scope).caller
    if caller is None:
        raise KeyRefused("this server takes a key, as `Authorization: Bearer KEY`")
    return caller


def require_role(role: Role) -> Any:
    """Return a dependency on a caller with this role. It raises KeyRefused and RoleMissing."""

    def caller_with_role(caller: AnyCaller) -> Caller:
        caller.require(role)
        return caller

    return Depends(caller_with_role)


AnyServices = Annotated[Services, Depends(services_of)]
AnyContext = Annotated[RequestContext, Depends(request_context)]
AnyCaller = Annotated[Caller, Depends(caller_of)]
InferCaller = Annotated[Caller, require_role("infer")]
PublishCaller = Annotated[Caller, require_role("publish")]
AdminCaller = Annotated[Caller, require_role("admin")]
