"""Visibility and quotas of the Publisher's tenants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.api.adapters import PublishItem
from deployments.api.responses import Published, Settled
from deployments.errors import RateLimited
from lora_store import AdapterNotFound, QuotaExceeded, TenantQuota, Visibility
from tests.deployments.adapter_records import adapter
from tests.deployments.fake_publishing import POET, Publishing


def publish(publishing: Publishing, **said: Any) -> Published:
    upload = PublishItem(Path("folders", "poet"), **said)
    [outcome] = publishing.run(lambda publisher: publisher.publish([upload], "tester"))
    assert isinstance(outcome, Published)
    return outcome


@pytest.mark.parametrize(
    ("said", "is_published"), [(None, False), ("public", False), ("private", True)]
)  # the live one is public
def test_a_live_version_is_published_again_only_for_another_visibility(
    said: Visibility | None, is_published: bool
) -> None:
    publishing = Publishing(adapter("poet"))
    publish(publishing, visibility=said)
    assert bool(publishing.store.called("commit")) is is_published
    assert publishing.pool.live[POET][0].visibility == (said or "public")


@pytest.mark.parametrize(("step", "is_dry"), [("stage", False), ("commit", False), ("check_commit", True)])
def test_a_publish_above_the_quota_leaves_nothing(step: str, is_dry: bool) -> None:
    share = TenantQuota(max_adapters=1)
    publishing = Publishing(failing={step: (QuotaExceeded("adapters", 2, 1), 1)})
    uploads = [PublishItem(Path("folders", name), quota=share) for name in ("poet", "coder")]
    with pytest.raises(QuotaExceeded):
        publishing.run(lambda publisher: publisher.publish(uploads, "tester", is_dry=is_dry))
    assert [quota for *_, quota, _ in publishing.store.called("commit")] == [share] * (step == "commit")
    assert [quota for _, quota in publishing.store.called("check_commit")] == [share] * is_dry
    assert (publishing.pool.held, publishing.live_digests) == ([], {})


def test_samples_are_charged_before_the_encoder_reads_them() -> None:
    publishing = Publishing()
    uploads, charged = [PublishItem(Path("folders", name)) for name in ("poet", "coder")], []

    def charge(num_tokens: int) -> None:
        charged.append((num_tokens, len(publishing.retriever.called("embed"))))

    publishing.run(lambda publisher: publisher.publish(uploads, "tester", charge))
    [(groups, _)] = publishing.retriever.called("embed")
    num_tokens = sum(-(-len(sample.input) // 4) for group in groups for sample in group)
    assert (charged, num_tokens > 0) == ([(num_tokens, 0)], True)


@pytest.mark.parametrize("change", ["publish", "rollback"])
def test_samples_above_the_keys_limit_are_not_read_and_nothing_is_stored(change: str) -> None:
    publishing = Publishing(adapter("poet", version="new"), adapter("poet", version="old"))
    before = dict(publishing.pool.live)

    def charge(num_tokens: int) -> None:
        raise RateLimited("10 tokens per minute", 6.0)

    with pytest.raises(RateLimited):
        if change == "publish":
            uploads = [PublishItem(Path("folders", "coder"))]
            publishing.run(lambda publisher: publisher.publish(uploads, "tester", charge))
        else:
            publishing.run(lambda publisher: publisher.rollback(POET, None, "tester", charge))
    assert not publishing.retriever.called("embed")
    assert (publishing.pool.held, dict(publishing.pool.live)) == ([], before)


def test_a_visibility_change_and_an_approval_wait_for_every_replica() -> None:
    poet = adapter("poet")
    publishing = Publishing(poet)
    assert publishing.run(lambda publisher: publisher.approve([poet.ref], "boss")) == Settled(8, 1, 0)
    assert publishing.pool.live[POET] == (replace(poet, approved=True),)
    settled = publishing.run(lambda publisher: publisher.set_visibility(POET, "private", "tester"))
    assert settled == Settled(9, 1, 0)
    assert publishing.store.called("set_visibility") == [(*POET, "private", "tester")]
    assert publishing.retriever.called("catch_up") == [(8,), (9,)]
    with pytest.raises(AdapterNotFound):
        publishing.run(lambda publisher: publisher.set_visibility(("other", "poet"), "private", "tester"))
