"""What each request's scope tells: its context, and its path."""

from __future__ import annotations

from starlette.types import Scope

from deployments.observability.request_context import RequestContext

CONTEXT_KEY = "context"  # in a scope's state


def find_context(scope: Scope) -> RequestContext:
    """Return the context of the request. Raises: KeyError if the middleware above did not see the request."""
    context: RequestContext = scope["state"][CONTEXT_KEY]
    return context


def find_path(scope: Scope) -> str:
    """Return the path as routes match it: relative to where the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
