"""The limits of one HTTP proxy. Application settings do not reach that process: Ray's own variables do."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from deployments.errors import ProxyUnsafe

TRACING_VARIABLE = "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"
SAMPLING_VARIABLE = "RAY_SERVE_TRACING_SAMPLING_RATIO"
HA_PROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
_MAX_CONNECTIONS = 4096  # a reverse proxy in front has one address for all its clients
_SHARE_OF_FILES = 4  # one address may use 1 / n of the files that the process may open


@dataclass(frozen=True, slots=True)
class ProxyLimits:
    """Limits of one proxy process."""

    head_timeout_s: float = 10.0  # from the earliest time of a head until it is complete
    unread_timeout_s: float = 60.0  # how long a client may leave an answer unread
    connections_per_address: int = _MAX_CONNECTIONS
    trusts_traceparent: bool = False  # whether clients decide what is traced

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Return the limits. With Ray's tracing at a sampling ratio of 0, callers decide what is traced.

        Raises: ValueError if the ratio is not a number.
        """
        ratio = environment.get(SAMPLING_VARIABLE, "")
        traces_callers = bool(environment.get(TRACING_VARIABLE)) and ratio != "" and float(ratio) == 0
        return cls(connections_per_address=_by_file_limit(), trusts_traceparent=traces_callers)


def _by_file_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        _MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(_MAX_CONNECTIONS, soft // _SHARE_OF_FILES))
    )


def require_own_proxy(environment: Mapping[str, str], *, has_keys: bool) -> None:
    """Check that a server without keys can distinguish remote clients from local ones.

    With its HAProxy in front, Serve (2.60) listens on all interfaces, every client's connection comes from loopback,
    and no header says otherwise, so any client could change the pool. Raises: ProxyUnsafe.
    """
    if environment.get(HA_PROXY_VARIABLE, "0") == "1" and not has_keys:
        raise ProxyUnsafe(HA_PROXY_VARIABLE)
