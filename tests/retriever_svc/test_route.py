from __future__ import annotations

from typing import Any

import pytest

from retriever_svc import RouteRequest
from retriever_svc.errors import RouteInvalid


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strategy", "base"),
        ("weighting", "linear"),
        ("fallback", "panic"),
        ("top_k", 0),
        ("top_k", 17),
        ("min_score", float("nan")),
        ("min_score", float("inf")),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(RouteInvalid, match=field):
        RouteRequest("text", **{field: value})


def test_the_defaults_are_the_papers() -> None:
    request = RouteRequest("text")
    assert (request.strategy, request.top_k, request.weighting, request.fallback) == ("mixture", 3, "evidence", "base")
