"""Request fields that this server does not read: some are refused, the others are ignored and reported.

- A field whose absence would change the answer is refused (`NOT_SERVED_*`), unless its value requests nothing.
- Any other unknown field is ignored. The header `x-ignored-fields` lists it, unless its value requests nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, model_validator

from deployments.api.base import ApiRequest, unsupported
from deployments.errors import RequestInvalid
from deployments.field_problems import did_you_mean

Passing = dict[str, tuple[object, ...]]
"""Each field with the values that ask for nothing."""

NOT_SERVED: Passing = {
    "store": (False,),  # answers are never stored
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "include_stop_str_in_output": (False,),
    "detokenize": (True,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "truncate_prompt_tokens": (-1,),
}
NOT_SERVED_IN_CHAT: Passing = NOT_SERVED | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
}
NOT_SERVED_IN_COMPLETIONS: Passing = NOT_SERVED | {"echo": (False,), "suffix": ("",), "best_of": (1,)}
NOT_SERVED_IN_MESSAGES: Passing = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "refusal": (),
    "annotations": ([],),
}
# Fields that are ignored. With one of these values they request nothing, so they are not reported.
HARMLESS: Passing = {
    "cache_salt": (),
    "chat_template_kwargs": ({},),
    "enable_thinking": (False,),
    "include_reasoning": (True, False),
    "keep_alive": (),
    "length_penalty": (1, 1.0),
    "options": ({},),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_retention": (),
    "provider": ({},),
    "reasoning_effort": ("none",),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "think": (False,),
    "typical_p": (1, 1.0),
    "verbosity": ("medium",),
}
_WHAT = {
    "tools": "tools",
    "functions": "functions",
    "guided_json": "guided_json: use structured_outputs.json",
    "guided_regex": "guided_regex: use structured_outputs.regex",
    "guided_choice": "guided_choice: use structured_outputs.choice",
    "guided_grammar": "guided_grammar: use structured_outputs.grammar",
    "chat_template": "templates of clients",
    "suffix": "text after the answer",
    "store": "stored answers",
    "best_of": "a choice among answers",
}
_MAX_IGNORED = 32  # names recorded per object
_MAX_NAME_CHARS = 64
_MAX_LISTED = 16  # names in the header
_INDEX = re.compile(r"\.\d+(?=\.)")


def without_unserved(data: object, known: Mapping[str, tuple[object, ...]]) -> object:
    """Return `data` without the fields that request nothing.

    Raises: PydanticCustomError for the first field of `known` that requests more.
    """
    if not isinstance(data, dict):
        return data
    for name, nothing in known.items():
        if name in data and data[name] is not None and not _asks_nothing(data[name], nothing):
            raise unsupported(name, _WHAT.get(name, "it"))
    return {
        name: value
        for name, value in data.items()
        if name not in known and not (name in HARMLESS and _asks_nothing(value, HARMLESS[name]))
    }


def _asks_nothing(given: object, nothing: Sequence[object]) -> bool:
    return any(_same(given, value) for value in nothing)


def _same(value: object, other: Any) -> bool:
    """Return whether both are equal and of one type: 0 is not False, and 1.0 is not 1."""
    return type(value) is type(other) and value == other


class TolerantRequest(ApiRequest):
    """A request, or a part of one, that ignores unknown keys and remembers their names.

    Clients of the OpenAI API send fields of other servers and of their own. Values are dropped at once; of each object
    a bounded number of names is kept, and each is cut to a bounded length.
    """

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _within_bounds(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        keys = cls.keys()
        unknown = [_shown(key) for key in given if key not in keys]
        known = {key: value for key, value in given.items() if key in keys}
        return known | dict.fromkeys(unknown[:_MAX_IGNORED])


def _shown(key: object) -> str:
    """Return the key in bounded ASCII: it becomes part of a header."""
    return str(key)[:_MAX_NAME_CHARS].encode("ascii", "backslashreplace").decode()


def ignored_fields(request: TolerantRequest) -> tuple[str, ...]:
    """Return the paths of the fields that were ignored, as `messages[].cache_control`, each once."""
    return tuple(dict.fromkeys(_INDEX.sub("[]", path) for path, _ in _ignored(request, "")))


def refuse_ignored(request: TolerantRequest) -> None:
    """Refuse unknown fields, for the setting `strict_fields`. Raises: RequestInvalid, naming the first."""
    for path, model in _ignored(request, ""):
        hint = did_you_mean(path.rpartition(".")[2], model.model_fields)
        raise RequestInvalid(f"{path}: unknown field{hint}", path)


def _ignored(model: TolerantRequest, prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the path of each ignored field, and the model of the object that held it."""
    for name in model.model_extra or ():
        yield prefix + name, type(model)
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, TolerantRequest):
            yield from _ignored(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for place, item in enumerate(value):
                if isinstance(item, TolerantRequest):
                    yield from _ignored(item, f"{prefix}{name}.{place}.")


def ignored_header(ignored: Sequence[str]) -> dict[str, str]:
    """Return the header that lists ignored fields; nothing where there are none."""
    if not ignored:
        return {}
    names = [quote(name, safe="[]") for name in ignored[:_MAX_LISTED]]
    return {"x-ignored-fields": ", ".join(names + ["..."] * (len(ignored) > _MAX_LISTED))}
