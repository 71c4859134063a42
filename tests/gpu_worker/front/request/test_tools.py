"""Functions, calls and the limits of their number."""

from __future__ import annotations

import pytest

from gpu_worker.front.request.tools import (
    DESCRIBED,
    HERMES,
    NO_PARAMETERS,
    Function,
    ToolCall,
    ToolCallPiece,
    Tools,
    ToolStyle,
    joined_calls,
)

F, G = Function("f"), Function("get", "Return it", '{"type": "object"}')


def test_pieces_are_joined_in_the_order_of_their_calls() -> None:
    pieces = [
        ToolCallPiece(0, "", "a", "f"),
        ToolCallPiece(0, "{"),
        ToolCallPiece(0, "}"),
        ToolCallPiece(1, "", "b", "g"),
        ToolCallPiece(1, '{"x": 1}'),
    ]
    assert joined_calls(pieces) == (ToolCall("a", "f", "{}"), ToolCall("b", "g", '{"x": 1}'))
    assert joined_calls([]) == ()


def test_the_size_of_tools_is_that_of_their_texts() -> None:
    assert Tools((F, G)).num_chars == len("f" + NO_PARAMETERS + "get" + "Return it") + len('{"type": "object"}')


@pytest.mark.parametrize(
    ("style", "tools", "expected"),
    [
        (DESCRIBED, Tools((F,)), 1),
        (DESCRIBED, Tools((F,), is_parallel=True), None),
        (ToolStyle(HERMES, is_native=True, has_parallel=True), Tools((F,)), None),
        (ToolStyle(HERMES, is_native=True, has_parallel=True), Tools((F,), is_parallel=False), 1),
        (ToolStyle(HERMES, is_native=True, has_parallel=True), Tools((F,), required=True, only="f"), 1),
        (ToolStyle(HERMES, is_native=True, has_parallel=False), Tools((F,), is_parallel=True), 1),
    ],
)
def test_an_answer_has_several_calls_if_client_and_template_can_have_them(
    style: ToolStyle, tools: Tools, expected: int | None
) -> None:
    assert style.max_calls(tools) == expected
