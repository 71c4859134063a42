"""What all request models have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class ApiRequest(BaseModel):
    """Unknown keys are refused. A key that is null counts as unset, as clients send what they dump."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def problem(param: str, message: str) -> PydanticCustomError:
    """What a validator of a whole model raises: `param` is the field of it that is wrong."""
    return PydanticCustomError("invalid", "{reason}", {"param": param, "reason": message})
