from __future__ import annotations

import resource

import pytest

from deployments.calls.proxy_limits import (
    CONNECTIONS_VARIABLE,
    HA_PROXY_VARIABLE,
    TRACEPARENT_VARIABLE,
    ProxyLimits,
    require_own_proxy,
)
from deployments.errors import ProxyUnsafe


def test_the_limits_are_read_from_the_environment() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    default = ProxyLimits.from_environment({})
    assert default.head_timeout_s == 10 and not default.trusts_traceparent
    assert default.connections_per_address == min(1024, soft // 4) or soft == resource.RLIM_INFINITY
    given = ProxyLimits.from_environment({CONNECTIONS_VARIABLE: "7", TRACEPARENT_VARIABLE: "1"})
    assert (given.connections_per_address, given.trusts_traceparent) == (7, True)
    assert ProxyLimits.from_environment({CONNECTIONS_VARIABLE: "0"}).connections_per_address is None
    for name, value in ((CONNECTIONS_VARIABLE, "-1"), (CONNECTIONS_VARIABLE, "x"), (TRACEPARENT_VARIABLE, "yes")):
        with pytest.raises(ValueError, match=name):
            ProxyLimits.from_environment({name: value})


@pytest.mark.parametrize(("value", "has_keys", "is_safe"), [("1", False, False), ("1", True, True), ("0", False, True)])
def test_rays_haproxy_needs_keys(value: str, has_keys: bool, is_safe: bool) -> None:
    if is_safe:
        require_own_proxy({HA_PROXY_VARIABLE: value}, has_keys=has_keys)
        return
    with pytest.raises(ProxyUnsafe, match="set keys_file"):
        require_own_proxy({HA_PROXY_VARIABLE: value}, has_keys=has_keys)
