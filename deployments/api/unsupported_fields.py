"""Fields of the OpenAI API that this server knows and does not serve: refused by name, never taken for a typing error.

What asks for nothing (a default that clients send along) is taken as unset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

UNSUPPORTED = "unsupported"  # the type of such a pydantic error, and the code of its answer

# Each field with the values that ask for nothing.
OF_BOTH: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "store": (False,),  # nothing is kept, so that nothing could be asked for later
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}
OF_CHAT: dict[str, tuple[Any, ...]] = OF_BOTH | {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
OF_COMPLETIONS: dict[str, tuple[Any, ...]] = OF_BOTH | {"echo": (False,), "suffix": ("",), "best_of": (1,)}
OF_MESSAGES: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "refusal": (),
    "annotations": ([],),
}
ROLES = ("tool", "function")
PARTS = ("image_url", "image", "input_audio", "audio", "file", "video_url", "refusal")


def without_unsupported(data: Any, known: Mapping[str, tuple[Any, ...]]) -> Any:
    """`data` without the fields that ask for nothing. Raises: PydanticCustomError for the first that asks for more."""
    if not isinstance(data, dict):
        return data
    for name, nothing in known.items():
        if name in data and data[name] is not None and not any(_same(data[name], value) for value in nothing):
            raise unsupported(name)
    return {name: value for name, value in data.items() if name not in known}


def unsupported(name: str, what: str = "it") -> PydanticCustomError:
    """`name`: the field below the place where this is raised, or "" for that place itself."""
    return PydanticCustomError(UNSUPPORTED, "this server does not support {what}", {"param": name, "what": what})


def _same(value: Any, other: Any) -> bool:
    """Equal and of one type: 0 is not False, nor 1.0 the number 1."""
    return type(value) is type(other) and value == other
