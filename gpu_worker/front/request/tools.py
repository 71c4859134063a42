"""Functions that a model may call, the calls of an answer, and the forms in which models write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

NO_PARAMETERS = '{"type": "object", "properties": {}, "additionalProperties": false}'
"""The schema of a function without parameters."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the client. `parameters`: the JSON schema of its arguments, an object."""

    name: str
    description: str = ""
    parameters: str = NO_PARAMETERS
    strict: bool = False  # its arguments follow the schema also where the model decides whether to call it

    @property
    def as_json(self) -> dict[str, object]:
        """Return the function as chat templates expect it."""
        parameters = json.loads(self.parameters)
        return {"name": self.name, "description": self.description, "parameters": parameters}


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that an answer may call. `required`: it calls at least one; `only`: it calls this one, once.

    `is_parallel`: whether it may call several; None: if the model was trained for that.
    """

    functions: tuple[Function, ...]
    required: bool = False
    only: str | None = None
    is_parallel: bool | None = None

    @property
    def is_forced(self) -> bool:
        """Whether the answer consists of calls."""
        return self.required or self.only is not None

    @property
    def have_grammar(self) -> bool:
        """Whether a grammar ends the answer: it must call, or may call a strict function."""
        return self.is_forced or any(function.strict for function in self.functions)

    @property
    def num_chars(self) -> int:
        """Return about how many characters of the prompt describe the functions."""
        return sum(len(each.name) + len(each.description) + len(each.parameters) for each in self.functions)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function. `arguments`: a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A part of a call. The first part of each call has its id and name; the arguments of all parts belong together."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


def joined_calls(pieces: Iterable[ToolCallPiece]) -> tuple[ToolCall, ...]:
    """Join the pieces of an answer to whole calls."""
    calls: list[ToolCall] = []
    for piece in pieces:
        if piece.id is not None and piece.name is not None:
            calls.append(ToolCall(piece.id, piece.name, piece.arguments))
        else:
            begun = calls[piece.index]
            calls[piece.index] = ToolCall(begun.id, begun.name, begun.arguments + piece.arguments)
    return tuple(calls)


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How one family of models writes calls: `opening`, calls with `separator` between them, `closing`.

    A call is a JSON object with the keys `name` and `arguments_key`. If that is None, the text `before_arguments`, with
    the function's name, comes before an object that is the arguments alone.
    """

    name: str
    marker: str  # begins calls anywhere in an answer
    opening: str  # begins with the marker, unless calls may begin an answer without it
    separator: str
    closing: str
    lead: re.Pattern[str]  # text between the marker and an object
    more: str = ""  # text after an object before which further ones follow without a marker
    end: str = ""  # text after the last object
    arguments_key: str | None = "arguments"
    before_arguments: str = ""
    is_bare: bool = False  # an object that begins an answer is a call
    special: tuple[str, ...] = ()  # markers that may be special tokens, which otherwise have no text


_SPACE = re.compile(r"\s*")
HERMES = ToolForm(
    "hermes",
    marker="<tool_call>",
    opening="<tool_call>\n",
    separator="\n</tool_call>\n<tool_call>\n",
    closing="\n</tool_call>",
    lead=_SPACE,
    end="</tool_call>",
    special=("<tool_call>", "</tool_call>"),
)
MISTRAL = ToolForm(
    "mistral",
    marker="[TOOL_CALLS]",
    opening="[TOOL_CALLS][",
    separator=", ",
    closing="]",
    lead=re.compile(r"\s*\[?\s*"),
    more=",",
    end="]",
    special=("[TOOL_CALLS]",),
)
MISTRAL_ARGS = ToolForm(
    "mistral_args",
    marker="[TOOL_CALLS]",
    opening="[TOOL_CALLS]",
    separator="[TOOL_CALLS]",
    closing="",
    lead=re.compile(r"\s*(?P<name>[A-Za-z0-9_.-]{1,128})\s*(?:\[ARGS\])?\s*"),
    arguments_key=None,
    before_arguments="[ARGS]",
    special=("[TOOL_CALLS]", "[ARGS]"),
)
LLAMA3_JSON = ToolForm(
    "llama3_json",
    marker="<|python_tag|>",
    opening="",
    separator="; ",
    closing="",
    lead=re.compile(r"\s*(?:<\|python_tag\|>)?\s*"),
    more=";",
    arguments_key="parameters",
    is_bare=True,
    special=("<|python_tag|>",),
)
FORMS = (HERMES, MISTRAL, MISTRAL_ARGS, LLAMA3_JSON)
"""All forms, in the order in which a template's own calls are compared with them."""


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How one template and its model handle tools.

    `is_native`: the template writes functions and calls itself; otherwise a system text describes them.
    `has_parallel`: an answer may have several calls even if the client does not ask for that.
    """

    form: ToolForm = HERMES
    is_native: bool = False
    has_parallel: bool = False

    def max_calls(self, tools: Tools) -> int | None:
        """Return the number of calls after which an answer ends, None without a limit."""
        is_parallel = self.has_parallel if tools.is_parallel is None else tools.is_parallel
        return None if is_parallel and tools.only is None and (self.has_parallel or not self.is_native) else 1


DESCRIBED = ToolStyle()
"""The style of templates that know no tools."""
