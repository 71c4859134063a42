"""Concurrent publishes, withdrawals and sweeps: the outcome equals some serial order, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from lora_store import AdapterNotFound, LoraStore, decode_weights
from tests.lora_store.builders import BASE, MakeFolder, OpenStore, Stored, embedding
from tests.lora_store.publishing import PROCESSES, Done, publish, publish_all, withdraw_all
from tests.soak import Scale

NUM_PUBLISHERS = 4


@pytest.fixture(scope="module")
def in_processes() -> Iterator[Callable[..., Future[list[Done]]]]:
    """Run each call in one of as many processes as there are publishers."""
    with ProcessPoolExecutor(NUM_PUBLISHERS, mp_context=PROCESSES) as pool:
        yield pool.submit


def _check_serial(store: LoraStore, done: list[Done]) -> None:
    """Check that each commit has its own generation, and that a replay in that order gives the final state."""
    assert len({item.generation for item in done}) == len(done)
    kept: dict[str, list[str]] = {}
    for item in sorted(done, key=lambda item: item.generation):
        if item.digest is None:
            assert item.name in kept, "a withdrawal of what was not live"
            del kept[item.name]
        else:
            older = [digest for digest in kept.get(item.name, []) if digest != item.digest]
            kept[item.name] = [item.digest, *older][:3]
    snapshot = store.snapshot()
    found = {
        name: [record.ref.digest for record in snapshot.versions((tenant, name))] for tenant, name in snapshot.records
    }
    assert found == kept
    for record in snapshot.records.values():
        assert decode_weights(record.weights_digest, store.load(record.weights_digest)).modules
    assert {check.problem for check in store.verify()} <= {None}


def _all(futures: list[Future[list[Done]]]) -> list[Done]:
    return [item for future in futures for item in future.result()]


def test_publishers_of_one_name_end_in_a_serial_order(
    store_uri: str,
    make_folder: MakeFolder,
    in_processes: Callable[..., Future[list[Done]]],
    stored: Stored,
    scale: Scale,
) -> None:
    each = scale.pick("versions of each publisher", small=2, full=50)
    jobs = [
        [(make_folder(f"v{who}-{number}", who * each + number), "poet") for number in range(each)]
        for who in range(NUM_PUBLISHERS)
    ]
    done = _all([in_processes(publish_all, store_uri, job) for job in jobs])
    assert len({item.digest for item in done}) == NUM_PUBLISHERS * each
    _check_serial(LoraStore(store_uri, accepts_base=[BASE]), done)
    assert stored("holds") == {}


def test_withdrawals_racing_updates_end_in_a_serial_order(
    store_uri: str, make_folder: MakeFolder, in_processes: Callable[..., Future[list[Done]]], scale: Scale
) -> None:
    each = scale.pick("updates of each publisher", small=2, full=50)
    jobs = [
        [(make_folder(f"v{who}-{number}", who * each + number), "poet") for number in range(each)] for who in range(3)
    ]
    updates = [in_processes(publish_all, store_uri, job) for job in jobs]
    withdrawals = [in_processes(withdraw_all, store_uri, ["poet"] * each) for _ in range(2)]
    _check_serial(LoraStore(store_uri, accepts_base=[BASE]), _all([*updates, *withdrawals]))


@pytest.mark.parametrize("update_first", [True, False])
def test_a_withdraw_and_an_update_in_either_order(
    open_store: OpenStore, make_folder: MakeFolder, update_first: bool
) -> None:
    ours, rival = open_store(), open_store()
    first = publish(ours, make_folder("poet", 0), "poet")
    staged = ours.stage(make_folder("poet", 1))
    if update_first:
        ours.commit([staged], [embedding()], [1.0], "me")
    gone = rival.withdraw("local", ["poet"], "rival")
    assert [record.ref.digest for record in gone.records][-1] == first.digest
    assert rival.sweep([digest for record in gone.records for digest in record.blobs])
    if update_first:
        assert dict(open_store().snapshot().records) == {}
        return
    assert ours.commit([staged], [embedding()], [1.0], "me") == 3
    snapshot = open_store().snapshot()
    assert snapshot.versions(("local", "poet")) == (snapshot.records["local", "poet"],)
    assert ours.load(staged.weights_digest)


def test_sweeps_and_collections_never_delete_blobs_during_their_publish(
    store_uri: str, make_folder: MakeFolder, scale: Scale
) -> None:
    """Publishers withdraw and publish the same weights, while others sweep these all the time."""
    rounds = scale.pick("rounds of each publisher", small=2, full=60)
    folder = make_folder()
    digests = LoraStore(store_uri, accepts_base=[BASE]).stage(folder).record.blobs

    def churn(who: int) -> int:
        store, retrieved = LoraStore(store_uri, accepts_base=[BASE]), 0
        for _ in range(rounds):
            publish(store, folder, f"a{who}")
            retrieved += len(store.load(digests[0])) > 0 and len(store.samples(digests[1])) > 0
            store.sweep(store.withdraw("local", [f"a{who}"], "me").records[0].blobs)
        publish(store, folder, f"a{who}")
        return retrieved

    def sweep(publishers: list[Future[int]]) -> int:
        store, swept = LoraStore(store_uri, accepts_base=[BASE]), 0
        while not all(publisher.done() for publisher in publishers):
            swept += len(store.sweep(digests))
            store.gc(0)
        return swept

    with ThreadPoolExecutor(4) as threads:
        publishers = [threads.submit(churn, who) for who in range(3)]
        sweeper = threads.submit(sweep, publishers)
        assert [publisher.result() for publisher in publishers] == [rounds] * 3
        assert sweeper.result() >= 0
    store = LoraStore(store_uri, accepts_base=[BASE])
    assert sorted(name for _, name in store.snapshot().records) == ["a0", "a1", "a2"]
    assert [check.problem for check in store.verify()] == [None, None]


def test_threads_of_one_store_publish_side_by_side(
    open_store: OpenStore, store_uri: str, make_folder: MakeFolder, stored: Stored, scale: Scale
) -> None:
    number = scale.pick("adapters", small=8, full=200 if store_uri.startswith("s3://") else 1000)
    store, folders = open_store(), [make_folder(f"a{index}", index) for index in range(number)]
    with ThreadPoolExecutor(32) as threads:
        done = list(threads.map(lambda folder: publish(store, folder, folder.name), folders))
    _check_serial(store, done)
    assert stored("holds") == {}
    with pytest.raises(AdapterNotFound):
        store.load("0" * 64)
