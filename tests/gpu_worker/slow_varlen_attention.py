"""A slow `torch.nn.attention.varlen.varlen_attn` over pages: one token and one head at a time, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def slow_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """query (N, Q, D), key and value (pages, P, H, D) -> (N, Q, D). The last query of a row sees its last key."""
    assert seqused_k is not None and block_table is not None and cu_seq_k is not None
    _check(query, key, cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa, seqused_k, block_table)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shared = query.shape[1] // key.shape[2]
    output = torch.empty_like(query)
    for row, length in enumerate(seqused_k.tolist()):
        pages = block_table[row, : -(-length // key.shape[1])]
        keys, values = (pool[pages].flatten(0, 1)[:length].repeat_interleave(shared, dim=1) for pool in (key, value))
        first, end = cu_seq_q[row : row + 2].tolist()
        for token in range(first, end):
            position = length - (end - token)
            begin = 0 if window_size[0] < 0 else max(0, position - window_size[0])
            seen = slice(begin, length if window_size[1] < 0 else position + 1 + window_size[1])
            weights = torch.einsum("thd,hd->ht", keys[seen], query[token]).mul(scale).softmax(dim=-1)
            output[token] = torch.einsum("ht,thd->hd", weights, values[seen])
    return output


def _check(
    query: Tensor,
    key: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> None:
    """Check the conditions that the operator checks, or assumes silently."""
    assert {t.dtype for t in (cu_seq_q, cu_seq_k, seqused_k, block_table)} == {torch.int32}
    assert all(t.is_contiguous() for t in (cu_seq_q, cu_seq_k, seqused_k, block_table))
    assert query.stride(-1) == key.stride(-1) == 1
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert window_size[1] == 0 or (window_size == (-1, -1) and max_q == 1), "causal"
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1 == len(block_table) + 1
    assert cu_seq_q[0] == cu_seq_k[0] == 0 and cu_seq_q[-1] == len(query)
    assert max_q == cu_seq_q.diff().max() and max_k == seqused_k.max()
    assert cu_seq_k.diff().tolist() == seqused_k.tolist()
    assert block_table.min() >= 0 and block_table.max() < len(key)
