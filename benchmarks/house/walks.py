"""The six walks: the code of `deployments` that runs for one request, one publish and one command each.

Every walk runs once before it is recorded, so that set-up which happens once per process does not count. The commands
`serve` and `batch` are recorded at once; for them a small object in this process replaces Ray.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest import mock

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray import serve
from typer.testing import CliRunner, Result

from benchmarks.house.application import TOPIC, published_app, served_app
from benchmarks.house.recorder import Recorder, Walk
from deployments.cli import local_server
from deployments.cli.main import cli
from deployments.config.app import AppConfig
from tests.deployments.scripted import scripted

PROMPT = f"Explain {TOPIC}."
_SAMPLING = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
CHAT: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": PROMPT}], **_SAMPLING}


def all_walks(recorder: Recorder, folder: Path) -> dict[str, Walk]:
    """Return each walk under its name."""
    config = published_app(folder)
    walks = asyncio.run(_application_walks(recorder, folder, config))
    settings = _settings_file(folder, config)
    walks["`loraretriever publish` (client side)"] = _publish_command(recorder, folder)
    walks["`loraretriever serve`"] = _serve_command(recorder, settings)
    walks["`loraretriever batch`"] = _batch_command(recorder, folder, settings)
    return walks


async def _application_walks(recorder: Recorder, folder: Path, config: AppConfig) -> dict[str, Walk]:
    walks = {}
    async with served_app(config) as (ingress, client):
        for _ in range(2):
            with recorder.recording():
                response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            assert "[DONE]" in response.text, response.text
        walks["chat over HTTP, streamed, adapters resident"] = recorder.walk
        for name in ("first", "second"):
            with recorder.recording():
                response = await client.post("/v1/loras", files=_upload(folder / "new"), data={"name": name})
                await ingress.services.background.idle()
            assert response.status_code == 201, response.text
        walks["publish, HTTP upload"] = recorder.walk
        for _ in range(2):
            with recorder.recording():
                answer = await ingress.generate(CHAT)
            assert answer["choices"], answer
        walks["handle call `generate`"] = recorder.walk
    return walks


def _upload(adapter: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (path.name, path.read_bytes())) for path in sorted(adapter.iterdir())]


def _settings_file(folder: Path, config: AppConfig) -> Path:
    changed = config.model_dump(mode="json", exclude_defaults=True)
    path = folder / "settings.yaml"
    path.write_text(json.dumps(changed))  # JSON is YAML
    return path


def _invoke(recorder: Recorder, *arguments: object) -> Walk:
    with recorder.recording():
        result: Result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return recorder.walk


def _publish_command(recorder: Recorder, folder: Path) -> Walk:
    row = {"status": 201, "name": "new", "generation": 2, "found_by_auto": True, "replicas": {"ready": 1, "behind": 0}}
    with scripted((201, row)) as server:
        return _invoke(recorder, "publish", folder / "new", "--upload", "--url", server.url)


def _serve_command(recorder: Recorder, settings: Path) -> Walk:
    ready = {"status": "ready", "num_adapters": 1, "refused": {}}
    handle = mock.MagicMock()
    handle.started.remote.return_value.result.return_value = ready
    with ExitStack() as patches:
        for target, name, value in (
            (ray, "init", None),
            (ray, "is_initialized", False),
            (serve, "start", None),
            (serve, "run", None),
            (serve, "get_app_handle", handle),
            (httpx, "get", httpx.Response(200, json=ready)),
            (local_server, "SimpleQueue", None),  # of signals: reading it ends at once
        ):
            patches.enter_context(mock.patch.object(target, name, return_value=value))
        return _invoke(recorder, "serve", "--config", settings, "--port", 0)


def _batch_command(recorder: Recorder, folder: Path, settings: Path) -> Walk:
    rows = pa.table({"prompt": [PROMPT, PROMPT], "max_tokens": [4, 4], "temperature": [0.0, 0.0]})
    pq.write_table(rows, folder / "in.parquet")
    from_items = mock.patch.object(ray.data, "from_items", lambda items, **_: LocalDataset(items))
    with mock.patch.object(ray, "init"), mock.patch.object(ray, "shutdown"), from_items:
        return _invoke(recorder, "batch", folder / "in.parquet", folder / "out", "--config", settings)


@dataclass(frozen=True, slots=True)
class LocalDataset:
    """Replaces a dataset of Ray Data: applies each stage in this process."""

    rows: Iterable[dict[str, Any]]

    def map(self, stage: type, *, fn_constructor_args: tuple[Any, ...], **_: object) -> Self:
        return type(self)(_applied(stage(*fn_constructor_args), self.rows))

    def iter_batches(self, **_: object) -> Iterator[pa.Table]:
        for row in self.rows:
            yield pa.Table.from_pylist([row])


def _applied(stage: Any, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    with asyncio.Runner() as runner:
        for row in rows:
            made = stage(row)
            yield runner.run(made) if inspect.iscoroutine(made) else made
