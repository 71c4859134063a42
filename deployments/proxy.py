"""What Serve's HTTP proxy is told before it listens: what stands before a body has a bound.

uvicorn (0.54) parses by httptools where that is installed, as it is with Serve (2.60), which passes it no setting on.
httptools joins the pieces of one header however long it grows, at a cost that grows with its square: one client without
a key could hold the proxy until the controller takes it for dead. h11 refuses more than 16 KiB, trailers included.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from uvicorn.config import HTTP_PROTOCOLS

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # read by every proxy process as it starts
CALLBACK = "deployments.proxy:bound_headers"


def bound_headers() -> list[Middleware]:
    """uvicorn parses by h11 in this process from now on. No middleware: Serve asks for a list of them."""
    HTTP_PROTOCOLS["auto"] = HTTP_PROTOCOLS["h11"]
    return []
