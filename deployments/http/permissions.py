"""Decide who may change the pool, from where, and with what."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Depends, Request

from deployments.api.publish_item import PublishItem
from deployments.auth.caller import Caller
from deployments.errors import PublishingDisabled, SelfApproval
from deployments.http.client_address import is_loopback
from deployments.http.dependencies import AnyServices, Services
from lora_store import AdapterNotFound, AdapterRef, Key


def require_change(services: AnyServices, http: Request) -> None:
    """Raises: PublishingDisabled unless this client may change the pool. With keys, the role of the key decides."""
    if not (services.has_keys or services.config.allow_remote_publish or is_loopback(http)):
        raise PublishingDisabled("the pool is changed from the server's own machine, or with allow_remote_publish on")


MAY_CHANGE = Depends(require_change)


def require_encoder(services: Services, encoder: str, http: Request) -> None:
    """Raises: PublishingDisabled unless, with keys, the settings list the encoder; without, the client is on loopback.

    Any other name would make every replica look into a folder of the server, or fetch a model of any size. With keys a
    loopback client need not be the operator: `kubectl port-forward` and proxies on the machine also connect from there.
    """
    if services.has_keys:
        if encoder not in (services.config.retrieval.encoder, *services.config.encoders):
            raise PublishingDisabled(
                "encoder: with keys it must be one that the settings list in `encoders`; add it there"
            )
    elif not is_loopback(http):
        raise PublishingDisabled("encoder: without keys, reindex from the server's own machine")


def require_approver(services: Services, ref: AdapterRef, caller: Caller) -> None:
    """Raises: SelfApproval if an admin would approve an adapter of its own tenant, unless the settings allow that."""
    if services.has_keys and ref.tenant == caller.tenant and not services.config.allow_self_approval:
        raise SelfApproval(ref.name, ref.tenant)


def item_of(services: Services, item: PublishItem, caller: Caller, http: Request) -> PublishItem:
    """Return `item` as the caller's tenant publishes it.

    Raises: PublishingDisabled when it is a folder of the server and this client may not name those.
    """
    if item.path is not None and not (services.config.may_publish_paths and is_loopback(http)):
        raise PublishingDisabled("folders are published from the server's own machine, with publish_paths on")
    return replace(item, tenant=caller.tenant, default_visibility=services.config.default_visibility)


def own_key(name: str, caller: Caller) -> Key:
    """Return (tenant, name) of `name` or `tenant/name`. Raises: AdapterNotFound if it names another tenant."""
    tenant, slash, bare = name.rpartition("/")
    if slash and tenant != caller.tenant:
        raise AdapterNotFound(name)
    return caller.tenant, bare
