from __future__ import annotations

import resource

import pytest

from deployments.calls.proxy_limits import (
    HA_PROXY_VARIABLE,
    SAMPLING_VARIABLE,
    TRACING_VARIABLE,
    ProxyLimits,
    require_own_proxy,
)
from deployments.errors import ProxyUnsafe


def test_one_address_may_use_a_share_of_the_files_that_the_process_may_open() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = ProxyLimits.from_environment({})
    assert limits.head_timeout_s == 10
    assert limits.connections_per_address == min(4096, soft // 4) or soft == resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("environment", "trusts"),
    [
        ({}, False),
        ({TRACING_VARIABLE: "a:b"}, False),
        ({TRACING_VARIABLE: "a:b", SAMPLING_VARIABLE: "0.1"}, False),
        ({TRACING_VARIABLE: "a:b", SAMPLING_VARIABLE: "0.0"}, True),
        ({SAMPLING_VARIABLE: "0"}, False),
    ],
)
def test_callers_decide_what_is_traced_where_the_server_samples_nothing_itself(
    environment: dict[str, str], trusts: bool
) -> None:
    assert ProxyLimits.from_environment(environment).trusts_traceparent is trusts


def test_a_sampling_ratio_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        ProxyLimits.from_environment({TRACING_VARIABLE: "a:b", SAMPLING_VARIABLE: "often"})


@pytest.mark.parametrize(("value", "has_keys", "is_safe"), [("1", False, False), ("1", True, True), ("0", False, True)])
def test_rays_haproxy_needs_keys(value: str, has_keys: bool, is_safe: bool) -> None:
    if is_safe:
        require_own_proxy({HA_PROXY_VARIABLE: value}, has_keys=has_keys)
        return
    with pytest.raises(ProxyUnsafe, match="set keys_file"):
        require_own_proxy({HA_PROXY_VARIABLE: value}, has_keys=has_keys)
