"""Inject services, the request's context and the caller into routes, and decide who may change the pool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.params import Depends as Dependency
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from deployments.addresses import is_loopback_address, is_loopback_host
from deployments.api.adapters import PublishItem
from deployments.auth.authenticator import Authenticator, Caller, InFlight, Role
from deployments.background import Background
from deployments.byte_budget import ByteBudget
from deployments.calls.catalogue_clients import RetrieverClient, StoreClient
from deployments.config.app import AppConfig
from deployments.errors import KeyRefused, PublishingDisabled, RoleMissing, SelfApproval
from deployments.generation.completions import CompletionService
from deployments.generation.planner import Planner
from deployments.http.readiness import Readiness
from deployments.http.scope import find_context
from deployments.observability.cluster_stats import StatsReader
from deployments.observability.request_context import RequestContext
from deployments.observability.request_metrics import RequestMetrics
from deployments.observability.usage import UsageLog
from deployments.publishing.evaluation import Evaluator
from deployments.publishing.learning import Learning
from deployments.publishing.preload import Preload
from deployments.publishing.publisher import Publisher
from lora_store import AdapterNotFound, AdapterRef, Key

_SCHEME = HTTPBearer(auto_error=False, description="a key of the server's keys file; none where the server has none")
KEEP_ALIVE_S = 10.0  # proxies close a connection that is silent for 30 s or more
# Headers that proxies, load balancers and content delivery networks add, in addition to all x-forwarded- headers.
PROXY_HEADERS = frozenset(
    {
        "forwarded",
        "via",
        "x-real-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-original-forwarded-for",
        "x-original-host",
        "x-envoy-external-address",
        "x-envoy-peer-metadata",
        "x-azure-clientip",
        "x-appengine-user-ip",
        "x-arr-log-id",
        "x-proxyuser-ip",
        "true-client-ip",
        "fastly-client-ip",
        "fly-client-ip",
        "cf-connecting-ip",
        "cf-connecting-ipv6",
        "cf-ray",
        "cdn-loop",
        "client-ip",
    }
)


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that routes and middleware use. The Ingress makes one, and `build_api` builds the routes on it."""

    config: AppConfig
    authenticator: Authenticator
    planner: Planner
    completions: CompletionService
    publisher: Publisher
    evaluator: Evaluator
    learning: Learning
    store: StoreClient
    retriever: RetrieverClient
    readiness: Readiness
    stats: StatsReader
    metrics: RequestMetrics
    usage_log: UsageLog
    background: Background
    in_flight: InFlight
    bodies: ByteBudget
    uploads: ByteBudget
    preload: Preload
    keep_alive_s: float = KEEP_ALIVE_S


async def find_services(http: Request) -> Services:
    """Return the services that `build_api` was given."""
    services: Services = http.app.state.services
    return services


async def request_context(http: Request) -> RequestContext:
    """Return the context of this request."""
    return find_context(http.scope)


async def find_caller(
    http: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_SCHEME)] = None
) -> Caller:
    """Return the authenticated caller. Raises: KeyRefused."""
    caller = find_context(http.scope).caller
    if caller is None:
        raise KeyRefused("this server takes a key, as `Authorization: Bearer KEY`")
    return caller


def require_role(role: Role) -> Dependency:
    """Return a dependency on a caller with this role. It raises KeyRefused and RoleMissing."""

    async def caller_with_role(caller: AnyCaller) -> Caller:
        if role not in caller.roles:
            raise RoleMissing(caller.key_id, role)
        return caller

    return Dependency(caller_with_role)


AnyServices = Annotated[Services, Depends(find_services)]
AnyContext = Annotated[RequestContext, Depends(request_context)]
AnyCaller = Annotated[Caller, Depends(find_caller)]
InferCaller = Annotated[Caller, require_role("infer")]
PublishCaller = Annotated[Caller, require_role("publish")]
AdminCaller = Annotated[Caller, require_role("admin")]


def is_loopback(http: Request) -> bool:
    """Return whether the client is on this machine, and is neither a reverse proxy nor a page of another site.

    A proxy on this machine connects from loopback for any client; it is recognised by the headers that only proxies
    add. A browser lets any page post a form to any address, this machine's included; its `Origin` header says so.
    """
    if any(name in PROXY_HEADERS or name.startswith("x-forwarded-") for name in http.headers):
        return False
    origin = http.headers.get("origin")
    if origin is not None and not is_loopback_host(find_page_host(origin) or ""):
        return False
    return http.client is not None and is_loopback_address(http.client.host)


def find_page_host(origin: str) -> str | None:
    """Return the host of an `Origin` header, None without one."""
    with suppress(ValueError):  # as of `http://[evil`
        return urlsplit(origin).hostname
    return None


async def require_change(services: AnyServices, http: Request) -> None:
    """Check that this client may change the pool; with keys the role decides. Raises: PublishingDisabled."""
    if not (services.config.has_keys or services.config.allow_remote_publish or is_loopback(http)):
        raise PublishingDisabled(
            "only clients on the server's machine may change the pool, unless allow_remote_publish is set"
        )


MAY_CHANGE = Depends(require_change)


def require_encoder(services: Services, encoder: str, http: Request) -> None:
    """Check that this encoder may be loaded: one in the settings, or without keys any from loopback.

    Any other name would make every replica read a folder of the server, or download a model of any size. With keys a
    loopback client need not be the operator: `kubectl port-forward` and proxies on the machine also connect from there.
    Raises: PublishingDisabled.
    """
    if services.config.has_keys:
        if encoder not in (services.config.retrieval.encoder, *services.config.encoders):
            raise PublishingDisabled(
                "encoder: with keys it must be one that the settings list in `encoders`; add it there"
            )
    elif not is_loopback(http):
        raise PublishingDisabled("encoder: without keys, reindex from the server's own machine")


def require_approver(services: Services, ref: AdapterRef, caller: Caller) -> None:
    """Raises: SelfApproval if an admin would approve an adapter of its own tenant, unless the settings allow that."""
    if services.config.has_keys and ref.tenant == caller.tenant and not services.config.allow_self_approval:
        raise SelfApproval(ref.name, ref.tenant)


def make_item(services: Services, item: PublishItem, caller: Caller, http: Request) -> PublishItem:
    """Return `item` as the caller's tenant publishes it.

    Raises: PublishingDisabled if it is a folder of the server and this client may not name one.
    """
    if item.path is not None and not (services.config.may_publish_paths and is_loopback(http)):
        raise PublishingDisabled(
            "only clients on the server's machine may publish its folders, and only with publish_paths set; upload the"
            " files instead"
        )
    visibility, quota = services.config.default_visibility, caller.limits.tenant_quota
    return replace(item, tenant=caller.tenant, default_visibility=visibility, quota=quota)


@asynccontextmanager
async def own_key(name: str, caller: Caller, services: Services) -> AsyncIterator[Key]:
    """Yield (tenant, name) of the caller's adapter `name` or `tenant/name`, for a change of it.

    Raises: AdapterNotFound if it names another tenant. Its message, and that of a change that does not find the
    adapter, says whose it is if the caller can see it.
    """
    tenant, slash, bare = name.rpartition("/")
    try:
        if slash and tenant != caller.tenant:
            raise AdapterNotFound(name)
        yield caller.tenant, bare
    except AdapterNotFound as exc:
        if (owner := await _find_owner(name, caller, services)) is not None:
            raise AdapterNotFound(name, owner=owner) from exc
        raise


async def _find_owner(name: str, caller: Caller, services: Services) -> str | None:
    """Return the other tenant whose adapter the caller sees under this name, if there is one."""
    try:
        _, [record, *_] = await services.retriever.record(caller.tenant, name)
    except AdapterNotFound:
        return None
    return None if record.ref.tenant == caller.tenant else record.ref.tenant
