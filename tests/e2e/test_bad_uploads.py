"""Bad uploads over HTTP are refused with their cause, store nothing, and affect no other request.

Every kind is refused by the store in tests/lora_store/test_store_bad_uploads.py. Here a few of them travel.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.bad_uploads import BAD_FOLDERS
from tests.e2e.live import Live


@pytest.fixture(autouse=True)
def unharmed(live: Live) -> Iterator[None]:
    """Check that the store's contents do not change and the server still answers, whatever the test sends."""
    before = live.stored("blobs") | live.stored("catalogue") | live.stored("holds")
    yield
    assert live.stored("blobs") | live.stored("catalogue") | live.stored("holds") == before
    assert live.call("GET", "/ready").status_code == 200
    assert live.text("tiny", max_tokens=2)


def refusal(answer: httpx.Response) -> str:
    """Return the message of an API error."""
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    return message


@pytest.mark.parametrize("kind", list(BAD_FOLDERS)[::12])
def test_a_bad_folder_is_refused_by_its_cause(live: Live, kind: str) -> None:
    bad, folder = BAD_FOLDERS[kind], live.folder(f"bad-{list(BAD_FOLDERS).index(kind)}", 1, "badness")
    bad.spoil(folder)
    by_path = live.call("POST", "/v1/loras", json={"path": str(folder)})
    assert bad.cause in refusal(by_path)
    if bad.travels:
        assert bad.cause in refusal(live.upload(folder))
