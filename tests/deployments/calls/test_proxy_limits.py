from __future__ import annotations

import resource

import pytest

from deployments.calls.proxy_limits import (
    SAMPLING_VARIABLE,
    TRACING_VARIABLE,
    ProxyLimits,
)


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
