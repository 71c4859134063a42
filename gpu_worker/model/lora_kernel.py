"""Call `grouped_lora.cpp` with torch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.model.step_context import Outputs
from gpu_worker.native.kernels.kernel_loading import Kernel, functions


@dataclass(frozen=True, slots=True)
class Run:
    """A row of many tokens. `pairs`: (adapter, number of its first pair among the adapter's), by adapter."""

    num_tokens: int
    pairs: Sequence[tuple[int, int]]


class Pairs(ctypes.Structure):
    """The struct `Pairs` of the source. `values_of` owns the arrays; `h_len`: values of h per module."""

    _fields_ = (
        ("num_adapters", c_int32),
        ("num_slots", c_int32),
        ("h_len", c_int64),
        ("slot_tokens", c_void_p),
        ("slot_starts", c_void_p),
        ("pair_starts", c_void_p),
        ("pair_slots", c_void_p),
        ("pair_weights", c_void_p),
        ("rank_starts", c_void_p),
        ("rank_rows", c_void_p),
        ("h_starts", c_void_p),
        ("fusion", c_void_p),
        ("max_rank", c_int32),
        ("num_threads", c_int32),
        ("num_short_slots", c_int32),
        ("num_runs", c_int32),
        ("run_slots", c_void_p),
        ("run_starts", c_void_p),
        ("run_adapters", c_void_p),
        ("run_pairs", c_void_p),
    )
    h_len: int
    values_of: dict[str, NDArray[np.generic]]

    @classmethod
    def of(
        cls,
        *,
        slot_tokens: NDArray[np.generic],
        fusion: NDArray[np.generic],
        slots: Sequence[NDArray[np.int32]],
        weights: NDArray[np.generic],
        rank_rows: Sequence[Sequence[int]],
        runs: Sequence[Run] = (),
    ) -> Pairs:
        """Make the struct. `slots`, `rank_rows`: one entry per adapter; `weights`: of all pairs, in adapter order.

        The tokens of `runs` have the last slots, in order.
        """
        assert all(map(len, rank_rows)), "every adapter needs a rank row: the kernel fetches those of the next adapter"
        counts = np.array([len(of_adapter) for of_adapter in slots], dtype=np.int64)
        ranks = np.array([len(rows) for rows in rank_rows], dtype=np.int64)
        h_starts = _starts(counts * ranks)
        pair_slots = np.concatenate(slots) if slots else np.zeros(0, np.int32)
        values: dict[str, NDArray[np.generic]] = {
            "slot_tokens": slot_tokens,
            "slot_starts": _starts(np.bincount(pair_slots, minlength=len(slot_tokens))).astype(np.int32),
            "pair_starts": _starts(counts).astype(np.int32),
            "pair_slots": pair_slots,
            "pair_weights": weights,
            "rank_starts": _starts(ranks).astype(np.int32),
            "rank_rows": np.array([row for rows in rank_rows for row in rows], dtype=np.int32),
            "h_starts": h_starts,
        }
        if fusion.any():
            values["fusion"] = fusion
        pairs = cls(num_adapters=len(slots), num_slots=len(slot_tokens), h_len=int(h_starts[-1]))
        pairs.max_rank = int(ranks.max(initial=0))
        pairs.num_runs = len(runs)
        pairs.num_short_slots = len(slot_tokens) - sum(run.num_tokens for run in runs)
        if runs:
            values |= _run_tables(runs, pairs.num_short_slots)
        for name, array in values.items():
            setattr(pairs, name, array.ctypes.data)
        pairs.values_of = values
        return pairs


class LoraKernel(Kernel):
    """The compiled products. Tensors are on the CPU, all of one dtype: float32 or bfloat16."""

    library_name = "grouped_lora"

    def __init__(self, library: ctypes.CDLL) -> None:
        types = c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_int64), c_int64
        self._add = functions(library, "add", *types)

    def add(self, pairs: Pairs, h: Tensor, outputs: Outputs, *, x: Tensor | None) -> None:
        """Add h · B of each module to its y (..., N, O), in place. y may be columns of a wider tensor. h: (M, h_len).

        All modules read one input. If it is given, x (..., N, I), first compute h: compose(A · x) of all its modules.
        """
        pairs.num_threads = torch.get_num_threads()  # may have changed since the pairs were made
        values: list[int] = []
        for y, bank in outputs:
            assert y.stride(-1) == 1, "the values of a row of y must be adjacent"
            assert y.is_contiguous() or y.ndim == 2, "y must be two-dimensional or contiguous"
            values += bank.address, y.data_ptr(), y.stride(-2)
        (y, bank), x = outputs[0], None if x is None else x.contiguous()
        inputs = bank.inputs.address, None if x is None else x.data_ptr()
        places = (c_int64 * len(values))(*values)
        self._add[y.dtype](ctypes.byref(pairs), *inputs, h.data_ptr(), places, len(outputs))


def _run_tables(runs: Sequence[Run], first_slot: int) -> dict[str, NDArray[np.generic]]:
    pairs = [pair for run in runs for pair in run.pairs]
    return {
        "run_slots": (first_slot + _starts(np.array([run.num_tokens for run in runs]))).astype(np.int32),
        "run_starts": _starts(np.array([len(run.pairs) for run in runs])).astype(np.int32),
        "run_adapters": np.array([adapter for adapter, _ in pairs], dtype=np.int32),
        "run_pairs": np.array([first for _, first in pairs], dtype=np.int32),
    }


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
