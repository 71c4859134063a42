"""The request of `/v1/embeddings`, and its answer in both encodings."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse
from pydantic import ValidationError

from deployments.api.embeddings import MAX_INPUTS, EmbeddingsRequest, embeddings_answer
from deployments.api.error_table import validation_error
from deployments.errors import RequestInvalid, Unsupported

VECTORS = [np.array([0.6, -0.8], np.float32), np.array([1.0, 0.0], np.float32)]


def request_of(**fields: Any) -> EmbeddingsRequest:
    return EmbeddingsRequest.model_validate({"model": "m", "input": ["a", "b"]} | fields)


def test_both_encodings_hold_the_same_numbers() -> None:
    assert request_of(input="a").input == ["a"], "one text is a list of one"
    plain = embeddings_answer(request_of(), VECTORS, 7)
    packed = embeddings_answer(request_of(encoding_format="base64"), VECTORS, 7)
    for number, text, vector in zip(plain["data"], packed["data"], VECTORS, strict=True):
        assert isinstance(text["embedding"], str)
        decoded = np.frombuffer(base64.b64decode(text["embedding"]), "<f4")
        assert number["embedding"] == decoded.tolist() == vector.tolist()
    CreateEmbeddingResponse.model_validate(plain, strict=True)


def test_the_encoders_own_dimensions_are_served_and_others_refused() -> None:
    assert len(embeddings_answer(request_of(dimensions=2), VECTORS, 7)["data"]) == 2
    with pytest.raises(Unsupported, match=r"dimensions: .* than those of 2 dimensions"):
        embeddings_answer(request_of(dimensions=3), VECTORS, 7)


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"input": []}, RequestInvalid, "input"),
        ({"input": ""}, RequestInvalid, "input.0"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, RequestInvalid, "input"),
        ({"encoding_format": "int8"}, RequestInvalid, "encoding_format"),
        ({"input": [1, 2]}, Unsupported, "input"),
        ({"input": [[1], [2]]}, Unsupported, "input"),
    ],
)
def test_a_value_that_is_not_served_is_refused_by_its_path(
    fields: dict[str, Any], kind: type[Exception], param: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        request_of(**fields)
    error = validation_error(caught.value)
    assert isinstance(error, kind) and error.param == param


def test_token_ids_are_refused_with_what_to_send_instead() -> None:
    with pytest.raises(ValidationError) as caught:
        request_of(input=[[1], [2]])
    said = str(validation_error(caught.value))
    assert "token ids as an input yet; send texts" in said and "check_embedding_ctx_length=False" in said
