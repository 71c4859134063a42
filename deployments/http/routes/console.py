"""`/`: the console, `/docs`: the description of the API, and the files of both. They contain no data and need no key.

FastAPI's own `/docs` loads a script of another site, which could read the key that the console keeps in its tab. This
page is ours, under the console's policy.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

from deployments.http.bodies import AnsweringRoute

_FOLDER = Path(__file__).parents[2] / "console"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # cached and revalidated each time, so that a new release appears at once
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

router = APIRouter(route_class=AnsweringRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class ConsoleFile:
    """A file of the console. The ETag is the digest of its content, so it is the same on every replica."""

    content: bytes
    media_type: str
    etag: str


@cache
def console_files() -> Mapping[str, ConsoleFile]:
    """Return every file of the console by name."""
    files = {}
    for path in _FOLDER.iterdir():
        if path.suffix in _TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            files[path.name] = ConsoleFile(content, f"{_TYPES[path.suffix]}; charset=utf-8", etag)
    return MappingProxyType(files)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(http: Request) -> Response:
    """Return the console."""
    return _sent("index.html", http)


@router.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
async def docs(http: Request) -> Response:
    """Return the page that shows `/openapi.json`."""
    return _sent("docs.html", http)


@router.api_route("/console/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def file(name: str, http: Request) -> Response:
    """Return a file that the pages use."""
    return _sent(name, http)


def _sent(name: str, http: Request) -> Response:
    """Return the file, or 304 if the client has it. Raises: HTTPException (404)."""
    found = console_files().get(name)
    if found is None:
        raise HTTPException(404, f"the console has no file {name[:100]!r}")
    headers = _HEADERS | {"ETag": found.etag}
    if found.etag in http.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
