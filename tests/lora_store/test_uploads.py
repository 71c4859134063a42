from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from lora_store import Location, StoreUnavailable
from lora_store.uploads import Uploads

ONE, OTHER = "0" * 32, "1" * 32


@pytest.fixture
def uploads(store_uri: str) -> Uploads:
    return Uploads(Location(store_uri).child("uploads"))


def test_parts_come_back_in_the_order_of_their_numbers(uploads: Uploads) -> None:
    for number in reversed(range(12)):
        uploads.put(ONE, number, b"%02d" % number)
    uploads.put(ONE, 3, b"03")  # a repeated call
    assert b"".join(uploads.parts(ONE, 24)) == b"000102030405060708091011"


@pytest.mark.parametrize("num_bytes", [3, 9])
def test_missing_parts_are_reported(uploads: Uploads, num_bytes: int) -> None:
    uploads.put(ONE, 0, b"four")
    uploads.put(ONE, 2, b"four")
    with pytest.raises(StoreUnavailable, match="send it again"):
        list(uploads.parts(ONE, num_bytes))


def test_deleting_one_upload_leaves_the_others_until_they_are_old(uploads: Uploads) -> None:
    for upload in (ONE, OTHER):
        uploads.put(upload, 0, b"data")
    uploads.delete([])
    uploads.delete([ONE])
    uploads.delete_old(datetime.now(UTC) - timedelta(hours=1))
    assert list(uploads.parts(OTHER, 4)) == [b"data"]
    uploads.delete_old(datetime.now(UTC) + timedelta(hours=1))
    for upload in (ONE, OTHER):
        with pytest.raises(StoreUnavailable):
            list(uploads.parts(upload, 4))


@pytest.mark.parametrize("upload", ["", "../catalogue", "A" * 32, "0" * 31])
def test_an_id_is_never_a_path(uploads: Uploads, upload: str) -> None:
    with pytest.raises(ValueError, match="not the id of an upload"):
        uploads.put(upload, 0, b"")
