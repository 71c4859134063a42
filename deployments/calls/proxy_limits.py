"""The limits of one HTTP proxy, from its environment, because application settings do not reach that process."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from deployments.errors import ProxyUnsafe

CONNECTIONS_VARIABLE = "LORARETRIEVER_CONNECTIONS_PER_ADDRESS"
TRACEPARENT_VARIABLE = "LORARETRIEVER_TRUST_TRACEPARENT"
HA_PROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
_MAX_CONNECTIONS = 1024
_SHARE_OF_FILES = 4  # one address may use 1 / n of the files that the process may open


@dataclass(frozen=True, slots=True)
class ProxyLimits:
    """Limits of one proxy process."""

    head_timeout_s: float = 10.0  # from the earliest time of a head until it is complete
    unread_timeout_s: float = 60.0  # how long a client may leave an answer unread
    connections_per_address: int | None = _MAX_CONNECTIONS  # None: no limit, for a proxy behind another proxy
    trusts_traceparent: bool = False  # whether clients decide what is traced

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Return the limits given by the variables. 0 connections: no limit.

        Raises: ValueError if a variable has an invalid value.
        """
        given = environment.get(CONNECTIONS_VARIABLE, "")
        if given and not given.isdecimal():
            raise ValueError(f"{CONNECTIONS_VARIABLE} must be a number, 0 for no limit, got {given!r}")
        connections = int(given) if given else _by_file_limit()
        trust = environment.get(TRACEPARENT_VARIABLE, "0")
        if trust not in ("0", "1"):
            raise ValueError(f"{TRACEPARENT_VARIABLE} must be 0 or 1, got {trust!r}")
        return cls(connections_per_address=connections or None, trusts_traceparent=trust == "1")


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
