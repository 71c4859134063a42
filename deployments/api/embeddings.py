"""The request and the answer of `/v1/embeddings`: vectors of the encoder that `auto` finds adapters with."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from deployments.api.base import (
    MAX_LABEL_CHARS,
    MAX_TEXT_CHARS,
    Passing,
    TolerantRequest,
    unsupported,
)
from deployments.errors import Unsupported

MAX_INPUTS = 256
NOT_SERVED_IN_EMBEDDINGS: Passing = {"input_type": ("query", "passage", "document")}
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]


def _as_texts(value: object) -> object:
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value[: MAX_INPUTS + 1]):
        remedy = "send texts, from LangChain's OpenAIEmbeddings with check_embedding_ctx_length=False"
        raise unsupported("", f"token ids as an input: {remedy}")
    return [value] if isinstance(value, str) else value


class EmbeddingsRequest(TolerantRequest):
    """`POST /v1/embeddings`"""

    not_served: ClassVar[Passing] = NOT_SERVED_IN_EMBEDDINGS

    model: str = Field(min_length=1, max_length=256)
    input: Annotated[
        list[Text],
        Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS),
        BeforeValidator(_as_texts, json_schema_input_type=Text | Texts),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, lt=2**31)  # those of the encoder, or refused
    user: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = None


class EmbeddingObject(TypedDict):
    """`embedding`: numbers, or in base64 float32 in little-endian order."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(TypedDict):
    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingsUsage


def embeddings_answer(
    request: EmbeddingsRequest, vectors: Sequence[NDArray[np.float32]], num_tokens: int
) -> EmbeddingsAnswer:
    """Return the answer. `vectors`: one (D,) float32 of length 1 for each input.

    Raises: Unsupported for other `dimensions` than D.
    """
    num_dimensions = len(vectors[0])
    if request.dimensions not in (None, num_dimensions):
        raise Unsupported("dimensions", f"other vectors than those of {num_dimensions} dimensions")
    shown: list[list[float] | str] = [vector.tolist() for vector in vectors]
    if request.encoding_format == "base64":
        shown = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    data: list[EmbeddingObject] = [
        {"object": "embedding", "index": index, "embedding": embedding} for index, embedding in enumerate(shown)
    ]
    usage: EmbeddingsUsage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}
