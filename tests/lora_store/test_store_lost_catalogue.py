"""A catalogue that is gone, such as one on a volume that is not mounted, does not become an empty pool."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from lora_store import Location, LoraStore, StoreUnavailable
from lora_store.blobs import BlobStore
from lora_store.errors import StoreDamaged
from lora_store.event_table import create_table
from lora_store.files import Files, StoredFile
from tests.lora_store.builders import BASE, MakeFolder, OpenStore, Stored, embedding
from tests.lora_store.publishing import publish

TWO_HOURS_S = 7200.0


@pytest.mark.parametrize("part", ["catalogue", "catalogue/_delta_log"])
def test_a_lost_catalogue_is_an_error_and_no_blob_is_deleted(
    open_store: OpenStore, location: Location, make_folder: MakeFolder, stored: Stored, part: str
) -> None:
    publish(open_store(), make_folder(), "poet")
    blobs = stored("blobs")
    files = Files(location.child(part))
    files.delete([file.name for file in files.entries()])
    left = stored("catalogue")
    with pytest.raises(StoreDamaged, match=r"_delta_log is missing, but 2 blobs .*mount its volume"):
        open_store()
    assert (stored("blobs"), stored("catalogue")) == (blobs, left)


def test_a_pool_that_another_process_creates_a_moment_earlier_is_no_lost_one(
    location: Location, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = Files.entries

    def rival_first(self: Files) -> list[StoredFile]:
        monkeypatch.setattr(Files, "entries", looks)
        publish(LoraStore(location.uri, accepts_base=[BASE]), make_folder(), "poet")
        return looks(self)

    monkeypatch.setattr(Files, "entries", rival_first)  # the first look is for blobs, where no catalogue was found
    store = LoraStore(location.uri, accepts_base=[BASE])
    assert not store.is_new and len(store.snapshot().records) == 1


def test_only_the_store_that_creates_the_pool_says_that_it_is_new(folder_uri: str, make_folder: MakeFolder) -> None:
    stores = [LoraStore(folder_uri, accepts_base=[BASE]) for _ in range(2)]
    assert [store.is_new for store in stores] == [True, False]
    publish(stores[0], make_folder(), "poet")
    for part in ("blobs", "catalogue"):
        Path(folder_uri, part).rename(Path(folder_uri, f"old-{part}"))
    assert LoraStore(folder_uri, accepts_base=[BASE]).is_new, "without its blobs a location gets a new pool"


@pytest.mark.parametrize("part", ["catalogue", "catalogue/_delta_log"])
def test_a_process_that_runs_then_names_what_is_missing(folder_uri: str, make_folder: MakeFolder, part: str) -> None:
    """It neither writes a new catalogue nor takes the missing one for a rival."""
    store, blobs = LoraStore(folder_uri, accepts_base=[BASE]), BlobStore(Location(folder_uri).child("blobs"))
    published = store.stage(make_folder())
    store.commit([published], [embedding()], [1.0], "me")
    shutil.rmtree(Path(folder_uri, part))
    with pytest.raises(StoreDamaged, match="_delta_log is missing"):
        publish(store, make_folder("coder", 1), "coder")
    with pytest.raises(StoreDamaged, match="_delta_log is missing"):
        store.gc(0)
    assert not Path(folder_uri, "catalogue", "_delta_log").exists()
    assert all(digest in blobs for digest in published.record.blobs)


def test_a_catalogue_younger_than_its_blobs_spares_them(
    folder_uri: str, make_folder: MakeFolder, stored: Stored
) -> None:
    """A release before this one created a new catalogue where the old one was gone."""
    publish(LoraStore(folder_uri, accepts_base=[BASE]), make_folder(), "poet")
    before = time.time() - TWO_HOURS_S
    for file in Path(folder_uri, "blobs").rglob("?" * 64):
        os.utime(file, (before, before))
    shutil.rmtree(Path(folder_uri, "catalogue"))
    create_table(Location(folder_uri).child("catalogue"))
    store = LoraStore(folder_uri, accepts_base=[BASE])
    blobs = stored("blobs")
    with pytest.raises(StoreDamaged, match="created after 2 of the blobs"):
        store.gc(0)
    assert stored("blobs") == blobs
    publish(store, make_folder(), "poet")  # now the catalogue lists them
    assert store.gc(0).num_blobs == 0


def test_a_publish_whose_blobs_another_machine_deletes_is_not_acknowledged(
    store: LoraStore, location: Location, make_folder: MakeFolder
) -> None:
    """The other machine's clock is wrong, so it takes the lease for an expired one."""
    staged = store.stage(make_folder())
    digest = staged.weights_digest
    Files(location.child("blobs")).delete([f"{digest[:2]}/{digest}"])
    with pytest.raises(StoreUnavailable, match=f"1 blobs were deleted .* such as {digest}"):
        store.commit([staged], [embedding()], [1.0], "me")
    again = store.stage(make_folder())
    assert store.commit([again], [embedding()], [1.0], "me") == store.snapshot().generation
    assert {check.problem for check in store.verify()} == {None}
