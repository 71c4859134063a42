"""Call `decode_attention.cpp` with torch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from gpu_worker.model.attention_plan import Segment
from gpu_worker.native.kernels.kernel_loading import Kernel, functions


class Cache(ctypes.Structure):
    """The struct `Cache` of the source."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("head_stride", c_int64),
        ("num_heads", c_int64),
        ("head_dim", c_int64),
    )


class _Heads(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("head_stride", c_int64), ("token_stride", c_int64))


class DecodeArguments(ctypes.Structure):
    """The struct `Decodes` of the source."""

    _fields_ = (
        ("tokens", c_void_p),
        ("rows", c_void_p),
        ("lengths", c_void_p),
        ("table", c_void_p),
        ("table_width", c_int64),
        ("page_tokens", c_int64),
        ("num", c_int64),
        ("num_query_heads", c_int64),
        ("window", c_int64),
        ("scaling", c_float),
        ("num_threads", c_int32),
    )


class Decodes:
    """The single-token segments of a step. Dims: G segments; tokens, rows, lengths (G,)."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        numbers = ([s.start for s in segments], [s.row for s in segments], [s.total_len for s in segments])
        self.tokens, self.rows, self.lengths = torch.tensor(numbers, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.tokens)

    def arguments(
        self, num_query_heads: int, table: tuple[Tensor, int], *, scaling: float, sliding_window: int | None
    ) -> DecodeArguments:
        """Return the struct, which refers to these tensors.

        table: the page of each block of the rows (R, W) int64, and the number of slots of a page.
        """
        pages, page_tokens = table
        return DecodeArguments(
            *(part.data_ptr() for part in (self.tokens, self.rows, self.lengths, pages)),
            pages.stride(0),
            page_tokens,
            len(self),
            num_query_heads,
            sliding_window or 0,
            scaling,
            torch.get_num_threads(),
        )


class DecodeKernel(Kernel):
    """The compiled attention. Dims: N tokens, H key heads, Q query heads, D head size, S slots, R rows, W pages.

    Stored keys and values are (H, S, D), float32 or bfloat16, with equal strides; S and D are contiguous.
    """

    library_name = "decode_attention"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._write = functions(library, "write_kv", *[c_void_p] * 3, c_int64, c_void_p, c_int32)
        self._attend = functions(library, "attend", *[c_void_p] * 4)

    def write(self, key: Tensor, value: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copy key and value (H, N, D) to keys and values, each token to its entry of `slots` (N,) int64."""
        expected = keys.shape[0], len(slots), keys.shape[2]
        assert key.shape == value.shape == expected, f"keys have shape {tuple(key.shape)}, expected {expected}"
        cache, heads = make_cache_struct(keys, values), (_heads(key), _heads(value))
        pointers = [ctypes.addressof(part) for part in heads]
        places = slots.data_ptr(), len(slots), ctypes.addressof(cache)
        self._write[keys.dtype](*pointers, *places, torch.get_num_threads())

    def attend(
        self,
        decodes: Decodes,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        table: tuple[Tensor, int],
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> None:
        """Attend each token of `decodes` to its row. Reads query (Q, N, D), writes output (N, Q, D).

        table: the page of each block of the rows (R, W) int64, and the number of slots of a page.
        """
        num_heads, head_dim = keys.shape[0], keys.shape[2]
        assert query.shape[0] % num_heads == 0 and query.shape[2] == head_dim, f"query has shape {tuple(query.shape)}"
        assert output.shape == (query.shape[1], query.shape[0], head_dim), f"output has shape {tuple(output.shape)}"
        arguments = decodes.arguments(query.shape[0], table, scaling=scaling, sliding_window=sliding_window)
        parts = arguments, _heads(query), make_cache_struct(keys, values)
        self._attend[query.dtype](*(ctypes.addressof(part) for part in parts), output.data_ptr())


def _heads(x: Tensor) -> _Heads:
    assert x.stride(-1) == 1, "the last dim must be contiguous"
    return _Heads(x.data_ptr(), x.stride(0), x.stride(1))


def make_cache_struct(keys: Tensor, values: Tensor) -> Cache:
    """Return the struct for the keys and values of a layer (H, S, D)."""
    assert keys.stride() == values.stride(), "keys and values must have equal strides"
    return Cache(keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.shape[0], keys.shape[2])
