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
from lora_store.leases import Leases
from lora_store.peft_files import TEMPLATE_FILE, template_digest
from tests.lora_store.builders import BASE, FakeClock, MakeFolder, MakeWeights, OpenStore, Stored, embedding
from tests.s3 import S3Endpoint

VECTOR = (0.5, 0.25, -1.0)


def _commit(store: LoraStore, *staged: Staged, encoder: str = "enc") -> int:
    return store.commit(staged, [embedding(*VECTOR, encoder=encoder)] * len(staged), [0.5] * len(staged), "tester")


def test_a_staged_adapter_is_seen_only_after_commit(
    open_store: OpenStore, make_folder: MakeFolder, clock: FakeClock
) -> None:
    store = open_store()
    staged = store.stage(make_folder(), tags=["b", "a", "b"], template="chat", visibility="private")
    assert store.snapshot().generation == 0
    assert _commit(store, staged) == 1
    record = open_store().snapshot().resolve("local", "poet")
    assert record.ref == staged.ref
    assert (record.tags, record.template, record.visibility) == (("a", "b"), "chat", "private")
    assert (record.ranks, record.target_modules) == ((2, 4), ("q_proj", "up_proj"))
    assert (tuple(record.embedding.vector), record.encoder, record.probe_shift) == (VECTOR, "enc", 0.5)
    assert tuple(record.embedding.own_scores) == (0.75, 0.5)
    assert (record.actor, record.source, record.generation) == ("tester", "poet", 1)
    assert record.created_at == clock.at
    assert record.num_bytes == len(store.load(record.weights_digest))


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


def test_the_template_that_the_folder_brings_is_recorded(make_folder: MakeFolder, folder_uri: str) -> None:
    folder, source = make_folder(), "{{ messages }}"
    (folder / TEMPLATE_FILE).write_text(source)
    store, known = LoraStore(folder_uri, accepts_base=[BASE]), {template_digest(source): "chat"}
    _commit(store, brought := store.stage(folder, templates=known))
    assert store.snapshot().resolve("local", "poet").template == "chat"
    named = store.stage(folder, template="chat", templates=known)
    assert named.ref == brought.ref, "a named one and a brought one are the same version"


def test_weights_and_samples_load_as_published(
    open_store: OpenStore, make_folder: MakeFolder, make_weights: MakeWeights
) -> None:
    store = open_store()
    staged = store.stage(make_folder(inputs=("Write a poem.", "two\nlines\u2028and – more")))
    _commit(store, staged)
    record = store.snapshot().resolve("local", "poet")
    loaded = decode_weights(record.weights_digest, store.load(record.weights_digest)).modules
    for name, module in make_weights().items():
        assert torch.equal(loaded[name].lora_a, module.lora_a)
        assert torch.equal(loaded[name].lora_b, module.lora_b)
        assert loaded[name].scaling == module.scaling
    assert store.samples(record.samples_digest) == staged.samples
    assert [sample.input for sample in staged.samples] == ["Write a poem.", "two\nlines\u2028and – more"]


def test_publishing_a_live_version_again_commits_nothing(open_store: OpenStore, make_folder: MakeFolder) -> None:
    store = open_store()
    assert _commit(store, store.stage(make_folder())) == 1
    assert _commit(store, store.stage(make_folder())) == 1
    assert _commit(open_store(), open_store().stage(make_folder())) == 1
    new = store.stage(make_folder("other"))
    assert _commit(store, store.stage(make_folder()), new) == 2
    assert store.snapshot().resolve("local", "poet").generation == 1


def test_a_version_that_comes_back_after_another_is_published_again(
    open_store: OpenStore, make_folder: MakeFolder
) -> None:
    store = open_store()
    first, second = store.stage(make_folder(seed=0)), store.stage(make_folder(seed=1))
    assert [_commit(store, item) for item in (first, second, first)] == [1, 2, 3]
    assert store.snapshot().resolve("local", "poet").ref == first.ref


def test_in_one_batch_the_last_version_of_a_name_wins(open_store: OpenStore, make_folder: MakeFolder) -> None:
    store = open_store()
    first, second = store.stage(make_folder(seed=0)), store.stage(make_folder(seed=1))
    assert [_commit(store, first), _commit(store, second, first)] == [1, 2]
    assert store.snapshot().resolve("local", "poet").ref == first.ref


@pytest.mark.parametrize(
    "change",
    [{"visibility": "private"}, {"tags": ["new"]}, {"template": "alpaca"}],
    ids=["visibility", "tags", "template"],
)
def test_a_change_of_label_alone_is_published(
    open_store: OpenStore, make_folder: MakeFolder, change: dict[str, Any]
) -> None:
    store = open_store()
    _commit(store, store.stage(make_folder()))
    assert _commit(store, store.stage(make_folder(), **change)) == 2


def test_another_encoders_vector_is_published(open_store: OpenStore, make_folder: MakeFolder) -> None:
    store = open_store()
    staged = store.stage(make_folder())
    assert _commit(store, staged) == 1
    assert _commit(store, staged, encoder="another") == 2
    assert store.snapshot().resolve("local", "poet").encoder == "another"


def test_config_noise_and_key_order_do_not_change_the_digests(open_store: OpenStore, make_folder: MakeFolder) -> None:
    store = open_store()
    folder = make_folder()
    before = store.stage(folder).ref
    config = json.loads((folder / "adapter_config.json").read_text())
    noise = {"lora_dropout": 0.1, "peft_version": "0.99", "revision": "main", "inference_mode": False, "future": None}
    noisy = dict(reversed(list((config | noise).items())))
    (folder / "adapter_config.json").write_text(json.dumps(noisy))
    assert store.stage(folder).ref == before


def test_an_adapter_without_a_vector_is_kept_without_an_encoder(open_store: OpenStore, make_folder: MakeFolder) -> None:
    store = open_store()
    staged = store.stage(make_folder(inputs=()))
    assert (staged.samples, staged.record.samples_digest) == ((), None)
    store.commit([staged], [None], [None], "tester")
    record = store.snapshot().resolve("local", "poet")
    assert (record.embedding, record.encoder, record.num_samples) == (None, None, 0)


def test_a_description_is_the_only_sample_if_there_are_no_others(
    open_store: OpenStore, make_folder: MakeFolder
) -> None:
    folder = make_folder(inputs=())
    (folder / "description.txt").write_text("Writes poems.\n")
    assert open_store().stage(folder).samples == (Sample("Writes poems."),)


def test_one_batch_cannot_give_a_public_name_to_two_tenants(open_store: OpenStore, make_folder: MakeFolder) -> None:
    store = open_store()
    staged = [store.stage(make_folder(), tenant=tenant) for tenant in ("us", "them")]
    with pytest.raises(AdapterRefused):
        _commit(store, *staged)
    assert store.snapshot().generation == 0


def test_a_vector_is_needed_for_each_staged_adapter(open_store: OpenStore, make_folder: MakeFolder) -> None:
    store = open_store()
    with pytest.raises(ValueError):
        store.commit([store.stage(make_folder())], [], [], "tester")
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


def test_a_commit_succeeds_although_its_leases_cannot_be_released(
    open_store: OpenStore, make_folder: MakeFolder, stored: Stored
) -> None:
    class Stuck(Leases):
        def release(self, leases: Collection[str]) -> None:
            raise StoreUnavailable("the endpoint stopped")

    store = open_store()
    staged = store.stage(make_folder())
    store._leases = Stuck(Location("unused"), store._now)
    assert _commit(store, staged) == 1
    assert len(stored("holds")) == 1


def test_an_unlisted_adapter_is_withdrawn_once_its_time_is_over(
    open_store: OpenStore, make_folder: MakeFolder, clock: FakeClock
) -> None:
    store = open_store()
    store.commit([store.stage(make_folder(), name="kept")], [None], [0.5], "tester")
    brief = store.stage(make_folder(seed=1), name="brief", ttl_s=60)
    assert (brief.record.num_samples, brief.record.samples_digest, brief.samples) == (0, None, ())
    assert store.commit([brief], [None], [0.5], "tester") == 2
    assert open_store().snapshot().resolve("local", "brief").expires_at == clock.at + timedelta(seconds=60)
    store.feedback.put("local", "proposed", Feedback.proposed("Rhyme", "brief", "key"), clock.now())
    clock.sleep(59)
    assert store.expire() == Withdrawn(0, ())
    clock.sleep(1)
    gone = store.expire("an id")
    assert (gone.generation, [record.ref for record in gone.records]) == (3, [brief.ref])
    assert list(open_store().snapshot().records) == [("local", "kept")]
    assert store.feedback.all("local", "proposed", "brief") == []
    assert store.expire("an id") == Withdrawn(0, ())
    assert store.sweep(gone.records[0].blobs) == [brief.weights_digest]


def test_publishing_an_unlisted_adapter_again_gives_it_more_time(
    open_store: OpenStore, make_folder: MakeFolder, clock: FakeClock
) -> None:
    store, folder = open_store(), make_folder()
    for generation in (1, 2):
        assert store.commit([store.stage(folder, ttl_s=60)], [None], [0.5], "tester") == generation
        clock.sleep(50)
    assert store.expire() == Withdrawn(0, ())
    assert len(store.snapshot().versions(("local", "poet"))) == 1


def test_an_unlisted_adapter_does_not_take_the_name_of_a_listed_one(
    open_store: OpenStore, make_folder: MakeFolder
) -> None:
    store = open_store()
    _commit(store, store.stage(make_folder()))
    with pytest.raises(AdapterRefused, match="a listed adapter has this name"):
        store.commit([store.stage(make_folder(seed=1), ttl_s=60)], [None], [0.5], "tester")
