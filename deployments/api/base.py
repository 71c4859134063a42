"""The base of all request models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

MAX_TEXT_CHARS = 4 << 20  # of any text, prompts included: no body holds more
MAX_LABEL_CHARS = 1024  # of what a client sends for its own use


class ApiRequest(BaseModel):
    """Refuse unknown keys. A key that is null counts as unset, as clients send what they dump.

    Every list, mapping and text of a request has a bound, and lists are read up to the first bad item (`fail_fast`):
    each bad item would become an error object of a kilobyte, on the event loop. A test walks all fields for it.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _within_bounds(cls, data: Any) -> Any:
        """Drop the keys that are null, and of those that are unknown all but the first, which is refused by name."""
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        unknown = next((key for key, value in data.items() if key not in fields and value is not None), None)
        return {key: value for key, value in data.items() if value is not None and (key in fields or key == unknown)}


def at_most(max_items: int) -> Callable[[Any], Any]:
    """Return a before-validator that refuses larger lists and mappings before their items are looked at."""

    def bounded(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > max_items:
            raise PydanticCustomError(
                "too_many",
                "holds {given} items, at most {allowed} are allowed",
                {"given": len(value), "allowed": max_items},
            )
        return value

    return bounded


def problem(param: str, message: str) -> PydanticCustomError:
    """Return the error that a validator of a whole model raises. `param` is the wrong field."""
    return PydanticCustomError("invalid", "{reason}", {"param": param, "reason": message})
