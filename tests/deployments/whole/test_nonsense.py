"""Megabytes of invalid data in every place of every route are refused quickly, in little memory, with API errors."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments.all_routes import APP, example_path
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.asking import error_of
from tests.deployments.console_fakes import CountingWorker, MappedRetriever
from tests.deployments.nonsense import BODY_BYTES, FORMS, VALUES, WHOLE, places_of, resolved
from tests.soak import Scale

MAX_BLOCKED_S = 0.5
MAX_MEMORY_BYTES = 100 << 20
MAX_MESSAGE_CHARS = 1000
QUERY_BYTES = 15_000  # the proxy refuses more
DOCUMENT = APP.openapi()


@dataclass(frozen=True)
class Nonsense:
    """One request. `label`: the kind of invalid data and its place."""

    label: str
    method: str
    path: str
    content: Any  # a function: its 4 MiB are created when it is sent
    kind: str = "application/json"


def operations() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def json_bodies() -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the JSON schema of every body, by method and path."""
    return {
        (method, path): operation["requestBody"]["content"]["application/json"]["schema"]
        for method, path, operation in operations()
        if "requestBody" in operation
    }


def requests_of(method: str, path: str, schema: Mapping[str, Any]) -> Iterator[Nonsense]:
    """Yield each kind of invalid data as the whole body, and in each field of it."""
    asked = example_path(path)
    for kind, value in WHOLE.items():
        yield Nonsense(f"{method} {path}: {kind}", method, asked, lambda value=value: value(BODY_BYTES))
    for place in {place.field: place for place in places_of(schema, DOCUMENT)}.values():
        for kind, value in VALUES.items():
            label = f"{method} {path} {place.field}: {kind}"
            yield Nonsense(label, method, asked, lambda place=place, value=value: place.body(value))


class Watched:
    """The cost of one request: the longest computation on the event loop's thread, and the peak of memory.

    Time is the thread's own CPU time, which does not include other programs.
    """

    blocked_s = 0.0
    peak_bytes = 0

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        async def look() -> None:
            last_s = time.thread_time()
            while True:
                await asyncio.sleep(0)
                now_s = time.thread_time()
                self.blocked_s, last_s = max(self.blocked_s, now_s - last_s), now_s

        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
        before = memory_bytes("VmRSS")
        looking = asyncio.create_task(look())
        await asyncio.sleep(0)
        try:
            yield
        finally:
            await asyncio.sleep(0)
            looking.cancel()
            self.peak_bytes = memory_bytes("VmHWM") - before


@pytest.fixture(autouse=True, scope="module")
def _other_objects_left_alone() -> Iterator[None]:
    """Freeze the objects of other test files once: a replica has few of them, and collecting them is slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def memory_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


async def send(client: httpx.AsyncClient, nonsense: Nonsense) -> tuple[httpx.Response, Watched]:
    content, watched = nonsense.content(), Watched()
    async with watched.watching():
        headers = {"content-type": nonsense.kind}
        response = await client.request(nonsense.method, nonsense.path, content=content, headers=headers)
    assert watched.blocked_s < MAX_BLOCKED_S, (nonsense.label, watched.blocked_s)
    assert watched.peak_bytes < MAX_MEMORY_BYTES, (nonsense.label, watched.peak_bytes)
    if response.status_code >= 400:
        assert len(error_of(response)["message"]) <= MAX_MESSAGE_CHARS, nonsense.label
    return response, watched


def send_all(requests: list[Nonsense], scale: Scale) -> dict[str, int]:
    """Send the requests to one application. Return the status of each by its label."""

    async def run() -> dict[str, int]:
        served, statuses = serve_plainly(worker=CountingWorker(), retriever=MappedRetriever()), {}
        blocked_s = peak_bytes = 0.0
        async with http_of(served) as client:
            await served.services.preload.wait()
            for nonsense in requests:
                response, watched = await send(client, nonsense)
                statuses[nonsense.label] = response.status_code
                blocked_s, peak_bytes = max(blocked_s, watched.blocked_s), max(peak_bytes, watched.peak_bytes)
        assert served.services.bodies.num_bytes == 0
        scale.record("event loop blocked at most, s", blocked_s)
        scale.record("more memory at most, MiB", peak_bytes / (1 << 20))
        return statuses

    return asyncio.run(run())


def test_nonsense_in_every_field_of_every_body_is_refused_quickly_in_little_memory(scale: Scale) -> None:
    bodies = json_bodies()
    requests = [each for key, schema in bodies.items() for each in requests_of(*key, schema)]
    assert len(bodies) == 27
    assert len(WHOLE) == 29 and len(VALUES) == 22
    num_sent = scale.pick("bodies of 4 MiB", small=100, full=len(requests))
    assert len(requests) > 3000
    chosen = requests[:: max(1, len(requests) // num_sent)]
    statuses = send_all(chosen, scale)
    assert len(statuses) == len(chosen)
    # A long text is a prompt, a long fraction a number, and candidates of a plan and unknown fields are not read.
    accepted = [label for label, status in statuses.items() if status not in (400, 413)]
    tolerant = r"(completions|embeddings|responses|tokenize|messages|count_tokens) .*unknown:"
    tolerant += r"|(embeddings|responses) (model|input|text)"
    allowed = rf" prompt|candidates|{tolerant}|: a fraction$"
    assert all(re.search(allowed, label) for label in accepted), accepted


@pytest.mark.parametrize("kind", ["few numbers", "few keys", "few texts", "many numbers", "deep lists", "a number"])
def test_each_body_refuses_the_worst_kinds(kind: str, scale: Scale) -> None:
    requests = [
        Nonsense(f"{method} {path}", method, example_path(path), lambda: WHOLE[kind](BODY_BYTES))
        for method, path in json_bodies()
    ]
    assert send_all(requests, scale) == {request.label: 400 for request in requests}


def test_nonsense_in_an_upload_is_refused_quickly_in_little_memory(scale: Scale) -> None:
    kind = "multipart/form-data; boundary=b"
    requests = [
        Nonsense(name, "POST", "/v1/loras", lambda form=form: form(BODY_BYTES), kind) for name, form in FORMS.items()
    ]
    assert len(requests) == 13
    assert set(send_all(requests, scale).values()) == {400}


def test_nonsense_in_an_address_is_answered_quickly(scale: Scale) -> None:
    requests, num_parameters = [], 0
    for method, path, operation in operations():
        if method != "GET":
            continue
        names = [parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "query"]
        num_parameters += len(names)
        for name in [*names, "unknown"]:
            for query in (f"{name}=" + "9" * QUERY_BYTES, f"{name}=9&" * (QUERY_BYTES // (len(name) + 3))):
                address = f"{example_path(path)}?{query}"
                requests.append(Nonsense(f"{path} {name} {len(query)}", method, address, bytes))
        many = "&".join(f"{number}=" for number in range(3000))
        requests.append(Nonsense(f"{path} many", method, f"{example_path(path)}?{many}", bytes))
    assert num_parameters == 28 and len(requests) > 40
    assert max(send_all(requests, scale).values()) < 500


def unbounded(schema: Mapping[str, Any], seen: set[str], where: str) -> Iterator[str]:
    """Yield the parts of a schema that allow any number of items, keys or characters."""
    if "$ref" in schema:
        if schema["$ref"] in seen:
            return
        seen.add(schema["$ref"])
        where = schema["$ref"].rpartition("/")[2]
    schema = resolved(schema, DOCUMENT)
    for inner in schema.get("anyOf", []):
        yield from unbounded(inner, seen, where)
    kind = schema.get("type")
    if kind == "string" and not schema.keys() & {"maxLength", "enum", "const", "pattern", "format"}:
        yield f"{where}: a text"
    if kind == "array":
        if "maxItems" not in schema:
            yield f"{where}: a list"
        yield from unbounded(schema.get("items", {}), seen, f"{where}[]")
    if kind == "object":
        if "properties" not in schema and "maxProperties" not in schema and schema.get("additionalProperties", True):
            yield f"{where}: an object"
        for name, inner in schema.get("properties", {}).items():
            yield from unbounded(inner, seen, f"{where}.{name}")
        if isinstance(schema.get("additionalProperties"), Mapping):
            yield from unbounded(schema["additionalProperties"], seen, f"{where}.*")


def test_the_document_bounds_every_list_object_and_text() -> None:
    found: list[str] = []
    num_schemas = 0
    for method, path, operation in operations():
        schemas = [kind["schema"] for kind in operation.get("requestBody", {}).get("content", {}).values()]
        schemas += [given["schema"] for given in operation.get("parameters", []) if given["in"] == "query"]
        for schema in schemas:
            num_schemas += 1
            found += unbounded(schema, set(), f"{method} {path}")
    assert num_schemas == 59
    assert found == []
