"""What the routes of the pool stand on: the replica's handles, and who may change the pool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.api.publish_item import PublishItem
from deployments.auth.authenticator import Authenticator
from deployments.auth.caller import Caller
from deployments.calls.background_tasks import Background
from deployments.config.app import AppConfig
from deployments.errors import PublishingDisabled, SelfApproval
from deployments.http.client_address import is_loopback
from deployments.http.middleware.concurrency_limit import InFlight
from deployments.http.shared_bytes import SharedBytes
from deployments.http.upload_budget import UploadBudget
from deployments.observability.request_metrics import RequestMetrics
from deployments.publishing.changes import Charge
from deployments.publishing.publisher import Publisher
from lora_store import AdapterNotFound, AdapterRef, Key


@dataclass(frozen=True, slots=True)
class Pool:
    """The pool as an Ingress replica reaches it."""

    config: AppConfig
    door: Authenticator
    publisher: Publisher
    store: DeploymentHandle
    retriever: DeploymentHandle
    uploads: UploadBudget
    background: Background

    def charge_to(self, caller: Caller) -> Charge:
        """Return what charges the caller's key for the samples that the encoder reads while it publishes."""
        return lambda num_tokens: self.door.charge(caller, num_tokens, "samples")

    def require_change(self, http: Request) -> None:
        """Raises: PublishingDisabled unless this client may change the pool. With keys, its key says so."""
        if not (self.has_keys or self.config.allow_remote_publish or is_loopback(http)):
            raise PublishingDisabled(
                "the pool is changed from the server's own machine, or with allow_remote_publish on"
            )

    def require_encoder(self, encoder: str, http: Request) -> None:
        """Raises: PublishingDisabled unless the settings list the encoder or, without keys, the client is local.

        Any other name would have every replica look into a folder of the server, or fetch a model of any size. With
        keys a loopback client need not be the operator: `kubectl port-forward` and proxies on the machine are others.
        """
        if self.has_keys:
            if encoder not in (self.config.retrieval.encoder, *self.config.encoders):
                raise PublishingDisabled(
                    "encoder: with keys it must be one that the settings list in `encoders`; add it there"
                )
        elif not is_loopback(http):
            raise PublishingDisabled("encoder: without keys, reindex from the server's own machine")

    @property
    def has_keys(self) -> bool:
        return self.config.keys_file is not None

    def require_approver(self, ref: AdapterRef, caller: Caller) -> None:
        """Raises: SelfApproval where an admin would decide what its own tenant gives to others, unless that is set."""
        if self.has_keys and ref.tenant == caller.tenant and not self.config.allow_self_approval:
            raise SelfApproval(ref.name, ref.tenant)

    def upload_of(self, upload: PublishItem, caller: Caller, http: Request) -> PublishItem:
        """What the caller wants to publish, as its tenant's. Raises: PublishingDisabled."""
        self.require_path(upload, http)
        return replace(upload, tenant=caller.tenant, default_visibility=self.config.default_visibility)

    def require_path(self, upload: PublishItem, http: Request) -> None:
        """Raises: PublishingDisabled when `upload` is a folder of the server and this client may not name those."""
        if upload.path is not None and not (self.config.may_publish_paths and is_loopback(http)):
            raise PublishingDisabled("folders are published from the server's own machine, with publish_paths on")


def read_pool() -> Pool:
    """The pool of the replica that runs the route: Serve knows it, FastAPI does not."""
    pool: Pool = _ingress().pool
    return pool


def config_here() -> AppConfig:
    """Return the settings of the replica that runs the route."""
    return read_pool().config


def in_flight_here() -> InFlight:
    """The count of the replica that runs the route."""
    in_flight: InFlight = _ingress().in_flight
    return in_flight


def bodies_here() -> SharedBytes:
    """Return what bodies may take in the replica that runs the route."""
    bodies: SharedBytes = _ingress().bodies
    return bodies


def request_figures_here() -> RequestMetrics:
    """The figures of the replica that runs the route."""
    figures: RequestMetrics = _ingress().requests
    return figures


def _ingress() -> Any:
    return serve.get_replica_context().servable_object


def open_pool(http: Request) -> Pool:
    """The pool, for a client that may change it. Raises: PublishingDisabled."""
    pool = read_pool()
    pool.require_change(http)
    return pool


def own_key(name: str, caller: Caller) -> Key:
    """(tenant, name) of `name` or `tenant/name`. Raises: AdapterNotFound for another tenant's, existing or not."""
    tenant, slash, bare = name.rpartition("/")
    if slash and tenant != caller.tenant:
        raise AdapterNotFound(name)
    return caller.tenant, bare
