from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from lora_store import (
    AdapterNotFound,
    AdapterRefused,
    Feedback,
    Location,
    LoraStore,
    Sample,
    Staged,
    StoreUnavailable,
    Withdrawn,
    decode_weights,
)
from lora_store.blobs import BlobStore
from lora_store.leases import LEASE_S, Leases
from lora_store.peft_files import TEMPLATE_FILE, template_digest
from tests.lora_store.builders import (
    BASE,
    IN_A_FOLDER,
    FakeClock,
    MakeFolder,
    MakeWeights,
    OpenStore,
    Stored,
    embedding,
)
from tests.s3 import S3Endpoint

VECTOR = (0.5, 0.25, -1.0)


def _commit(store: LoraStore, *staged: Staged, encoder: str = "enc") -> int:
    return store.commit(staged, [embedding(*VECTOR, encoder=encoder)] * len(staged), [0.5] * len(staged), "tester")


def test_a_staged_adapter_is_seen_only_after_commit(
    store: LoraStore, open_store: OpenStore, make_folder: MakeFolder, make_weights: MakeWeights, clock: FakeClock
) -> None:
    inputs = ("Write a poem.", "two\nlines\u2028and – more")
    staged = store.stage(make_folder(inputs=inputs), tags=["b", "a", "b"], template="chat", visibility="private")
    assert store.snapshot().generation == 0
    assert _commit(store, staged) == 1
    record = open_store().snapshot().resolve("local", "poet")
    assert record.ref == staged.ref
    assert (record.tags, record.template, record.visibility) == (("a", "b"), "chat", "private")
    assert (record.ranks, record.target_modules) == ((2, 4), ("q_proj", "up_proj"))
    assert (record.base_model, record.num_samples) == (BASE, 2)
    assert (tuple(record.embedding.vector), record.encoder, record.probe_shift) == (VECTOR, "enc", 0.5)
    assert tuple(record.embedding.own_scores) == (0.75, 0.5)
    assert (record.actor, record.source, record.generation) == ("tester", "poet", 1)
    assert record.created_at == clock.at
    data = store.load(record.weights_digest)
    assert record.num_bytes == len(data)
    loaded = decode_weights(record.weights_digest, data).modules
    for name, module in make_weights().items():
        assert torch.equal(loaded[name].lora_a, module.lora_a)
        assert torch.equal(loaded[name].lora_b, module.lora_b)
        assert loaded[name].scaling == module.scaling
    assert store.samples(record.samples_digest) == staged.samples == tuple(map(Sample, inputs))


def test_a_publish_needs_no_torch(make_folder: MakeFolder, tmp_path: Path) -> None:
    """It takes a second and 130 MB, in the process that every worker's weights come from."""
    code = f"""
import sys
from pathlib import Path
from lora_store import LoraStore
print(LoraStore({str(tmp_path / "pool")!r}, accepts_base=[{BASE!r}]).stage(Path({str(make_folder())!r})).ref.name)
print(sorted({{"torch", "safetensors"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["poet", "[]"]


@IN_A_FOLDER
def test_the_template_that_the_folder_brings_is_recorded(store: LoraStore, make_folder: MakeFolder) -> None:
    folder, source = make_folder(), "{{ messages }}"
    (folder / TEMPLATE_FILE).write_text(source)
    known = {template_digest(source): "chat"}
    _commit(store, brought := store.stage(folder, templates=known))
    assert store.snapshot().resolve("local", "poet").template == "chat"
    named = store.stage(folder, template="chat", templates=known)
    assert named.ref == brought.ref, "a named one and a brought one are the same version"


@IN_A_FOLDER
def test_only_what_differs_from_the_live_version_commits(
    store: LoraStore, open_store: OpenStore, make_folder: MakeFolder
) -> None:
    first, second = store.stage(make_folder(seed=0)), store.stage(make_folder(seed=1))
    assert [_commit(store, first), _commit(store, store.stage(make_folder()))] == [1, 1]
    assert _commit(open_store(), open_store().stage(make_folder())) == 1
    assert _commit(store, store.stage(make_folder()), store.stage(make_folder("other"))) == 2
    assert store.snapshot().resolve("local", "poet").generation == 1
    assert [_commit(store, item) for item in (second, first)] == [3, 4], "a version that comes back"
    assert _commit(store, second, first) == 5
    assert store.snapshot().resolve("local", "poet").ref == first.ref, "the last of a batch wins"
    assert _commit(store, first, encoder="another") == 6
    assert store.snapshot().resolve("local", "poet").encoder == "another"


@IN_A_FOLDER
@pytest.mark.parametrize(
    "change",
    [{"visibility": "private"}, {"tags": ["new"]}, {"template": "alpaca"}],
    ids=["visibility", "tags", "template"],
)
def test_a_change_of_label_alone_is_published(
    store: LoraStore, make_folder: MakeFolder, change: dict[str, Any]
) -> None:
    _commit(store, store.stage(make_folder()))
    assert _commit(store, store.stage(make_folder(), **change)) == 2


@IN_A_FOLDER
def test_config_noise_and_key_order_do_not_change_the_digests(store: LoraStore, make_folder: MakeFolder) -> None:
    folder = make_folder()
    before = store.stage(folder).ref
    config = json.loads((folder / "adapter_config.json").read_text())
    noise = {"lora_dropout": 0.1, "peft_version": "0.99", "revision": "main", "inference_mode": False, "future": None}
    noisy = dict(reversed(list((config | noise).items())))
    (folder / "adapter_config.json").write_text(json.dumps(noisy))
    assert store.stage(folder).ref == before


@IN_A_FOLDER
def test_an_adapter_without_samples_is_kept_without_an_encoder(store: LoraStore, make_folder: MakeFolder) -> None:
    folder = make_folder(inputs=())
    staged = store.stage(folder)
    assert (staged.samples, staged.record.samples_digest) == ((), None)
    store.commit([staged], [None], [None], "tester")
    record = store.snapshot().resolve("local", "poet")
    assert (record.embedding, record.encoder, record.num_samples) == (None, None, 0)
    (folder / "description.txt").write_text("Writes poems.\n")
    assert store.stage(folder).samples == (Sample("Writes poems."),)


@IN_A_FOLDER
def test_a_batch_with_one_name_of_two_tenants_or_too_few_vectors_fails(
    store: LoraStore, make_folder: MakeFolder
) -> None:
    staged = [store.stage(make_folder(), tenant=tenant) for tenant in ("us", "them")]
    with pytest.raises(AdapterRefused):
        _commit(store, *staged)
    with pytest.raises(ValueError):
        store.commit(staged[:1], [], [], "tester")
    assert store.snapshot().generation == 0


def test_a_stopped_endpoint_is_reported_and_the_store_continues_afterwards(make_folder: MakeFolder) -> None:
    endpoint = S3Endpoint()
    store = LoraStore(endpoint.uri(f"stores/{uuid4().hex}"), accepts_base=[BASE])
    staged, other, lost = (
        store.stage(make_folder()),
        store.stage(make_folder("other", seed=1)),
        make_folder("b", seed=2),
    )
    _commit(store, staged)
    endpoint.stop()
    for attempt in (
        lambda: store.load(staged.weights_digest),
        lambda: store.stage(lost),
        lambda: _commit(store, other),
        lambda: store.withdraw("local", ["poet"], "me"),
    ):
        with pytest.raises(StoreUnavailable):
            attempt()
    with pytest.raises(AdapterRefused):  # problems of the folder are found without the endpoint
        store.stage(lost, name="a/b")
    endpoint.start()
    assert _commit(store, other) == 2
    assert [check.problem for check in store.verify()] == [None] * 3
    endpoint.stop()


@IN_A_FOLDER
def test_a_commit_succeeds_although_its_leases_cannot_be_released(
    store: LoraStore, make_folder: MakeFolder, stored: Stored
) -> None:
    class Stuck(Leases):
        def release(self, leases: Collection[str]) -> None:
            raise StoreUnavailable("the endpoint stopped")

    staged = store.stage(make_folder())
    store._leases = Stuck(Location("unused"), store._now)
    assert _commit(store, staged) == 1
    assert len(stored("holds")) == 1


@IN_A_FOLDER
def test_a_refused_commit_releases_the_leases_that_it_renewed(
    store: LoraStore, location: Location, make_folder: MakeFolder, clock: FakeClock, stored: Stored
) -> None:
    staged = [store.stage(make_folder(name, seed)) for seed, name in enumerate(("poet", "bard"))]
    clock.sleep(LEASE_S / 2)
    for _ in range(2):  # the second time one of them cannot be renewed
        with pytest.raises(AdapterNotFound):
            store.commit(staged, [None, None], [0.5, 0.5], "me", "kept")
        assert set(stored("holds")) == {item.lease for item in staged}
        BlobStore(location.child("blobs")).delete([staged[1].record.weights_digest])


@IN_A_FOLDER
def test_an_unlisted_adapter_is_withdrawn_once_its_time_is_over(
    store: LoraStore, open_store: OpenStore, make_folder: MakeFolder, clock: FakeClock
) -> None:
    store.commit([store.stage(make_folder(), name="kept")], [None], [0.5], "tester")
    taken = store.stage(make_folder(seed=1), name="kept", ttl_s=60)
    with pytest.raises(AdapterRefused, match="a listed adapter has this name"):
        store.commit([taken], [None], [0.5], "tester")
    store.discard([taken])
    brief = store.stage(make_folder(seed=1), name="brief", ttl_s=60)
    assert (brief.record.num_samples, brief.record.samples_digest, brief.samples) == (0, None, ())
    assert store.commit([brief], [None], [0.5], "tester") == 2
    assert open_store().snapshot().resolve("local", "brief").expires_at == clock.at + timedelta(seconds=60)
    store.feedback.put("local", "proposed", Feedback.proposed("Rhyme", "brief", "key"), clock.now())
    clock.sleep(59)
    assert store.expire() == Withdrawn(0, ())
    again = store.stage(make_folder(seed=1), name="brief", ttl_s=60)
    assert store.commit([again], [None], [0.5], "tester") == 3, "it gets more time"
    clock.sleep(59)
    assert store.expire() == Withdrawn(0, ())
    assert len(store.snapshot().versions(("local", "brief"))) == 1
    clock.sleep(1)
    gone = store.expire("an id")
    assert (gone.generation, [record.ref for record in gone.records]) == (4, [brief.ref])
    assert list(open_store().snapshot().records) == [("local", "kept")]
    assert store.feedback.all("local", "proposed", "brief") == []
    assert store.expire("an id") == Withdrawn(0, ())
    assert store.sweep(gone.records[0].blobs) == [brief.weights_digest]
