"""Packed attention over pages in host memory, compared with a slow loop over one token and one head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gpu_worker.model.attention_plan import Segment
from gpu_worker.native.attention import attention_cpu
from gpu_worker.native.attention.decode_attention import DecodeKernel
from gpu_worker.native.attention.kv_pages import HostKvCache
from tests.gpu_worker.engine_driver import compiled, kv_shape

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, MAX_LEN, NUM_ROWS = 4, 2, 8, 200, 6
SCALING = 0.3


def new_cache(
    max_len: int = MAX_LEN,
    kernel: DecodeKernel | None = None,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float32,
) -> HostKvCache:
    """Return a cache whose rows have all their pages: those of the last three are adjacent, the others are mixed."""
    cache = HostKvCache(
        kv_shape(
            num_layers=1,
            num_heads=NUM_KV_HEADS,
            head_dim=head_dim,
            dtype=dtype,
            num_rows=NUM_ROWS,
            max_len=max_len,
            num_tokens=NUM_ROWS * -(-max_len // 5) * 5,
        ),
        kernel,
    )
    for _ in range(NUM_ROWS):
        cache.allocate(1, max_len)
    for row in range(3, NUM_ROWS):
        assert cache.grow(row, max_len)
    for num_tokens in range(1, max_len + 1):
        assert all([cache.grow(row, num_tokens) for row in range(3)])
    return cache


def slots(cache: HostKvCache, row: int, num_tokens: int) -> Tensor:
    """Return where the first tokens of a row are stored."""
    pages = cache.attention([Segment(row, 0, 1, 0)]).groups[0].pages
    return pages.slots(torch.tensor(row), torch.arange(num_tokens))


@pytest.fixture(params=["torch", "compiled"])
def kernel(request: pytest.FixtureRequest) -> DecodeKernel | None:
    return None if request.param == "torch" else compiled(DecodeKernel.load)


def layout(*rows: tuple[int, int, int]) -> list[Segment]:
    """Return consecutive segments, given (row, new tokens, tokens before)."""
    segments, start = [], 0
    for row, num_tokens, context_len in rows:
        segments.append(Segment(row, start, num_tokens, context_len))
        start += num_tokens
    return segments


LAYOUTS = {
    "one prompt": layout((0, 7, 0)),
    "one token": layout((3, 1, 0)),
    "a chunk": layout((1, 5, 20)),
    "a long prompt": layout((2, 150, 0)),
    "a long chunk": layout((1, 60, 130)),
    "adjacent decodes": layout((1, 1, 30), (2, 1, 5), (3, 1, 63)),
    "decodes of unlike lengths": layout((5, 1, 3), (0, 1, 64), (2, 1, 150), (4, 1, 199)),
    "decodes in no order": layout((4, 1, 9), (0, 1, 12), (2, 1, 10)),
    "all kinds": layout((5, 1, 70), (1, 1, 11), (2, 1, 12), (0, 30, 0), (4, 9, 25), (3, 130, 0)),
}


def slow_attention(
    query: Tensor, history: dict[int, tuple[Tensor, Tensor]], segments: list[Segment], window: int | None
) -> Tensor:
    """Return (N, Q, D). history[row] = keys, values (H, T, D) of the whole row after this step."""
    output = torch.zeros(query.shape[1], NUM_HEADS, HEAD_DIM)
    for segment in segments:
        keys, values = history[segment.row]
        for i in range(segment.num_tokens):
            position = segment.context_len + i
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(NUM_HEADS):
                shared = head // (NUM_HEADS // NUM_KV_HEADS)
                seen = keys[shared, first : position + 1]
                weights = (seen @ query[head, segment.start + i] * SCALING).softmax(dim=0)
                output[segment.start + i, head] = weights @ values[shared, first : position + 1]
    return output


@pytest.mark.parametrize("window", [None, 12, 1, 500])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_attention_equals_the_slow_loop(
    name: str, window: int | None, kernel: DecodeKernel | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "_MOST_READS_BEHIND", 8192)  # fewer than "a long chunk" reads
    torch.manual_seed(0)
    segments, cache = LAYOUTS[name], new_cache(kernel=kernel)
    num_tokens = segments[-1].end
    query = torch.randn(NUM_HEADS, num_tokens, HEAD_DIM)
    key, value = (torch.randn(NUM_KV_HEADS, num_tokens, HEAD_DIM) for _ in range(2))
    history = {}
    for segment in segments:
        keys, values = (torch.randn(NUM_KV_HEADS, segment.total_len, HEAD_DIM) for _ in range(2))
        keys[:, segment.context_len :] = key[:, segment.start : segment.end]
        values[:, segment.context_len :] = value[:, segment.start : segment.end]
        places = slots(cache, segment.row, segment.context_len)
        cache.keys[0][:, places], cache.values[0][:, places] = (x[:, : segment.context_len] for x in (keys, values))
        history[segment.row] = (keys, values)
    found = cache.attention(segments).attend(0, query, key, value, scaling=SCALING, sliding_window=window)
    torch.testing.assert_close(found, slow_attention(query, history, segments, window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_is_stored_at_its_position_in_its_row_and_computed_once(name: str) -> None:
    segments, cache = LAYOUTS[name], new_cache()
    plan = cache.attention(segments)
    tokens = [(s.row, s.context_len + i) for s in segments for i in range(s.num_tokens)]
    expected = [int(slots(cache, row, position + 1)[-1]) for row, position in tokens]
    assert plan.token_positions.tolist() == [position for _, position in tokens]
    assert plan.groups[0].slots.tolist() == expected
    covered = [token for segment in plan.prefill for token in range(segment.start, segment.end)]
    for group in plan.decode:
        covered += torch.arange(segments[-1].end)[group.tokens].tolist()
        assert group.read_len == int(group.lengths.max())
    assert sorted(covered) == list(range(segments[-1].end))


def test_adjacent_pages_are_read_without_a_copy_and_others_by_slots() -> None:
    cache = new_cache()
    pages = cache.attention([Segment(0, 0, 1, 0)]).groups[0].pages
    for row, is_adjacent in ((0, False), (4, True)):
        for first, end in ((6, 150), (7, 8), (10, 15), (25, 31)):
            span, expected = pages.span(row, first, end), slots(cache, row, end)[first:]
            assert isinstance(span, slice) == (is_adjacent or end - first <= 5)
            assert torch.arange(NUM_ROWS * MAX_LEN)[span].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([50, 90, 20], [[1, 0, 2]]),
        ([50, 50, 2000], [[2], [0, 1]]),
        ([2000, 50, 2000], [[0, 2], [1]]),
        ([2000, 1000, 900], [[0, 1], [2]]),
        ([2000, 1500, 1476, 976], [[0, 1, 2], [3]]),
    ],
    ids=["like lengths", "a long one", "a short one", "no longer worth it", "at the limit"],
)
def test_a_group_ends_where_padding_costs_more_than_another_group(lengths: list[int], groups: list[list[int]]) -> None:
    plan = new_cache(2048).attention(layout(*[(row, 1, length - 1) for row, length in enumerate(lengths)]))
    assert [group.rows.tolist() for group in plan.decode] == groups
    assert [group.tokens.tolist() for group in plan.decode] == groups, "row i is token i of this step"


@pytest.mark.parametrize("window", [None, 3, 100])
def test_padding_reads_the_rows_own_tokens_only(window: int | None) -> None:
    cache = new_cache()
    plan = cache.attention(layout((0, 1, 49), (4, 1, 9)))
    [group] = plan.decode
    places, bias = group.visible(plan.groups[0].pages, window, torch.float32)
    assert places.shape == (2, window if window == 3 else 50)
    for row, length, read, visible in zip((0, 4), (50, 10), places, bias[:, 0, 0] == 0, strict=True):
        assert set(read.tolist()) <= set(slots(cache, row, length).tolist())
        first = max(0, length - (window or length))
        assert read[visible].tolist() == slots(cache, row, length)[first:].tolist()


@pytest.mark.parametrize("place", [0, 5, 15, 16, 36, 37])
def test_one_key_may_have_nearly_all_the_weight(place: int) -> None:
    """Exponentials of such scores overflow unless the largest one is found, wherever it is."""
    cache = new_cache(kernel=compiled(DecodeKernel.load))
    plan = cache.attention(layout((4, 1, 37)))
    rows = slots(cache, 4, 38)
    cache.keys[0][:, rows], cache.values[0][:, rows] = 0.0, torch.randn(38, HEAD_DIM)
    key, value = torch.zeros(NUM_KV_HEADS, 1, HEAD_DIM), torch.randn(NUM_KV_HEADS, 1, HEAD_DIM)
    if place == 37:
        key[:] = 30.0
    else:
        cache.keys[0][:, rows[place]] = 30.0
    query = torch.full((NUM_HEADS, 1, HEAD_DIM), 10.0)
    found = plan.attend(0, query, key, value, scaling=SCALING, sliding_window=None)
    expected = cache.values[0][:, rows[place]].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=0)
    torch.testing.assert_close(found[0], expected)


def test_a_row_that_is_not_finite_does_not_reach_the_others(kernel: DecodeKernel | None) -> None:
    segments, cache = layout((0, 1, 4), (1, 1, 4), (2, 6, 0)), new_cache(kernel=kernel)
    places = slots(cache, 0, 4)
    cache.keys[0][:, places] = math.nan
    cache.values[0][:, places] = math.inf
    query = torch.randn(NUM_HEADS, 8, HEAD_DIM)
    key, value = (torch.randn(NUM_KV_HEADS, 8, HEAD_DIM) for _ in range(2))
    found = cache.attention(segments).attend(0, query, key, value, scaling=SCALING, sliding_window=None)
    assert not found[0].isfinite().all()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize(
    ("num_tokens", "context_len", "is_long"),
    [
        (1, 0, False),
        (127, 0, False),
        (128, 0, True),
        (24, 1000, False),
        (25, 1000, True),
        (8, 4000, False),
        (9, 4000, True),
    ],
)
def test_the_kernel_computes_short_chunks_and_guesses(num_tokens: int, context_len: int, is_long: bool) -> None:
    cache = new_cache(4096, compiled(DecodeKernel.load))
    plan = cache.attention(layout((0, num_tokens, context_len)))
    assert bool(plan.prefill) == is_long and plan.is_compiled != is_long


@pytest.mark.parametrize("num_heads", [2, 8, 10], ids="{} query heads".format)
@pytest.mark.parametrize("head_dim", [7, 33, 40, 256])
def test_bfloat16_and_any_strides(num_heads: int, head_dim: int, kernel: DecodeKernel | None) -> None:
    """Heads are stored token by token, like the output of a model's projections."""
    torch.manual_seed(0)
    segments = layout((4, 1, 9), (0, 1, 150), (2, 1, 10), (5, 3, 0))
    caches = [
        new_cache(kernel=of, head_dim=head_dim, dtype=dtype)
        for of, dtype in ((kernel, torch.bfloat16), (None, torch.float32))
    ]
    query = torch.randn(6, num_heads, head_dim).bfloat16().transpose(0, 1)
    key, value = (torch.randn(6, NUM_KV_HEADS, head_dim).bfloat16().transpose(0, 1) for _ in range(2))
    for of_layer in ("keys", "values"):
        before = torch.randn(NUM_KV_HEADS, NUM_ROWS * MAX_LEN, head_dim).bfloat16()
        for cache in caches:
            getattr(cache, of_layer)[0][:] = before  # equal pages in both caches
    found, exact = (
        cache.attention(segments).attend(
            0, *(x.to(dtype) for x in (query, key, value)), scaling=0.1, sliding_window=100
        )
        for cache, dtype in zip(caches, (torch.bfloat16, torch.float32), strict=True)
    )
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)
    for of_layer in ("keys", "values"):
        assert torch.equal(*(getattr(cache, of_layer)[0].bfloat16() for cache in caches))


def test_the_compiled_result_of_a_token_does_not_depend_on_other_tokens() -> None:
    torch.manual_seed(0)
    cache = new_cache(kernel=compiled(DecodeKernel.load))
    for of_layer in (cache.keys, cache.values):
        of_layer[0].normal_()
    query = torch.randn(NUM_HEADS, 3, HEAD_DIM)
    key, value = (torch.randn(NUM_KV_HEADS, 3, HEAD_DIM) for _ in range(2))

    def attended(tokens: list[int]) -> Tensor:
        segments = layout(*[((4, 1, 9), (0, 1, 150), (2, 1, 10))[token] for token in tokens])
        parts = (x[:, tokens] for x in (query, key, value))
        return cache.attention(segments).attend(0, *parts, scaling=SCALING, sliding_window=None)

    together = attended([0, 1, 2])
    assert torch.equal(torch.cat([attended([token]) for token in range(3)]), together)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("before", [0, 20])
def test_a_short_chunk_has_the_compiled_results_of_its_tokens_one_by_one(before: int, window: int | None) -> None:
    torch.manual_seed(0)
    caches = [new_cache(kernel=compiled(DecodeKernel.load)) for _ in range(2)]
    query, *parts = (torch.randn(count, 9, HEAD_DIM) for count in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    for of_layer in ("keys", "values"):
        getattr(caches[0], of_layer)[0].normal_()
        getattr(caches[1], of_layer)[0].copy_(getattr(caches[0], of_layer)[0])

    def attended(cache: HostKvCache, segments: list[Segment], tokens: slice) -> Tensor:
        own = (x[:, tokens] for x in (query, *parts))
        return cache.attention(segments).attend(0, *own, scaling=SCALING, sliding_window=window)

    together = attended(caches[0], layout((4, 8, before), (2, 1, 9)), slice(0, 9))
    alone = [attended(caches[1], layout((4, 1, before + place)), slice(place, place + 1)) for place in range(8)]
    assert torch.equal(together, torch.cat([*alone, attended(caches[1], layout((2, 1, 9)), slice(8, 9))]))
