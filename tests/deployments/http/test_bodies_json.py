from __future__ import annotations

import json
import time
from typing import Any

import pytest

from deployments.errors import RequestInvalid
from deployments.http.bodies import MAX_JSON_VALUES, read_json


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True], "b": {}},
        "x" * (1 << 20),
        "a,[{" * MAX_JSON_VALUES,
        '",\\"[' * MAX_JSON_VALUES,
        ["[" * MAX_JSON_VALUES, {"{,": ["\\", '"', "\\" * 9]}],
        [0] * (MAX_JSON_VALUES - 2),
    ],
    ids=["small", "a text", "marks", "escapes", "marks in keys", "as many as allowed"],
)
def test_a_body_within_the_bound_is_parsed_like_json(value: Any) -> None:
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(json.dumps(value).encode("utf-16")) == value


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([0] * MAX_JSON_VALUES),
        json.dumps([[] for _ in range(MAX_JSON_VALUES // 2)]),
        json.dumps({str(number): 0 for number in range(MAX_JSON_VALUES)}),
        '["\\"", ' + "{}," * MAX_JSON_VALUES + "1]",
    ],
    ids=["numbers", "lists", "keys", "after an escape"],
)
def test_more_values_are_refused_before_parsing(text: str) -> None:
    with pytest.raises(RequestInvalid, match=f"more than {MAX_JSON_VALUES} JSON values"):
        read_json(text.encode())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON: Expecting value at line 1 column 1"),
        (b'{"a": 1,\n "b"}', "at line 2 column 5"),
        (b'"\xff"', "not utf-8 text: byte 1"),
        (b"9" * 5000, "number that cannot be read"),
        (b"[" * 5000, "nested too deeply"),
        (b'"abc\\', "not valid JSON"),
    ],
)
def test_invalid_json_is_refused_with_the_position(body: bytes, says: str) -> None:
    with pytest.raises(RequestInvalid, match=says):
        read_json(body)


@pytest.mark.parametrize(
    "piece", ['"",', '[,"",', ",\\\\", '"\\\\",'], ids=["strings", "marks", "backslashes", "escapes"]
)
def test_large_bodies_are_counted_quickly(piece: str) -> None:
    """The body is thirty times the server's limit, and the bound is generous for slow machines."""
    body = (piece * (32 * (4 << 20) // len(piece))).encode()
    before = time.process_time()
    with pytest.raises(RequestInvalid, match=f"more than {MAX_JSON_VALUES} JSON values"):
        read_json(body)
    assert time.process_time() - before < 3
