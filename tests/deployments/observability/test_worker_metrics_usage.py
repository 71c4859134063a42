from __future__ import annotations

import pytest

from deployments.calls.worker_client import Usage
from deployments.observability.worker_metrics import TenantUsage, count_tokens
from gpu_worker.front.request.request import Delta


def test_tokens_count_as_they_arrive_and_a_row_runs_until_its_end() -> None:
    usages = TenantUsage()
    with usages.row("acme") as first, usages.row("acme") as second, usages.row("globex"):
        begun = Delta("a", 5, 1)
        count_tokens(first, begun, None)
        count_tokens(first, Delta("b", 5, 3), begun)
        count_tokens(second, Delta("c", 7, 2), None)
        assert usages.read() == {"acme": Usage(2, 2, 12, 5), "globex": Usage(1, 1, 0, 0)}
    assert usages.read() == {"acme": Usage(0, 2, 12, 5), "globex": Usage(0, 1, 0, 0)}


def test_a_row_that_fails_runs_no_longer() -> None:
    usages = TenantUsage()
    with pytest.raises(KeyError), usages.row("acme"):
        raise KeyError
    assert usages.read() == {"acme": Usage(0, 1, 0, 0)}


def test_the_least_recently_active_tenant_is_forgotten() -> None:
    usages = TenantUsage(max_tenants=2)
    for tenant in ("a", "b", "a", "c"):
        with usages.row(tenant):
            pass
    assert usages.read().keys() == {"a", "c"}


def test_a_copy_that_was_read_does_not_change() -> None:
    usages = TenantUsage()
    before = usages.read()
    with usages.row("acme"):
        during = usages.read()
    assert (before, during) == ({}, {"acme": Usage(1, 1, 0, 0)})
