"""Bad uploads over HTTP are refused with their cause, store nothing, and affect no other request.

Every kind is refused by the store in tests/lora_store/test_store_bad_uploads.py. Here a few of them travel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.bad_uploads import BAD_FOLDERS, BAD_LABELS
from tests.e2e.live import Live

_BAD_FILE_NAMES = ("../adapter_config.json", "a/b", "..", "a\\b", "/etc/passwd")
_FIELDS = {"name", "tags", "template"}  # the API's fields of a label


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


@pytest.mark.parametrize("kind", [kind for kind, bad in BAD_LABELS.items() if set(bad.label) <= _FIELDS][::4])
def test_a_bad_label_is_refused(live: Live, kind: str) -> None:
    folder = live.folder("good", 1, "goodness")
    assert refusal(live.call("POST", "/v1/loras", json={"path": str(folder), **BAD_LABELS[kind].label}))


@pytest.mark.parametrize("name", _BAD_FILE_NAMES)
def test_a_file_name_that_is_a_path_is_refused(live: Live, name: str) -> None:
    folder = live.folder("good", 1, "goodness")
    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    answer = live.call("POST", "/v1/loras", files=[*files, ("files", (name, b"{}"))], data={"name": "good"})
    assert "must be a plain name" in refusal(answer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        json.dumps({"path": 7}).encode(),
        json.dumps({"path": "/nowhere"}).encode(),
        json.dumps({"path": "/tmp", "source": "s3://x/y"}).encode(),
        json.dumps({"source": "file:///etc"}).encode(),
        json.dumps({"source": "http://127.0.0.1/adapter"}).encode(),
        json.dumps({"adapters": []}).encode(),
        json.dumps({"adapters": [{"path": "/nowhere"}] * 257}).encode(),
        json.dumps({"path": "/nowhere", "colour": "red"}).encode(),
    ],
    ids=lambda body: body[:40].decode(),
)
def test_a_body_that_names_no_adapter_is_refused(live: Live, body: bytes) -> None:
    answer = live.call("POST", "/v1/loras", content=body, headers={"content-type": "application/json"})
    assert refusal(answer)
