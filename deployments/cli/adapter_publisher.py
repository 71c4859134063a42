"""Send many adapters in few requests, and send again what met a full server or a limit of the key."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Event
from typing import BinaryIO

import httpx

from deployments.cli.client import find_message, find_param, find_wait
from deployments.cli.output import counted, describe_problem, err
from deployments.json_types import JsonObject
from deployments.publishing.adapter_folders import adapter_files, linked_files

_BATCH = 64
_REQUESTS_AT_ONCE = 2
_MAX_PAUSE_S = 4.0  # unless the server asks for more
_RETRIES = {429: 30, 503: 3}  # a limit of the key passes, unless others use all of it
_WAIT = "wait_s"  # the field of a refusal that says how long to wait before the next try
SAMPLES_FILE = "lora_samples.jsonl"
_ENTRY = re.compile(r"^adapters\.([0-9]+)(?:[.:] ?|$)")  # how the server names an entry of a request, before its field
SOURCE = re.compile(r"(?:[a-z0-9]+://|runs:/|models:/)")


@dataclass(frozen=True, slots=True)
class Item:
    """One adapter to publish: a folder, or a URI that the server reads. `name`: if it is not the server's default.

    `fields`: its own description, before the one of the command. `samples`: a training file whose samples are uploaded
    instead of the folder's own. It is read when the folder is sent, because the samples of many take much memory.
    """

    place: Path | str
    name: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)
    samples: Path | None = None

    @property
    def is_source(self) -> bool:
        return isinstance(self.place, str)

    @property
    def label(self) -> str:
        """The adapter's name, or the URI of a source whose name the server chooses."""
        if self.name is not None:
            return self.name
        return self.place if isinstance(self.place, str) else self.place.resolve().name

    def as_json(self) -> JsonObject:
        where = {"source": self.place} if isinstance(self.place, str) else {"path": str(self.place.resolve())}
        return where if self.name is None else where | {"name": self.name}


Answered = tuple[Item, JsonObject]  # an item, and the status with the error or the result


@dataclass(frozen=True, slots=True)
class AdapterPublisher:
    """Publishes adapters through one client.

    `fields`: the name, tags, template, contract, visibility and samples that were given; an empty one clears.
    `params`: of every request. `sent`: is called with the size of each part of a file as it is uploaded.
    """

    client: httpx.Client
    fields: JsonObject
    params: dict[str, str]
    sent: Callable[[int], object] = lambda _: None
    sleep: Callable[[float], object] | None = None  # default: wait, unless the command is interrupted
    interrupted: Event = field(default_factory=Event)

    def by_path(self, items: Sequence[Item]) -> Iterator[Answered]:
        """Let the server read the folders and sources, many per commit, with up to two requests at once.

        A folder with other samples is uploaded.
        """
        yield from self.by_upload([item for item in items if item.samples is not None])
        items = [item for item in items if item.samples is None]
        batches = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
        pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE)
        try:
            for answered in pool.map(lambda batch: list(self._until_done(batch, self._post_places)), batches):
                yield from answered
        except BaseException:
            self.interrupted.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupted command stops sending

    def by_upload(self, items: Sequence[Item]) -> Iterator[Answered]:
        """Send the files of the folders, one folder per request. The server reads sources itself."""
        for item in items:
            yield from self._until_done([item], self._post_places if item.is_source else self._post_files)

    def _until_done(
        self, items: Sequence[Item], post: Callable[[Sequence[Item]], Sequence[JsonObject]]
    ) -> Iterator[Answered]:
        """Yield the last answer for every item. Items that got a 429 or a 503 are sent again after a pause."""
        times: Counter[int] = Counter()
        for attempt in count():
            answered = list(zip(items, post(items), strict=True))
            wait_s = max(answer.pop(_WAIT, 0.0) for _, answer in answered)
            times.update({answer["status"] for _, answer in answered})
            passing = {status for status, retries in _RETRIES.items() if times[status] <= retries}
            again = [item for item, answer in answered if answer["status"] in passing]
            yield from ((item, answer) for item, answer in answered if item not in again)
            if not again:
                return
            (self.sleep or self.interrupted.wait)(max(wait_s, min(2.0**attempt, _MAX_PAUSE_S)))
            if self.interrupted.is_set():
                return
            items = again

    def _post_places(self, items: Sequence[Item]) -> list[JsonObject]:
        """Let the server read these places. If it refuses the request for one entry, send the others again."""
        adapters = [item.as_json() | self.fields | dict(item.fields) for item in items]
        response = self.client.post("/v1/loras", json={"adapters": adapters}, params=self.params)
        if not response.is_error:
            answers: list[JsonObject] = response.json()["data"]
            return answers
        named = _ENTRY.match(find_param(response) or "")
        place = int(named[1]) if named else len(items)
        if place >= len(items):
            return [_read_refusal(response) for _ in items]
        others = [*items[:place], *items[place + 1 :]]
        answers = self._post_places(others) if others else []
        return [*answers[:place], _read_refusal(response), *answers[place:]]

    def _post_files(self, items: Sequence[Item]) -> list[JsonObject]:
        try:
            return [self._post_folder(item) for item in items]
        except OSError as exc:
            return [_refusal(400, describe_problem(exc))]

    def _post_folder(self, item: Item) -> JsonObject:
        """Upload the folder and return the server's answer. Raises: OSError if a file cannot be read."""
        folder = Path(item.place)
        if links := linked_files(folder):
            remedy = "could point to any file: replace it by a copy of the file"
            return _refusal(400, f"{links[0].name} is a symbolic link, which {remedy}")
        paths = adapter_files(folder)
        if not paths:
            return _refusal(404, "no adapter here: a folder with adapter_config.json is needed")
        try:
            samples = None if item.samples is None else samples_from(item.samples)
        except ValueError as exc:
            return _refusal(400, str(exc))
        with ExitStack() as opened:
            files = {path.name: opened.enter_context(_Counted(path, self.sent)) for path in paths}
            parts: list[tuple[str, tuple[str, BinaryIO]]] = [("files", (name, file)) for name, file in files.items()]
            if samples is not None:
                parts = [part for part in parts if part[1][0] != SAMPLES_FILE]
                parts.append(("files", (SAMPLES_FILE, io.BytesIO(samples))))
            given = {**self.fields, **item.fields}
            fields = {key: value if value != [] else "" for key, value in given.items()}  # a form has no lists
            if "contract" in given:
                fields["contract"] = json.dumps(given["contract"], ensure_ascii=False)
            data = {"name": item.name or folder.resolve().name, **fields}
            response = self.client.post("/v1/loras", files=parts, data=data, params=self.params)
        if response.is_error:
            return _read_refusal(response)
        return {"status": response.status_code, **response.json()}


class _Counted(io.FileIO):
    """A file that reports how much of it was read. It follows no link."""

    def __init__(self, path: Path, sent: Callable[[int], object]) -> None:
        super().__init__(path, opener=open_without_links)
        self._sent = sent

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size) or b""
        self._sent(len(data))
        return data


def open_without_links(path: str, flags: int) -> int:
    """Open as `os.open`, but follow no symbolic link. Raises: OSError."""
    return os.open(path, flags | os.O_NOFOLLOW)


def _refusal(status: int, message: str) -> JsonObject:
    return {"status": status, "error": {"message": message}}


def _read_refusal(response: httpx.Response) -> JsonObject:
    """Return the refusal, without the number of an entry, and the pause that the server asks for."""
    message = _ENTRY.sub("", find_message(response))
    return _refusal(response.status_code, message) | {_WAIT: find_wait(response)}


def samples_from(file: Path) -> bytes:
    """Return the samples of a training file as a samples file. Raises: ValueError if there are none."""
    from lora_store import FileRefused, Limits  # torch takes seconds to import
    from lora_store.sample_files import write_samples
    from lora_store.training_files import training_samples

    try:
        samples = training_samples(file, Limits())
    except FileRefused as exc:
        raise ValueError(f"{file}: {exc.problems[0]}") from exc
    err.print(
        f"{counted(len(samples), 'sample')} from {file}", style="dim", markup=False, highlight=False, soft_wrap=True
    )
    return write_samples(samples)
