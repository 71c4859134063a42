"""Calls in an answer, whatever the pieces in which its text arrives."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.front.request.request import FinishReason
from gpu_worker.front.request.tool_parser import MAX_MALFORMED, ToolCallParser, new_call_id
from gpu_worker.front.request.tools import HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS, ToolForm, joined_calls
from tests.gpu_worker.chat_templates import FORM, call, written

NAMES = {"f", "get_weather"}
Found = tuple[str, list[tuple[str, str]], FinishReason | None]
"""Content, (name, arguments) of each call, and why the answer ends."""


def slow(form: ToolForm, text: str, max_calls: int | None = None) -> Found:
    """Return what is in a whole answer."""
    content, calls, at, num_malformed = "", list[tuple[str, str]](), 0, 0
    while max_calls is None or len(calls) < max_calls:
        begin = text.find(form.marker, at) if num_malformed < MAX_MALFORMED else -1
        after_marker = begin + len(form.marker)
        if form.is_bare and at == 0 and re.match(r"\s*\{", text):
            begin, after_marker = 0, text.index("{")
        if begin < 0:
            rest = text[at:]
            is_over = calls and num_malformed < MAX_MALFORMED
            return content + (rest.rstrip() if is_over else rest), calls, "tool_calls" if calls else "stop"
        found = objects_at(form, text, after_marker, None if max_calls is None else max_calls - len(calls))
        if not found:
            num_malformed += 1
            end = after_marker + (
                1 if begin == 0 and text[after_marker : after_marker + 1] == "{" and form.is_bare else 0
            )
            content, at = content + text[at:end], end
            continue
        content += text[at:begin].rstrip()
        calls += [each for each, _ in found]
        at = found[-1][1]
        if max_calls is not None and len(calls) >= max_calls:
            break
        more = re.match(r"\s*" + re.escape(form.more), text[at:]) if form.more else None
        end_of_calls = re.match(r"\s*" + re.escape(form.end), text[at:]) if form.end else None
        if more is not None:  # the text after the separator is content
            num_malformed += 1
            content, at = content + text[at : at + more.end()], at + more.end()
        elif end_of_calls is not None:
            at += end_of_calls.end()
    return content, calls, "tool_calls" if calls else "stop"


def objects_at(form: ToolForm, text: str, at: int, most: int | None) -> list[tuple[tuple[str, str], int]]:
    """Return the calls that begin here, one after the other, each with its end."""
    found: list[tuple[tuple[str, str], int]] = []
    while most is None or len(found) < most:
        if found:
            more = re.compile(r"\s*" + re.escape(form.more)).match(text, at) if form.more else None
            if more is None:
                return found
            at = more.end()
        lead = re.compile(form.lead.pattern + r"(?=\{)").match(text, at)
        if lead is None or len(lead[0]) > 192:
            return found
        try:
            decoder = json.JSONDecoder(strict=False, parse_constant=refuse)
            value, end = decoder.raw_decode(text, lead.end())
        except ValueError:
            return found
        named = lead.groupdict().get("name")
        name = named or value.get("name")
        arguments = value if named else value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments, strict=False, parse_constant=refuse)
            except ValueError:
                return found
        if not isinstance(name, str) or name not in NAMES or not isinstance(arguments, dict):
            return found
        found.append(((name, json.dumps(arguments, ensure_ascii=False)), end))
        at = end
    return found


def refuse(name: str) -> None:
    raise ValueError(name)


def fast(
    form: ToolForm,
    pieces: Iterable[str],
    max_calls: int | None = None,
    *,
    is_constrained: bool = False,
    reason: FinishReason = "stop",
) -> Found:
    """Return what the parser releases for an answer that arrives in these pieces."""
    numbers = itertools.count()
    parser = ToolCallParser(
        form, NAMES, is_constrained=is_constrained, max_calls=max_calls, new_id=lambda: f"id{next(numbers)}"
    )
    content, found = "", []
    for text in pieces:
        more, calls, ending = parser.read(text, None)
        content, found = content + more, [*found, *calls]
        if ending is not None:
            break
    else:
        more, calls, ending = parser.read("", reason)
        content, found = content + more, [*found, *calls]
    whole = joined_calls(found)
    assert [call.id for call in whole] == [f"id{n}" for n in range(len(whole))]
    return content, [(call.name, call.arguments) for call in whole], ending


ONE = '{"city": "Z\u00fcrich \\"{}\\"", "days": [1, {"a": null}]}'


@FORM
def test_calls_are_found_with_the_text_around_them(form: ToolForm) -> None:
    text = written(form, call(form, "f", "{}"), call(form, "get_weather", ONE))
    normal = json.dumps(json.loads(ONE), ensure_ascii=False)
    expected = ("", [("f", "{}"), ("get_weather", normal)], "tool_calls")
    assert fast(form, text) == fast(form, [text]) == slow(form, text) == expected
    if not form.is_bare:
        assert fast(form, [f"I look.\n\n{text}\n"]) == ("I look.", expected[1], "tool_calls")


PARTS = [
    *['{"name": "f", "arguments": {"a": 1}}', '{"name": "f"}', '{"name": "g", "arguments": {}}', '{"a": "}"}'],
    *['{"name": "f", "parameters": {"b": "\\"{"}}', '{"name": "f", "arguments": "{\\"c\\": 2}"}', '{"name": "f", '],
    *["<tool_call>", "</tool_call>", "<tool_", "[TOOL_CALLS]", "[TOOL", "[ARGS]", "<|python_tag|>", "<|py"],
    *["f", "get_weather", "{", "}", '"', "\\", " ", "\n", ",", ";", "[", "]", "x", "NaN", "\u00e4\U0001f600"],
]


@FORM
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), cuts=st.lists(st.integers(0, 200)), one=st.booleans())
def test_the_pieces_of_an_answer_change_nothing(form: ToolForm, parts: list[str], cuts: list[int], one: bool) -> None:
    text, most = "".join(parts), 1 if one else None
    places = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    expected = slow(form, text, most)
    assert fast(form, [text[a:b] for a, b in itertools.pairwise(places)], most) == expected
    assert fast(form, text, most) == expected


@FORM
def test_every_split_of_a_constrained_answer_gives_the_same_calls_and_every_beginning_a_part(form: ToolForm) -> None:
    text = written(form, call(form, "get_weather", ONE), call(form, "f", "{}"))
    expected = ("", [("get_weather", ONE), ("f", "{}")], "tool_calls")
    for cut in range(len(text) + 1):
        assert fast(form, [text[:cut], text[cut:]], is_constrained=True) == expected
        content, calls, reason = fast(form, text[:cut], is_constrained=True, reason="length")
        assert reason == "length" and (not calls or content == "" or calls[0] == expected[1][0])
        for (name, arguments), (whole_name, whole) in zip(calls, expected[1], strict=False):
            assert name == whole_name and whole.startswith(arguments)
        assert [fast(form, text[:cut], is_constrained=True)[2]] in (["tool_calls"], ["stop"])


def test_a_constrained_call_is_released_as_it_arrives() -> None:
    parser = ToolCallParser(HERMES, NAMES, is_constrained=True, new_id=lambda: "i")
    released = [
        parser.read(text, None)[1] for text in ('<tool_call>\n{"name": "f", "arg', 'uments": {"a', '": 1}', "}")
    ]
    shown = [[(piece.index, piece.id, piece.name, piece.arguments) for piece in pieces] for pieces in released]
    assert shown == [[], [(0, "i", "f", ""), (0, None, None, '{"a')], [(0, None, None, '": 1}')], []]


def test_an_incomplete_constrained_call_is_no_reason_to_run_it() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": '
    assert fast(HERMES, [text], is_constrained=True) == ("", [("f", '{"a": ')], "stop")


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "unknown", "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": "{\\"a\\": -1e999}"}',
        '{"name": ["f"], "arguments": {}}',
        '{"name": "f", "arguments": {"a": 1}',
        "{" * 2000 + "}" * 2000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        "no object",
    ],
    ids=lambda call: call[:40],
)
def test_a_malformed_call_is_content(call: str) -> None:
    text = f"So <tool_call>\n{call}\n</tool_call> "
    assert fast(HERMES, text) == (text, [], "stop")


def test_a_call_inside_a_malformed_one_is_found() -> None:
    text = '<tool_call> I mean <tool_call>{"name": "f"}</tool_call>'
    assert fast(HERMES, text) == ("<tool_call> I mean", [("f", "{}")], "tool_calls")


def test_half_a_surrogate_pair_is_escaped() -> None:
    [(_, arguments)] = fast(HERMES, ['<tool_call>{"name": "f", "arguments": {"a": "\\ud800\u00e4"}}'])[1]
    assert arguments.encode() and json.loads(arguments) == {"a": "\ud800\u00e4"}


@pytest.mark.parametrize("reason", [None, "length", "stop"])
def test_the_answer_ends_after_the_last_call_that_is_allowed(reason: FinishReason | None) -> None:
    parser = ToolCallParser(MISTRAL, NAMES, max_calls=1)
    assert parser.read('[TOOL_CALLS][{"name": "f"', None) == ("", (), None)
    text, calls, reason = parser.read('}, {"name": "f"}]', reason)
    assert (text, len(joined_calls(calls)), reason) == ("", 1, "tool_calls")


def test_a_json_answer_of_a_bare_form_is_content_unless_it_names_a_function() -> None:
    assert fast(LLAMA3_JSON, '{"name": "Ann"}') == ('{"name": "Ann"}', [], "stop")
    assert fast(LLAMA3_JSON, 'It is {"name": "f"}') == ('It is {"name": "f"}', [], "stop")
    assert fast(LLAMA3_JSON, '<|python_tag|>{"name": "f"}') == ("", [("f", "{}")], "tool_calls")


def test_a_name_before_the_arguments_may_come_without_their_mark() -> None:
    assert fast(MISTRAL_ARGS, '[TOOL_CALLS]f{"a": 1}')[1] == [("f", '{"a": 1}')]


def test_a_name_before_the_arguments_may_be_as_long_as_anthropics_clients_send() -> None:
    name = "n" * 128
    _, calls, _ = ToolCallParser(MISTRAL_ARGS, {name}).read(f'[TOOL_CALLS]{name}[ARGS]{{"a": 1}}', "stop")
    assert [call.name for call in joined_calls(calls)] == [name]


def test_many_malformed_calls_cost_no_more_than_a_few() -> None:
    text = '<tool_call>{"' * 20_000
    began = time.process_time()
    assert fast(HERMES, [text]) == (text, [], "stop")
    assert time.process_time() - began < 5


def test_ids_differ() -> None:
    ids: Sequence[str] = [new_call_id() for _ in range(100)]
    assert len(set(ids)) == 100 and all(re.fullmatch(r"call_[0-9a-f]{24}", call_id) for call_id in ids)
