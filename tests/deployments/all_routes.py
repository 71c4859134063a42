"""Every route of the application, read from the routes it has mounted, for tests that must leave none out."""

from __future__ import annotations

from typing import Any

from fastapi.routing import APIRoute, iter_route_contexts

from tests.deployments.app_fakes import app_over_fakes

APP = app_over_fakes()

# The role that each route of the API requires; None: any valid key. Add each new route here.
ROLES_OF: dict[tuple[str, str], str | None] = {
    ("GET", "/v1/models"): None,
    ("GET", "/v1/models/{model:path}"): None,
    ("GET", "/v1/names"): None,
    ("GET", "/v1/names/{name:path}"): None,
    ("PUT", "/v1/names/{name:path}"): "publish",
    ("DELETE", "/v1/names/{name:path}"): "publish",
    ("POST", "/v1/names/{name:path}/rollback"): "publish",
    ("POST", "/v1/names/{name:path}/approve"): "admin",
    ("GET", "/v1/loras"): None,
    ("POST", "/v1/loras"): "publish",
    ("GET", "/v1/loras/{name:path}"): None,
    ("DELETE", "/v1/loras/{name:path}"): "publish",
    ("PATCH", "/v1/loras/{name:path}"): "publish",
    ("POST", "/v1/loras/{name:path}/rollback"): "publish",
    ("POST", "/v1/loras/{name:path}/share"): "publish",
    ("POST", "/v1/loras/{name:path}/samples"): "publish",
    ("POST", "/v1/loras/{name:path}/approve"): "admin",
    ("POST", "/v1/load_lora_adapter"): "publish",
    ("POST", "/v1/unload_lora_adapter"): "publish",
    ("POST", "/v1/pool/verify"): "admin",
    ("POST", "/v1/pool/doctor"): "admin",
    ("POST", "/v1/pool/evaluate"): "admin",
    ("POST", "/v1/pool/reindex"): "admin",
    ("POST", "/v1/pool/gc"): "admin",
    ("GET", "/v1/pool/export"): "admin",
    ("GET", "/v1/pool/files/{name:path}"): "admin",
    ("GET", "/v1/pool/map"): None,
    ("POST", "/v1/pool/map"): "infer",
    ("GET", "/v1/stats"): None,
    ("GET", "/v1/usage"): None,
    ("POST", "/v1/chat/completions"): "infer",
    ("POST", "/v1/completions"): "infer",
    ("POST", "/v1/responses"): "infer",
    ("POST", "/v1/messages"): "infer",
    ("POST", "/v1/messages/count_tokens"): "infer",
    ("POST", "/v1/route"): "infer",
    ("POST", "/v1/outcomes"): "infer",
    ("POST", "/v1/embeddings"): "infer",
    ("POST", "/tokenize"): "infer",
    ("POST", "/detokenize"): "infer",
}
OPEN_ROUTES = {
    *((method, path) for method in ("GET", "HEAD") for path in ("/health", "/ready")),
    *((method, path) for method in ("GET", "HEAD") for path in ("/", "/console/{name}", "/openapi.json", "/docs")),
}


def mounted() -> dict[tuple[str, str], Any]:
    """Return each mounted route by method and path. FastAPI keeps those of included routers below `app.routes`."""
    found: dict[tuple[str, str], Any] = {}
    for context in iter_route_contexts(APP.routes):
        route: Any = context
        for method in route.methods:
            assert (method, route.path) not in found, "two routes for one method and path"
            found[method, route.path] = route
    return found


def guarded() -> dict[tuple[str, str], APIRoute]:
    """Return the mounted routes of the API."""
    return {key: route for key, route in mounted().items() if key[1].startswith(("/v1/", "/tokenize", "/detokenize"))}


def documented() -> set[tuple[str, str]]:
    """Return the operations of the OpenAPI document, with path parameters as the document writes them."""
    paths = APP.openapi()["paths"]
    return {(method.upper(), path) for path, operations in paths.items() for method in operations}


def example_path(path: str) -> str:
    """Return `path` with its parameters filled in."""
    for parameter in ("{model:path}", "{name:path}", "{name}", "{model}"):
        path = path.replace(parameter, "x")
    return path
