"""`loraretriever publish`: send many folders in few requests, and retry those that the server had no room for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.progress import track

from deployments.cli.client import (
    DEFAULT_URL,
    Json,
    Url,
    client_of,
    err,
    fail,
    has_key,
    is_this_machine,
    message_of,
    out,
    print_json,
    show_error,
)
from deployments.json_types import JsonObject
from deployments.publishing.adapter_folders import adapter_files, adapter_folders, linked_files, open_plain

commands = typer.Typer()
_BATCH = 64
_REQUESTS_AT_ONCE = 2
_PAUSES_S = (1.0, 2.0, 4.0)
_UNAVAILABLE = 503
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")  # the name that transformers' Trainer gives
Answered = tuple[Path, JsonObject]  # a folder, and the status with the error or the result


@dataclass(frozen=True, slots=True)
class FolderPublisher:
    """Publishes folders through one client. `fields`: the name, tags, template and visibility that were given."""

    client: httpx.Client
    fields: JsonObject
    sleep: Callable[[float], None] = time.sleep

    def by_path(self, folders: Sequence[Path]) -> Iterator[Answered]:
        """Let the server read the folders, many per commit, with up to two requests at once."""
        batches = [folders[start : start + _BATCH] for start in range(0, len(folders), _BATCH)]
        pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE)
        try:
            for answered in pool.map(lambda batch: list(self._until_done(batch, self._post_paths)), batches):
                yield from answered
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupted command stops sending

    def by_upload(self, folders: Sequence[Path]) -> Iterator[Answered]:
        """Send the files of the folders, one folder per request."""
        for folder in folders:
            yield from self._until_done([folder], self._post_files)

    def _until_done(
        self, folders: Sequence[Path], post: Callable[[Sequence[Path]], Sequence[JsonObject]]
    ) -> Iterator[Answered]:
        """Yield the last answer for every folder. Folders that got a 503 are sent again after a pause."""
        for pause_s in (*_PAUSES_S, None):
            answered = list(zip(folders, post(folders), strict=True))
            again = [folder for folder, answer in answered if answer["status"] == _UNAVAILABLE and pause_s is not None]
            yield from ((folder, answer) for folder, answer in answered if folder not in again)
            if not again or pause_s is None:
                return
            self.sleep(pause_s)
            folders = again

    def _post_paths(self, folders: Sequence[Path]) -> list[JsonObject]:
        adapters = [{"path": str(folder.resolve()), **self.fields} for folder in folders]
        response = self.client.post("/v1/loras", json={"adapters": adapters})
        if response.is_error:
            return [_refusal(response)] * len(folders)
        answers: list[JsonObject] = response.json()["data"]
        return answers

    def _post_files(self, folders: Sequence[Path]) -> list[JsonObject]:
        [folder] = folders
        if links := linked_files(folder):
            return [{"status": 400, "error": {"message": _link_message(links[0])}}]
        paths = adapter_files(folder)
        if not paths:
            return [
                {"status": 404, "error": {"message": "no adapter here: a folder with adapter_config.json is needed"}}
            ]
        with ExitStack() as opened:
            files = [("files", (path.name, opened.enter_context(open_plain(path)))) for path in paths]
            data = {"name": folder.resolve().name, **self.fields}
            response = self.client.post("/v1/loras", files=files, data=data)
        return [_refusal(response) if response.is_error else {"status": response.status_code, **response.json()}]


@commands.command()
def publish(
    folders: Annotated[list[Path], typer.Argument(help="adapter folders, or folders of adapter folders")],
    name: Annotated[str | None, typer.Option(help="name of the adapter; default: name of its folder")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="tag for filtering; repeatable")] = None,
    template: Annotated[str | None, typer.Option(help="prompt template: alpaca or chat")] = None,
    public: Annotated[
        bool | None, typer.Option("--public/--private", help="whether all tenants may use it; default: unchanged")
    ] = None,
    upload: Annotated[bool, typer.Option(help="upload the files even if the server is on this machine")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Publish adapters to a running server."""
    adapters = [adapter for folder in folders for adapter in _adapters_in(folder)]
    if name is not None and len(adapters) != 1:
        raise typer.BadParameter(f"one name cannot be used for {len(adapters)} adapters", param_hint="--name")
    visibility = None if public is None else "public" if public else "private"
    given = {"name": name, "tags": tag, "template": template, "visibility": visibility}
    with client_of(url) as client:
        publisher = FolderPublisher(client, {key: value for key, value in given.items() if value})
        # A server with keys does not read local paths by default.
        by_path = is_this_machine(url) and not upload and not has_key()
        send = publisher.by_path if by_path else publisher.by_upload
        failed = (_report_json if as_json else _report)(send(adapters), len(adapters))
    if failed:
        raise typer.Exit(1)


def _adapters_in(folder: Path) -> list[Path]:
    """Return the adapters in `folder`, or `folder` itself. Exit if they are checkpoints, which would compete."""
    found = adapter_folders(folder)
    steps = {path: _CHECKPOINT.fullmatch(path.name) for path in found if path != folder}
    if not steps or not all(steps.values()):
        return found or [folder]
    last = max(found, key=lambda path: int(path.name.rpartition("-")[2]))
    what = "a checkpoint" if len(found) == 1 else f"{len(found)} checkpoints"
    fail(
        f"{folder}: contains {what} of one training run; publish one under a name of its own: "
        f"loraretriever publish {last} --name {folder.resolve().name}"
    )


def _report_json(answers: Iterable[Answered], total: int) -> int:
    """Print the outcome for all folders as JSON. Return the number of failures."""
    rows = [{"folder": str(folder), **answer} for folder, answer in answers]
    print_json({"data": rows})
    return sum("error" in row for row in rows)


def _report(answers: Iterable[Answered], total: int) -> int:
    """Print the outcome for each folder. Return the number of failures."""
    failed = 0
    for folder, answer in track(answers, "publishing", total, console=err, transient=True, disable=total == 1):
        if "error" in answer:
            failed += 1
            show_error(_named(folder, answer["error"]["message"]))
            continue
        notes = [] if answer["found_by_auto"] else ["by name only: add lora_samples.jsonl or description.txt for auto"]
        if behind := answer["replicas"]["behind"]:
            notes.append(f"{behind} replicas are not up to date yet")
        note = f" ({'; '.join(notes)})" if notes else ""
        out.print(f"{answer['name']} is live at generation {answer['generation']}{note}", markup=False)
    if total > 1 and failed:
        err.print(f"{total - failed} live, {failed} refused", highlight=False)
    return failed


def _named(folder: Path, message: str) -> str:
    """Return the message with the folder in front, unless it names the adapter already."""
    return message if f"adapter {folder.resolve().name!r}" in message else f"{folder}: {message}"


def _link_message(link: Path) -> str:
    return f"{link.name} is a symbolic link, which could point to any file: replace it by a copy of the file"


def _refusal(response: httpx.Response) -> JsonObject:
    return {"status": response.status_code, "error": {"message": message_of(response)}}
