"""Requests given as JSON objects, validated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from deployments.api import error_table
from deployments.api.completions import ChatCompletionRequest, CompletionRequest

TextRequest = ChatCompletionRequest | CompletionRequest


def parse(request: TextRequest | Mapping[str, Any]) -> TextRequest:
    """Raises: RequestInvalid."""
    if not isinstance(request, Mapping):
        return request
    kind = ChatCompletionRequest if "messages" in request else CompletionRequest
    try:
        return kind.model_validate(request)
    except ValidationError as exc:
        raise error_table.validation_error(exc) from exc
