"""The products of a step on a GPU, in Triton. A CUDA graph can replay them, whatever plans the step has.

Dims: N tokens, C bank rows, I in, O out, M modules that read the same input, S parts of I, K rank rows of a plan.

A tile is up to 16 adjacent tokens of one plan. Two launches compute a module:
shrink:  h[s, m, n, j] = w_j · sum over part s of x[n, i] A[row_j, i]    for the rank rows j of the tile's plan
expand:  y[n, o] += sum_j h'[n, j] Bt[row_j, o],  with h' = sum_s h; for a fusion w_j · (sum of h' of j's rank index)
The plans of a step are values in tables that never move, and idle tiles return at once. So the launches depend on the
number of tokens only. Rows of adapters outside a tile's plan are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.bank.bank import InputBank, LoraBank, ModuleBank
from gpu_worker.bank.residency import Residency
from gpu_worker.model.step_context import Outputs
from gpu_worker.model.transfer import to_device
from lora_store.plan import Plan, PlannedAdapter

_TILE = 16  # tokens, the least that a tensor core multiplies
_RANKS, _INPUTS, _OUTPUTS = 16, 128, 128  # the shape of one product
_MOST_PARTS = 8
_ENOUGH_PROGRAMS = 256  # about two for each multiprocessor
# Triton compiles a kernel again for some values of an argument; of these every value must have the same kernel.
_CHANGING = ("num_tokens", "h_width", "table_width", "num_modules", "module")


@triton.jit
def _tile(tiles, tile, plan, plan_sizes, table_width, TILE: tl.constexpr):
    """Return the tile's token indices (TILE, 1), a mask of the valid ones, its plan's size, and its table's start."""
    first_token, count = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    offsets = tl.arange(0, TILE)
    tokens = (first_token + offsets).to(tl.int64)[:, None]
    return tokens, (offsets < count)[:, None], tl.load(plan_sizes + plan), plan.to(tl.int64) * table_width


@triton.jit(do_not_specialize=_CHANGING)
def _shrink(
    x, a, h, tiles, plan_rows, plan_weights, plan_sizes,
    num_in, x_stride, table_width, num_tokens, h_width, num_modules,
    PARTS: tl.constexpr, TILE: tl.constexpr, RANKS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    tile, module, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    plan = tl.load(tiles + 3 * tile)
    if plan < 0:
        return
    tokens, is_token, size, table = _tile(tiles, tile, plan, plan_sizes, table_width, TILE)
    for first in range(0, size, RANKS):
        places = first + tl.arange(0, RANKS)
        is_place = places < size
        rows = tl.load(plan_rows + table + places, mask=is_place, other=0).to(tl.int64)
        total = tl.full((TILE, RANKS), 0.0, tl.float32)
        for start in range(part * INPUTS, num_in, PARTS * INPUTS):
            columns = start + tl.arange(0, INPUTS)
            is_column = columns < num_in
            xs = tl.load(x + tokens * x_stride + columns[None, :], mask=is_token & is_column[None, :], other=0.0)
            of_rows = (rows * num_modules + module)[None, :] * num_in + columns[:, None]
            ats = tl.load(a + of_rows, mask=is_place[None, :] & is_column[:, None], other=0.0)
            total += tl.dot(xs, ats, input_precision="ieee")
        weights = tl.load(plan_weights + table + places, mask=is_place, other=0.0)
        target = ((part * num_modules + module) * num_tokens + tokens) * h_width + places[None, :]
        tl.store(h + target, total * weights[None, :], mask=is_token & is_place[None, :])


@triton.jit
def _summed(h, tokens, places, mask, module, num_tokens, h_width, num_modules, PARTS: tl.constexpr):
    """Return the sum over the parts, (TILE, RANKS)."""
    total = tl.load(h + (module * num_tokens + tokens) * h_width + places, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        source = ((part * num_modules + module) * num_tokens + tokens) * h_width + places
        total += tl.load(h + source, mask=mask, other=0.0)
    return total


@triton.jit
def _fused(
    h, tokens, is_token, all_ranks, ranks, size, module, num_tokens, h_width, num_modules,
    PARTS: tl.constexpr, TILE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Return the sum over the plan's rank rows that have the rank index of each of `ranks`, (TILE, RANKS)."""
    fused = tl.full((TILE, RANKS), 0.0, tl.float32)
    for first in range(0, size, RANKS):
        places = first + tl.arange(0, RANKS)
        is_place = places < size
        theirs = tl.load(all_ranks + places, mask=is_place, other=-2)
        mask = is_token & is_place[None, :]
        found = _summed(h, tokens, places[None, :], mask, module, num_tokens, h_width, num_modules, PARTS)
        same = (theirs[:, None] == ranks[None, :]).to(tl.float32)
        fused += tl.dot(found, same, input_precision="ieee")
    return fused


@triton.jit(do_not_specialize=_CHANGING)
def _expand(
    h, bt, y, tiles, plan_rows, plan_weights, plan_sizes, plan_ranks, plan_fusions,
    module, num_out, y_stride, table_width, num_tokens, h_width, num_modules,
    PARTS: tl.constexpr, TILE: tl.constexpr, RANKS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    plan = tl.load(tiles + 3 * tile)
    if plan < 0:
        return
    tokens, is_token, size, table = _tile(tiles, tile, plan, plan_sizes, table_width, TILE)
    columns = (block * OUTPUTS + tl.arange(0, OUTPUTS))[None, :]
    is_column = columns < num_out
    is_fusion = tl.load(plan_fusions + plan) != 0
    total = tl.full((TILE, OUTPUTS), 0.0, tl.float32)
    for first in range(0, size, RANKS):
        places = first + tl.arange(0, RANKS)
        is_place = places < size
        mask = is_token & is_place[None, :]
        values = _summed(h, tokens, places[None, :], mask, module, num_tokens, h_width, num_modules, PARTS)
        if is_fusion:
            ranks = tl.load(plan_ranks + table + places, mask=is_place, other=-1)
            fused = _fused(
                h, tokens, is_token, plan_ranks + table, ranks, size, module, num_tokens, h_width, num_modules,
                PARTS, TILE, RANKS,
            )  # fmt: skip
            values = fused * tl.load(plan_weights + table + places, mask=is_place, other=0.0)[None, :]
        rows = tl.load(plan_rows + table + places, mask=is_place, other=0).to(tl.int64)
        bts = tl.load(bt + rows[:, None] * num_out + columns, mask=is_place[:, None] & is_column, other=0.0)
        total += tl.dot(values.to(bts.dtype), bts, input_precision="ieee")
    target = y + tokens * y_stride + columns
    mask_of_y = is_token & is_column
    before = tl.load(target, mask=mask_of_y, other=0.0)
    tl.store(target, (before + total).to(before.dtype), mask=mask_of_y)


class TiledPlans:
    """The plans of a step in tables on the device: the Composition of every step that has adapters.

    tiles (T, 3) int32: plan or -1, first token, number of tokens. For each of B plans: rows and ranks (B, C) int32 and
    weights (B, C) float32, of which the first `sizes` (B,) are set; `fusions` (B,): 1 for a fusion.
    """

    def __init__(self, *, most_tokens: int, most_plans: int, num_rows: int, device: torch.device) -> None:
        self._device, self._most_tokens = device, most_tokens
        self._tiles = self._table(most_plans + -(-most_tokens // _TILE), 3).fill_(-1)
        self._rows, self._ranks = self._table(most_plans, num_rows), self._table(most_plans, num_rows)
        self._weights = self._table(most_plans, num_rows).float()
        self._sizes, self._fusions = self._table(most_plans), self._table(most_plans)
        self._width = 1  # the widest plan's
        self._last: tuple[Tensor, InputBank, Tensor] | None = None  # input, its bank, and h

    def fill(self, plans: Sequence[Plan], num_tokens: Sequence[int], residency: Residency) -> None:
        """Write the tables for rows with these plans, where row b has `num_tokens[b]` adjacent tokens."""
        starts = np.cumsum([0, *num_tokens]).tolist()
        found = [each for each in zip(plans, starts, num_tokens, strict=False) if _members(each[0])]
        self._width = max([_num_rows(plan, residency) for plan, _, _ in found], default=1)
        rows, ranks = np.zeros((2, len(found), self._width), np.int32)
        weights = np.zeros((len(found), self._width), np.float32)
        sizes, fusions = np.zeros((2, len(found)), np.int32)
        tiles = np.full(self._tiles.shape, -1, np.int32)
        num_tiles = 0
        for number, (plan, start, count) in enumerate(found):
            fusions[number] = plan.averages_parameters
            for adapter in _members(plan):
                of_adapter = residency.rows(adapter.weights_digest)
                begin, end = sizes[number], sizes[number] + len(of_adapter)
                rows[number, begin:end], ranks[number, begin:end] = of_adapter, range(len(of_adapter))
                weights[number, begin:end], sizes[number] = adapter.weight, end
            for first in range(start, start + count, _TILE):
                tiles[num_tiles] = number, first, min(_TILE, start + count - first)
                num_tiles += 1
        self._last = None  # h still contains the previous step's products
        self._copy(self._tiles, tiles)
        for table, values in (
            (self._rows, rows), (self._ranks, ranks), (self._weights, weights),
            (self._sizes, sizes), (self._fusions, fusions),
        ):  # fmt: skip
            self._copy(table[: len(found), : self._width] if table.ndim == 2 else table[: len(found)], values)

    def add(self, x: Tensor, outputs: Outputs) -> None:
        """See `Composition`. The rows of x and y behind the step's tokens are not read or changed."""
        for y, bank in outputs:
            self._add(x, y, bank)

    def _add(self, x: Tensor, y: Tensor, bank: ModuleBank) -> None:
        inputs = bank.inputs
        if self._last is None or self._last[0] is not x or self._last[1] is not inputs:
            self._last = x, inputs, self._shrunk(x.flatten(0, -2).contiguous(), inputs)
        h, y = self._last[2], y.flatten(0, -2)
        num_parts, num_modules, num_tokens, width = h.shape
        bt = bank.all_bt
        _expand[self._num_tiles(num_tokens), triton.cdiv(bt.shape[1], _OUTPUTS)](
            h, bt, y, self._tiles, self._rows, self._weights, self._sizes, self._ranks, self._fusions,
            bank.index, bt.shape[1], y.stride(0), self._rows.stride(0), num_tokens, width, num_modules,
            PARTS=num_parts, TILE=_TILE, RANKS=_RANKS, OUTPUTS=_OUTPUTS,
        )  # fmt: skip

    def warm_up(self, bank: LoraBank) -> None:
        """Compile the kernels for the bank's modules, for small and for large steps, so that no request waits."""
        for num_tokens in (1, self._most_tokens):
            for name, module in bank.modules.items():
                num_out, num_in = bank.shapes[name]
                x = torch.zeros(num_tokens, num_in, dtype=bank.dtype, device=self._device)
                self._add(x, torch.zeros(num_tokens, num_out, dtype=bank.dtype, device=self._device), module)
        self._last = None

    def _shrunk(self, x: Tensor, inputs: InputBank) -> Tensor:
        """Return h (S, M, N, K) float32, whose values are set where a tile has a rank row."""
        num_tokens, num_in = x.shape
        num_tiles, num_modules = self._num_tiles(num_tokens), inputs.num_modules
        num_parts = 1 if num_tiles * num_modules >= _ENOUGH_PROGRAMS else _MOST_PARTS
        # A graph is captured once for all later plans, so it has the width of the widest.
        width = self._rows.shape[1] if is_capturing(self._device) else self._width
        h = torch.empty(num_parts, num_modules, num_tokens, width, dtype=torch.float32, device=self._device)
        _shrink[num_tiles, num_modules, num_parts](
            x, inputs.all_a, h, self._tiles, self._rows, self._weights, self._sizes,
            num_in, x.stride(0), self._rows.stride(0), num_tokens, width, num_modules,
            PARTS=num_parts, TILE=_TILE, RANKS=_RANKS, INPUTS=_INPUTS,
        )  # fmt: skip
        return h

    def _num_tiles(self, num_tokens: int) -> int:
        """Return the most tiles of a step with so many tokens."""
        return min(num_tokens, len(self._tiles))

    def _table(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self._device)

    def _copy(self, table: Tensor, values: NDArray[Any]) -> None:
        table.copy_(to_device(torch.from_numpy(values), self._device))


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _members(plan: Plan) -> list[PlannedAdapter]:
    return [adapter for adapter in plan.adapters if adapter.weight != 0]


def _num_rows(plan: Plan, residency: Residency) -> int:
    return sum(len(residency.rows(adapter.weights_digest)) for adapter in _members(plan))
