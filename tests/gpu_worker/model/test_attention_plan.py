from __future__ import annotations

import pytest
import torch

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.attention_plan import check_heads

HEADS, SIZE = 2, 4


@pytest.mark.parametrize("num_query_heads", [2, 4, 6])
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_query_heads_may_be_a_multiple_of_the_caches_heads(num_query_heads: int, num_tokens: int) -> None:
    key = torch.ones(HEADS, num_tokens, SIZE)
    check_heads(torch.ones(num_query_heads, num_tokens, SIZE), key, key, HEADS, SIZE)


@pytest.mark.parametrize(
    ("query", "key", "value", "message"),
    [
        ((4, 3, 4), (1, 3, 4), (1, 3, 4), r"keys \(1, 3, 4\) .* implies \(2, 3, 4\)"),
        ((4, 3, 4), (2, 2, 4), (2, 2, 4), r"keys \(2, 2, 4\)"),
        ((4, 3, 4), (4, 3, 4), (4, 3, 4), r"keys \(4, 3, 4\)"),
        ((4, 3, 4), (2, 3, 1), (2, 3, 1), r"keys \(2, 3, 1\)"),
        ((4, 3, 4), (2, 3, 4), (2, 3, 1), r"values \(2, 3, 1\)"),
        ((3, 3, 4), (2, 3, 4), (2, 3, 4), r"queries \(3, 3, 4\).*multiple of 2 key/value heads"),
        ((4, 3, 8), (2, 3, 4), (2, 3, 4), r"queries \(4, 3, 8\).*each of size 4"),
    ],
)
def test_shapes_that_the_cache_would_cut_or_repeat_are_refused(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], message: str
) -> None:
    with pytest.raises(BaseModelUnsupported, match=message):
        check_heads(torch.ones(query), torch.ones(key), torch.ones(value), HEADS, SIZE)
