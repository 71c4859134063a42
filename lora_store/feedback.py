"""Prompts of clients, with what they said about them: proposed samples, asked prompts, and outcomes.

- *proposed*: a request named this adapter, so its prompt may become a sample. The owner accepts or rejects it.
- *asked*: the prompt of a request to `auto`, kept for a day, so that an outcome can name the request.
- *outcome*: how well an adapter, or the base model, answered such a request.

Each is one small object that replicas write without coordination. The folders are bounded, and the oldest go first. Of
the proposals for an adapter a key can fill only its own `MAX_PER_KEY` places.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Literal

from lora_store.files import Files, StoredFile
from lora_store.location import Location
from lora_store.weights_blob import hash_blob

Kind = Literal["proposed", "asked", "outcome"]
MAX_PER_KEY = 3  # proposals of one key for one adapter
MAX_KEPT: dict[Kind, int] = {
    "proposed": 64,
    "asked": 1000,
    "outcome": 1000,
}  # for each adapter; the others for each tenant
KEPT_FOR: dict[Kind, timedelta] = {"proposed": timedelta(30), "asked": timedelta(1), "outcome": timedelta(30)}
_DELETE_EVERY = timedelta(hours=1)
_TIDY_EVERY = 50  # asked prompts that one process writes
_NUM_READERS = 16
_ID_CHARS = 16
_REJECTED = ".rejected"  # behind the id of a proposal


@dataclass(frozen=True, slots=True)
class Feedback:
    """A prompt, and what a client of the tenant said about it.

    `adapter`: the name of the tenant's adapter for a proposal, `owner/name` for an outcome; None: the base model.
    `score`: of the outcome, from -1 to 1. A rejected proposal has no text.
    """

    id: str
    text: str
    adapter: str | None
    key_id: str
    score: float = 1.0

    @classmethod
    def proposed(cls, text: str, adapter: str, key_id: str) -> Feedback:
        """Return a proposed sample. The same text of the same key has the same id."""
        return cls(f"{_short(key_id)}-{_short(text)}", text, adapter, key_id)

    @classmethod
    def of_request(cls, request_id: str, text: str, adapter: str | None, key_id: str, score: float = 0.0) -> Feedback:
        """Return what is known of a request."""
        return cls(_short(request_id), text, adapter, key_id, score)


class FeedbackFiles:
    """The feedback below `location`, apart for each tenant. Raises: StoreUnavailable."""

    def __init__(self, location: Location) -> None:
        self._files = Files(location)
        self._num_asked = 0
        self._deleted_at: datetime | None = None

    def put(self, tenant: str, kind: Kind, feedback: Feedback, now: datetime) -> None:
        """Store it in place of an earlier one with its id, and drop what is too old, of every tenant, or too much.

        A proposal whose id is kept, or was rejected, changes nothing. Rejected ones are kept apart from those that
        wait, and are dropped by their age or for `MAX_PER_KEY` newer rejected ones of their key.
        """
        folder = _folder(tenant, kind, feedback.adapter)
        name = f"{folder}/{feedback.id}"
        is_rejected = kind == "proposed" and not feedback.text
        if kind == "proposed" and not is_rejected and any(map(self._files.contains, (name, name + _REJECTED))):
            return
        content = json.dumps(asdict(feedback), ensure_ascii=False).encode(errors="replace")
        self._files.write(name + _REJECTED if is_rejected else name, content, durable=kind != "asked")
        if is_rejected:
            self._files.delete([name])
        self._num_asked += kind == "asked"
        if kind != "asked" or self._num_asked % _TIDY_EVERY == 0:
            self._tidy(folder, kind, now)
        if self._deleted_at is None or now - self._deleted_at >= _DELETE_EVERY:
            self._deleted_at = now
            self.delete_old(now)

    def get(self, tenant: str, kind: Kind, id: str) -> Feedback | None:
        """Return the asked prompt or the outcome of this request id, None if there is none."""
        return self._read(f"{_folder(tenant, kind, None)}/{_short(id)}")

    def all(self, tenant: str, kind: Kind, adapter: str | None = None) -> list[Feedback]:
        """Return the proposals for an adapter that wait, or all outcomes of a tenant, newest first."""
        files = self._newest_first(_folder(tenant, kind, adapter))
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            found = pool.map(self._read, [file.name for file in files])
            return [feedback for feedback in found if feedback is not None and feedback.text]

    def delete(self, tenant: str, adapter: str, ids: Collection[str] | None = None) -> None:
        """Delete these proposals for an adapter, or all."""
        names = [file.name for file in self._files.entries(_folder(tenant, "proposed", adapter))]
        self._files.delete([name for name in names if ids is None or name.rpartition("/")[2] in ids])

    def delete_old(self, now: datetime) -> None:
        """Delete all that is kept too long."""
        for kind, age in KEPT_FOR.items():
            self._files.delete([file.name for file in self._files.entries(kind) if file.written_at <= now - age])

    def _tidy(self, folder: str, kind: Kind, now: datetime) -> None:
        files = self._newest_first(folder)
        young = [file for file in files if file.written_at > now - KEPT_FOR[kind]]
        rejected = [file for file in young if file.name.endswith(_REJECTED)]
        waiting = [file for file in young if not file.name.endswith(_REJECTED)]
        wanted = waiting[: MAX_KEPT[kind]]
        if kind == "proposed":
            wanted = [*_first_of_each_key(wanted), *_first_of_each_key(rejected[: MAX_KEPT[kind]])]
        kept = {file.name for file in wanted}
        self._files.delete([file.name for file in files if file.name not in kept])

    def _newest_first(self, folder: str) -> Sequence[StoredFile]:
        files = [file for file in self._files.entries(folder) if not file.name.rpartition("/")[2].startswith(".")]
        return sorted(files, key=lambda file: (file.written_at, file.name), reverse=True)

    def _read(self, name: str) -> Feedback | None:
        """Return the feedback, None if there is none or a power failure left it broken."""
        content = self._files.read(name)
        try:
            return None if content is None else Feedback(**json.loads(content))
        except (ValueError, TypeError):
            return None


def _first_of_each_key(files: Sequence[StoredFile]) -> Iterator[StoredFile]:
    """Yield the first `MAX_PER_KEY` files of each key."""
    counts: Counter[str] = Counter()
    for file in files:
        key = file.name.rpartition("/")[2].partition("-")[0]
        counts[key] += 1
        if counts[key] <= MAX_PER_KEY:
            yield file


def _folder(tenant: str, kind: Kind, adapter: str | None) -> str:
    return f"{kind}/{tenant}/{adapter}" if kind == "proposed" else f"{kind}/{tenant}"


def _short(text: str) -> str:
    return hash_blob(text.encode(errors="replace"))[:_ID_CHARS]
