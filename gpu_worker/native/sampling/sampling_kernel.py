"""Call `sampling.cpp` with torch tensors."""

from __future__ import annotations

from ctypes import CDLL, c_int32, c_int64, c_void_p

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.front.draw import TABLE
from gpu_worker.native.kernels.kernel_loading import SUFFIXES, Kernel, functions

WANTED = np.dtype([("row", np.int64), ("token", np.int64), ("count", np.int64)])
"""A token to score in a row of logits, and the number of most likely ids to report: the source's struct `Wanted`."""


class SamplingKernel(Kernel):
    """The compiled sampler. Logits are on the CPU, contiguous, float32 or bfloat16."""

    library_name = "sampling"

    def __init__(self, library: CDLL) -> None:
        self._choose = functions(library, "choose", c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int32)
        pointers = c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p
        self._score = functions(library, "score", *pointers, c_int32)

    def serves(self, logits: Tensor) -> bool:
        """Return whether the kernel supports these logits."""
        return logits.device.type == "cpu" and logits.dtype in SUFFIXES and logits.is_contiguous()

    def choose(self, logits: Tensor, table: NDArray[np.void]) -> NDArray[np.int64]:
        """Return the chosen id for each entry of the table (`TABLE`) in logits (B, V); -1 for an unsound row."""
        assert table.dtype == TABLE, "the dtype must match the struct of the source"
        table, tokens = np.ascontiguousarray(table), np.empty(len(table), np.int64)
        pointers = logits.data_ptr(), logits.shape[1], table.ctypes.data, len(table), tokens.ctypes.data
        self._choose[logits.dtype](*pointers, torch.get_num_threads())
        return tokens

    def score(
        self, logits: Tensor, wanted: NDArray[np.void]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        """Return (log probabilities of the wanted tokens, the most likely ids, their log probabilities).

        Dims: logits (B, V), wanted (N,) of `WANTED`; results (N,), (N, K), (N, K) with K the largest count.
        """
        assert wanted.dtype == WANTED, "the dtype must match the struct of the source"
        count, width = len(wanted), int(wanted["count"].max(initial=0))
        logprobs, ids, top = np.empty(count), np.empty((count, width), np.int64), np.empty((count, width))
        results = logprobs.ctypes.data, ids.ctypes.data, top.ctypes.data
        pointers = logits.data_ptr(), logits.shape[1], wanted.ctypes.data, count, width
        self._score[logits.dtype](*pointers, *results, torch.get_num_threads())
        return logprobs, ids, top
