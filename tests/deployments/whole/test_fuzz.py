"""Malformed requests break nothing: no server error, no hang, nothing left behind, and no harm to good requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_worker.model.base_model import BaseModel
from tests.deployments.real_engine import HttpFront, open_front
from tests.soak import Scale

PATIENCE_S = 120  # only a failing test waits this long
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "auto",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
        "min_tokens": 0,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 1,
        "stop": ["x"],
        "stop_token_ids": [3],
        "stream": False,
        "stream_options": {"include_usage": True},
        "n": 1,
        "user": "u",
        "timeout_s": 60,
        "lora": {"k": 2, "strategy": "mixture", "filter": {"tags": ["a"]}, "explain": True},
    },
    "/v1/completions": {"model": "poet", "prompt": "Hi", "max_tokens": 2, "stream": True, "ignore_eos": True},
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "instructions": "Be brief",
        "max_output_tokens": 2,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}},
        "include": ["message.output_text.logprobs"],
        "stream": True,
    },
    "/v1/route": {"prompt": ["Hi"], "lora": {"adapters": [{"name": "poet", "weight": 0.5}]}},
    "/v1/embeddings": {"model": "multilingual-e5-small-tasks", "input": ["Hi"], "encoding_format": "base64"},
    "/v1/loras": {"path": "/nowhere/novel", "name": "novel", "tags": ["a"], "template": "chat"},
    "/v1/loras/poet/rollback": {"digest": "0123456789"},
    "/v1/load_lora_adapter": {"lora_name": "novel", "lora_path": "/nowhere/novel"},
    "/v1/unload_lora_adapter": {"lora_name": "nobody"},
    "/v1/pool/gc": {"retention_s": 1},
}
PATHS = [*BODIES, "/v1/models", "/v1/models/poet", "/v1/loras/poet", "/health", "/ready", "/", "/v1/nothing"]


@dataclass(frozen=True)
class Malformed:
    """One request, and after how many turns of the event loop its client leaves, if it does."""

    method: str
    path: str
    content: bytes
    headers: Mapping[str, str]
    in_pieces: bool = False
    leaves_after: int | None = None


_text = st.text(st.characters(exclude_categories=()), max_size=12)  # includes half surrogate pairs
_odd_numbers = st.sampled_from([0, -1, 2**31, 2**63, 2**64, -(2**64), 10**400, 1e308, -0.0, 5e-324])
_leaf = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    _odd_numbers,
    st.floats(),
    _text,
    st.sampled_from(["auto", "", "\0", "../x"]),
)
_junk = st.recursive(_leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=3))


_body_paths = st.sampled_from(sorted(BODIES) + ["/v1/chat/completions"] * 8 + ["/v1/completions", "/v1/route"] * 4)
_methods = st.sampled_from(["POST"] * 20 + ["GET", "PUT", "DELETE", "PATCH", "HEAD"])


def _encode(body: object) -> bytes:
    return json.dumps(body).encode()  # NaN, Infinity and half surrogate pairs in Python's form


@st.composite
def _mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return a valid body with one field replaced, removed or added, at any depth."""
    path = draw(_body_paths)
    body: Any = json.loads(json.dumps(BODIES[path]))
    place = body
    while isinstance(place, dict | list) and place:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], dict | list) and place[key] and draw(st.booleans())):
            break
        place = place[key]
    change = draw(st.sampled_from(["replace", "remove", "add"]))
    if change == "remove":
        del place[key]
    elif change == "add" and isinstance(place, dict):
        place[draw(_text)] = draw(_junk)
    else:
        place[key] = draw(_junk)
    return path, _encode(body)


_cut = _body_paths.flatmap(lambda path: st.integers(0, 60).map(lambda end: (path, _encode(BODIES[path])[:end])))
_nested = st.builds(
    lambda path, mark, depth: (path, mark * depth),
    _body_paths,
    st.sampled_from([b"[", b'{"lora":', b'{"messages":[', b"[[", b"9", b"-", b"1e", b'"\\ud800']),
    st.sampled_from([1, 100, 5_000, 100_000]),
)
_multipart = st.builds(
    lambda lines: ("/v1/loras", b"\r\n".join(lines)),
    st.lists(
        st.sampled_from(
            [
                b"--b",
                b"--b--",
                b'Content-Disposition: form-data; name="files"; filename="x"',
                b'Content-Disposition: form-data; name="name"',
                b"Content-Disposition: form-data",
                b"Content-Transfer-Encoding: base64",
                b"",
                b"novel",
                b"\xff\x00",
            ]
        ),
        max_size=12,
    ),
)
_raw = st.tuples(st.sampled_from(PATHS), st.binary(max_size=80) | _junk.map(_encode))
_kinds = st.sampled_from(
    [
        "application/json",
        "application/json; charset=utf-16",
        "text/plain",
        "",
        "multipart/form-data",
        "multipart/form-data; boundary=b",
        "application/x-www-form-urlencoded",
    ]
)


@st.composite
def malformed(draw: st.DrawFn) -> Malformed:
    path, content = draw(st.one_of(_mutated(), _mutated(), _cut, _nested, _multipart, _raw))
    if path == "/v1/loras" and b"--b" in content:
        kind = "multipart/form-data; boundary=b"
    else:
        kind = draw(st.one_of(st.just("application/json"), _kinds))
    odd = draw(
        st.sampled_from(["", "", "", "", "/", "/%00", "/%ff%fe", "/..%2f..%2fx", "?a=b&a=%ff", "/" + "x" * 3000])
    )
    return Malformed(
        method=draw(_methods),
        path=path + odd,
        content=content,
        headers={"content-type": kind} if kind else {},
        in_pieces=draw(st.booleans()),
        leaves_after=draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, 40))),
    )


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    half = len(content) // 2
    yield content[:half]
    await asyncio.sleep(0)
    yield content[half:]


async def _send(front: HttpFront, request: Malformed) -> None:
    content = _pieces(request.content) if request.in_pieces else request.content
    sending = asyncio.create_task(
        front.client.request(request.method, request.path, content=content, headers=request.headers)
    )
    if request.leaves_after is not None:
        for _ in range(request.leaves_after):
            await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait([sending])
        return
    response = await sending
    if response.status_code >= 500:
        assert response.json()["error"]["code"] == "deadline_exceeded", (response.status_code, response.text)
        assert b"timeout_s" in request.content
    elif response.status_code >= 400 and request.method != "HEAD":
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        assert "internal_error" not in response.text


async def _send_beside_good_ones(front: HttpFront, request: Malformed) -> None:
    _, texts = await asyncio.wait_for(asyncio.gather(_send(front, request), front.ask_good()), PATIENCE_S)
    assert texts == front.quiet


@pytest.fixture(scope="module")
def front(tiny_base: Callable[..., BaseModel], tiny_folders: Mapping[str, Path]) -> Any:
    with open_front(tiny_base, tiny_folders["gemma3"]) as opened:
        yield opened


def test_malformed_requests_break_nothing_and_leave_nothing(scale: Scale, front: HttpFront) -> None:
    before = front.held()

    @settings(
        max_examples=scale.pick("malformed requests", small=40, full=1000),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(malformed())
    def holds(request: Malformed) -> None:
        front.runner.run(_send_beside_good_ones(front, request))

    holds()
    assert front.held() == before
    assert front.runner.run(front.ask_good()) == front.quiet


def test_clients_that_leave_at_any_moment_leave_nothing(scale: Scale, front: HttpFront) -> None:
    """Valid requests, whole and streamed, are cancelled after each number of turns of the event loop."""
    before = front.held()
    count = scale.pick("clients that leave", small=30, full=300)
    for number in range(count):
        path = ("/v1/chat/completions", "/v1/completions")[number % 2]
        body = BODIES[path] | {"max_tokens": 60, "ignore_eos": True, "stream": number % 3 == 0, "stop": []}
        body.pop("stop_token_ids", None)
        request = Malformed("POST", path, _encode(body), {"content-type": "application/json"}, False, number * 3)
        front.runner.run(_send_beside_good_ones(front, request))
    assert front.held() == before
