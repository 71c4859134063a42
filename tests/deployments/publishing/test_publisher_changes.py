"""Changes by the Publisher to a pool that is not empty: reindexes, updates, rollbacks, withdrawals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest

from deployments.api.adapters import PublishItem
from deployments.api.responses import Published, Settled
from deployments.errors import VersionNotKept
from lora_store import (
    AdapterNotFound,
    AdapterRef,
    Embedding,
    Sample,
    Staged,
    StoreUnavailable,
    Trial,
    VersionConflict,
)
from lora_store.staging import changed_version
from retriever_svc.errors import EncoderUnusable
from retriever_svc.route import Embedded
from tests.deployments.adapter_records import ENCODER, adapter, digest_of
from tests.deployments.fake_publishing import Publishing, live
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import FakeWorker
from tests.fakes import FakeHandle


class Reindexed(FakeStore):
    """A reindex activates another encoder right before the first commit."""

    async def commit(self, staged: Sequence[Staged], embeddings: Sequence[Embedding | None], *more: object) -> int:
        if self.encoder is None:
            self.encoder = "new-encoder"
        return await super().commit(staged, embeddings, *more)


class Swapping(FakeRetriever):
    """Embeds with the new encoder once it has caught up."""

    async def catch_up(self, generation: int) -> int:
        self.encoder = "new-encoder"
        return await super().catch_up(generation)


def test_a_publish_overtaken_by_a_reindex_is_embedded_by_the_new_encoder() -> None:
    publishing = Publishing(retriever=FakeHandle(Swapping()))
    publishing.pool = Reindexed(without_samples=("bare",))
    publishing.store = FakeHandle(publishing.pool)
    assert [published.generation for published in live(publishing("poet", "bare"))] == [9, 9]
    encoders = [[e and e.encoder for e in embeddings] for _, embeddings, *_ in publishing.store.called("commit")]
    assert encoders == [[ENCODER, None], ["new-encoder", None]]
    assert publishing.retriever.called("catch_up") == [(8,), (9,)]
    assert publishing.pool.held == []


def test_a_publish_that_the_new_encoder_never_embeds_is_not_said_to_be_found(caplog: pytest.LogCaptureFixture) -> None:
    publishing = Publishing(retriever=FakeHandle(FakeRetriever()))  # each of its replicas stays behind
    publishing.pool = Reindexed()
    publishing.store = FakeHandle(publishing.pool)
    [outcome] = live(publishing("poet"))
    assert not outcome.found_by_auto and "pool reindex" in outcome.warnings[0]
    assert len(publishing.store.called("commit")) == 4, "it ends"
    assert "run `loraretriever pool reindex` again" in caplog.text


def test_an_update_while_following_a_reindex_is_not_undone() -> None:
    class Updated(Reindexed):
        async def active_encoder(self) -> str | None:
            if self.live:  # after the first commit another publisher updates the name
                self.live["local", "poet"] = (adapter("poet", version="theirs"), *self.live["local", "poet"])
            return await super().active_encoder()

    publishing = Publishing(retriever=FakeHandle(Swapping()))
    publishing.pool = Updated()
    publishing.store = FakeHandle(publishing.pool)
    publishing("poet")
    assert publishing.live_digests["poet"][0] == adapter("poet", version="theirs").ref.digest


def item(**label: Any) -> PublishItem:
    return PublishItem(Path("folders", "poet"), **label)


def published(publishing: Publishing, upload: PublishItem, **options: Any) -> Published:
    [outcome] = publishing.run(lambda publisher: publisher.publish([upload], "tester", **options))
    assert isinstance(outcome, Published), outcome
    return outcome


@pytest.mark.parametrize("is_dry", [False, True])
def test_the_result_says_what_a_new_version_kept_and_changed(is_dry: bool) -> None:
    publishing = Publishing(adapter("poet", version="support", template="alpaca"))
    new = published(publishing, item(template="server"), is_dry=is_dry)
    assert new.kept == {"tags": ["support"], "visibility": "public"}
    assert new.changed == {"template": {"from": "alpaca", "to": None}}


def test_a_version_that_is_live_already_kept_everything() -> None:
    publishing = Publishing(adapter("poet", version="support"))
    assert published(publishing, item()).kept == {"tags": ["support"], "template": None, "visibility": "public"}
    assert publishing.store.called("commit") == []


def test_a_new_name_keeps_and_changes_nothing() -> None:
    new = published(Publishing(), item(tags=("support",)))
    assert (new.kept, new.changed) == ({}, {})


class Rival(FakeStore):
    """Another publish gives the name a tag right before each of the first `num_rivals` commits."""

    num_rivals = 1

    async def commit(self, staged: Sequence[Staged], *more: Any) -> int:
        if self.num_rivals:
            self.num_rivals -= 1
            theirs = adapter("poet", version=f"theirs-{self.num_rivals}")
            self.live["local", "poet"] = (theirs, *self.live["local", "poet"])
        return await super().commit(staged, *more)


class Resampling(Rival):
    """The other publish gives the name samples too. A version that takes them over has another lease."""

    async def take_over(self, staged: Sequence[Staged]) -> list[Staged]:
        taken = await super().take_over(staged)
        theirs = {"samples_digest": digest_of("theirs"), "num_samples": 1}
        held = [self._hold(changed_version(item.record, **theirs)) for item in taken]
        return [replace(item, keeps=old.keeps) for item, old in zip(held, staged, strict=True)]


class Yielding(Rival):
    """A version that takes nothing over any more is otherwise the same."""

    async def take_over(self, staged: Sequence[Staged]) -> list[Staged]:
        return [replace(item, keeps=frozenset()) for item in staged]


def rivalled(num_rivals: int, store: type[Rival] = Rival) -> Publishing:
    publishing = Publishing()
    ours = replace(adapter("poet", version="ours"), ref=AdapterRef("local", "poet", "d" * 64))
    publishing.pool = store({("local", "poet"): (ours,)})
    publishing.pool.num_rivals = num_rivals
    publishing.store = FakeHandle(publishing.pool)
    return publishing


def test_a_publish_keeps_the_tags_that_another_one_gives_meanwhile() -> None:
    publishing = rivalled(1)
    new = published(publishing, item(template="chat"))
    live_now, theirs, _ = publishing.pool.live["local", "poet"]
    assert (live_now.tags, theirs.tags, live_now.ref) == (("theirs-0",), ("theirs-0",), new.ref)
    assert new.kept["tags"] == ["theirs-0"]
    assert publishing.pool.held == []


def test_a_publish_that_keeps_less_after_another_one_is_committed_again() -> None:
    publishing = rivalled(1, Yielding)
    assert published(publishing, item(template="chat")).ref == publishing.pool.live["local", "poet"][0].ref
    assert publishing.pool.held == []


@pytest.mark.parametrize("store", [Rival, Resampling])
def test_a_name_that_others_keep_changing_is_a_conflict(store: type[Rival]) -> None:
    publishing = rivalled(10, store)
    with pytest.raises(VersionConflict):
        published(publishing, item(template="chat"))
    assert publishing.pool.held == []


def test_a_publish_that_cannot_embed_what_it_takes_over_releases_everything() -> None:
    class FailsAgain(FakeRetriever):
        async def embed(self, *batch: Any) -> list[Embedded | None]:
            embedded = await super().embed(*batch)
            self.unfit = EncoderUnusable("e5", "it is gone")
            return embedded

    publishing = rivalled(1, Resampling)
    publishing.retriever = FakeHandle(FailsAgain())
    with pytest.raises(EncoderUnusable):
        published(publishing, item(template="chat"))
    assert publishing.pool.held == []


def test_a_publish_releases_the_leases_that_it_took_over() -> None:
    publishing = rivalled(2, Resampling)
    new = published(publishing, item(template="chat"))
    assert publishing.pool.live["local", "poet"][0].ref == new.ref
    assert publishing.pool.held == []


def test_a_withdrawal_during_a_rollback_is_not_undone() -> None:
    class Withdrawn(FakeWorker):
        async def probe_many(self, weights_digests: Sequence[str]) -> list[float | Exception]:
            publishing.pool.live.clear()
            return await super().probe_many(weights_digests)

    publishing = Publishing(adapter("poet", version="2"), adapter("poet", version="1"))
    publishing.worker = FakeHandle(Withdrawn())
    with pytest.raises(AdapterNotFound):
        publishing.rollback()
    assert (publishing.pool.live, publishing.pool.held) == ({}, [])


def test_an_update_frees_versions_that_are_no_longer_kept() -> None:
    publishing = Publishing()
    for version in ("1", "2", "3"):
        publishing("poet", version=version)
    assert publishing.pool.swept == []
    publishing("poet", version="4")
    oldest = adapter("poet", version="1")
    assert publishing.worker.called("forget") == [([oldest.weights_digest],)] * 2
    assert publishing.pool.swept == [oldest.weights_digest], "all versions share their samples"
    assert len(publishing.live_digests["poet"]) == 3


def test_a_rollback_publishes_the_previous_version() -> None:
    publishing = Publishing(adapter("poet", version="2"), adapter("poet", version="1"))
    published = publishing.rollback()
    assert (published.ref, published.generation) == (adapter("poet", version="1").ref, 8)
    assert publishing.live_digests["poet"] == [adapter("poet", version=version).ref.digest for version in "12"]
    assert publishing.retriever.called("embed") == [([(Sample("one"), Sample("two"))], ["local"])]
    assert publishing.worker.called("probe_many") == [([adapter("poet", version="1").weights_digest],)]
    assert publishing.retriever.called("catch_up") == [(8,)]
    assert publishing.pool.held == []
    publishing.rollback()
    assert publishing.live_digests["poet"] == [adapter("poet", version=version).ref.digest for version in "21"]


def test_a_rollback_skips_versions_that_were_never_live() -> None:
    offered = replace(adapter("poet", version="trial"), is_offered=True)
    publishing = Publishing(adapter("poet", version="2"), offered, adapter("poet", version="1"))
    assert publishing.rollback().ref == adapter("poet", version="1").ref


@pytest.mark.parametrize("names_live", [False, True])
def test_a_rollback_to_the_live_version_ends_its_trial(names_live: bool) -> None:
    offered = replace(adapter("poet", version="trial"), is_offered=True)
    tried = replace(adapter("poet", version="2"), trial=Trial(offered.ref.digest, 0.5))
    publishing = Publishing(tried, offered, adapter("poet", version="1"))
    published = publishing.rollback(tried.ref.digest[:12] if names_live else None)
    [live, *_] = publishing.pool.live["local", "poet"]
    assert (published.ref, published.generation, published.trial) == (tried.ref, 8, None)
    assert (live.ref, live.trial) == (tried.ref, None)
    assert publishing.store.called("commit") == []


def test_a_rollback_reaches_every_kept_version_by_its_digest() -> None:
    versions = [adapter("poet", version=version) for version in "321"]
    publishing = Publishing(*versions)
    assert publishing.rollback(versions[2].ref.digest[:8]).ref == versions[2].ref
    again = publishing.rollback(versions[2].ref.digest)
    assert again.ref == versions[2].ref, "the live one stays"
    assert len(publishing.store.called("commit")) == 1


@pytest.mark.parametrize("digest", [None, "f" * 64, adapter("poet").ref.digest[:7], ""])
def test_a_version_that_is_not_kept_is_not_found_and_kept_ones_are_named(digest: str | None) -> None:
    publishing = Publishing(adapter("poet"))
    with pytest.raises(VersionNotKept) as caught:
        publishing.rollback(digest)
    assert adapter("poet").ref.digest[:12] in str(caught.value)
    with pytest.raises(AdapterNotFound):
        publishing.rollback(digest, name="nobody")
    assert publishing.store.called("restage") == []


def test_a_rollback_that_fails_leaves_the_live_version() -> None:
    versions = adapter("poet", version="2"), adapter("poet", version="1")
    publishing = Publishing(*versions, failing={"commit": (StoreUnavailable("down"), 1)})
    with pytest.raises(StoreUnavailable):
        publishing.rollback()
    assert publishing.live_digests["poet"] == [record.ref.digest for record in versions]
    assert (len(publishing.pool.held), publishing.pool.swept) == (1, []), "it may be live, so its lease remains"


def test_a_withdrawn_adapter_is_gone_with_its_versions_and_resources() -> None:
    versions = adapter("poet", version="2"), adapter("poet", version="1")
    publishing = Publishing(*versions, adapter("bard"))
    removed = publishing.withdraw("poet")
    assert removed == Settled(8, 1, 0)
    assert list(publishing.live_digests) == ["bard"]
    [(*withdrawn, _)] = publishing.store.called("withdraw")
    assert withdrawn == ["local", ("poet",), "tester"]
    assert publishing.retriever.called("catch_up") == [(8,)]
    assert publishing.pool.swept == sorted({digest for record in versions for digest in record.blobs})


def test_an_unknown_name_withdraws_nothing() -> None:
    publishing = Publishing(adapter("poet"))
    with pytest.raises(AdapterNotFound):
        publishing.withdraw("poet", "nobody")
    assert list(publishing.live_digests) == ["poet"]
    assert publishing.retriever.called("catch_up") == []


def test_an_unlisted_adapter_is_not_embedded_and_is_freed_after_its_time() -> None:
    publishing = Publishing()
    brief = PublishItem(Path("folders", "bare"), ttl_s=1e-6)
    [published] = publishing.run(lambda publisher: publisher.publish([brief], "tester"))
    assert (published.found_by_auto, published.expires_at.tzinfo) == (False, UTC)
    assert publishing.run(lambda publisher: publisher.expire()) == 1
    assert (publishing.pool.live, publishing.pool.generation) == ({}, 9)
    assert publishing.pool.swept and publishing.worker.called("forget")
    assert publishing.retriever.called("catch_up")[-1] == (9,)
    assert publishing.run(lambda publisher: publisher.expire()) == 0
    assert publishing.pool.generation == 9


def test_the_version_before_is_no_neighbour_of_the_new_one() -> None:
    poet, other = live(Publishing()("poet", "other"))
    assert poet.neighbours == ()
    assert [near.ref.name for near in other.neighbours] == ["poet"]
