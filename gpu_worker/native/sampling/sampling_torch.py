"""Choose and score tokens of all rows with torch operations: on GPUs, and on CPUs without the kernel.

No call here waits for the device. Ids are ranked by descending logit, then by id.
Dims: B rows of a step, R rows per chunk, V ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from gpu_worker.model.transfer import to_device
from gpu_worker.native.sampling.argmax import argmax

_BLOCK = 512  # ids per block of the cumulative sums
_PEAK_BLOCK = 64  # ids per block when searching the largest logits
_FEW = 1024  # larger top_k: sort the row instead
_SHORT_LIST = 1024  # ids that usually have top_p of the mass; tried first on the CPU
_ROWS_AT_ONCE = {True: 4, False: 32}  # by `on_host`; bounds float32 copies, which fit a CPU's cache
_ROWS_SORTED_AT_ONCE = {True: 1, False: 8}
_ID_BITS = 32
_ROUNDING = 1e-6  # relative error of float32 sums in another order


def choose(logits: Tensor, table: NDArray[np.void], *, on_host: bool) -> Tensor:
    """Return the chosen id (B,) for each entry of the table (`draw.TABLE`, one per row); -1 for an unsound row.

    `on_host`: values may be read in between, because no device has to finish first. The result is the same.
    """
    best, is_sound = argmax(logits)
    tokens = best.clone()
    is_greedy = table["top_k"] == 1
    draws_by_id = (table["top_k"] == 0) & (table["top_p"] == 1)
    draws_from_few = ~is_greedy & (table["top_k"] > 0) & (table["top_k"] <= _FEW)
    draws_by_rank = ~is_greedy & ~draws_by_id & ~draws_from_few
    rows_at_once, rows_sorted_at_once = _ROWS_AT_ONCE[on_host], _ROWS_SORTED_AT_ONCE[on_host]
    for rows in _chunks(draws_by_id, rows_at_once):
        _put(tokens, rows, _Chunk(logits, best, table[rows]).drawn_by_id())
    for rows in _chunks(draws_from_few, rows_at_once):
        chunk = _Chunk(logits, best, table[rows])
        _put(tokens, rows, chunk.drawn_by_rank(*largest(chunk.logits, int(table["top_k"][rows].max()))))
    for rows in _chunks(draws_by_rank, rows_sorted_at_once):
        chunk = _Chunk(logits, best, table[rows])
        _put(tokens, rows, chunk.drawn_by_rank(*_ranked(chunk, on_host)))
    return torch.where(is_sound, tokens, -1)


def score(logits: Tensor, tokens: Tensor, rows: list[int], count: int, *, on_host: bool) -> Tensor:
    """Return (R, 1 + 2 · count) float64: the token's log probability, the most likely ids, their log probabilities.

    Dims: tokens (B,); a token of -1 gives a meaningless row. `rows` (R,): the rows to score; count <= V.
    """
    index = to_device(torch.tensor(rows), logits.device)
    chosen = tokens[index].clamp(min=0)[:, None]
    parts = []
    rows_at_once = _ROWS_AT_ONCE[on_host]
    for start in range(0, len(rows), rows_at_once):
        part = slice(start, start + rows_at_once)
        own = logits.index_select(0, index[part]).float()
        _, ids = largest(own, count)
        shifted = own - own.amax(dim=-1, keepdim=True)  # exact near the largest logit
        asked = shifted.gather(1, torch.cat([chosen[part], ids], dim=1)) - shifted.logsumexp(dim=-1, keepdim=True)
        parts.append(torch.cat([asked[:, :1].double(), ids.double(), asked[:, 1:].double()], dim=1))
    return torch.cat(parts)


def ranks(logits: Tensor, tokens: Tensor, *, on_host: bool) -> Tensor:
    """Return the place (B,) of each row's token among all ids, from 1. Dims: logits (B, V), tokens (B,)."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    parts = []
    rows_at_once = _ROWS_AT_ONCE[on_host]
    for start in range(0, len(logits), rows_at_once):
        own, token = logits[start : start + rows_at_once], tokens[start : start + rows_at_once, None]
        value = own.gather(1, token)
        parts.append(((own > value) | ((own == value) & (ids < token))).sum(dim=-1) + 1)
    return torch.cat(parts)


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest logits of each row and their ids, ranked. Dims: logits (R, V) float32, count <= V.

    The `count` blocks with the largest peaks (ties: the first blocks) contain them all, because every id that ranks
    before a block's peak is in a block that ranks before it. Only these blocks are searched.
    """
    blocks = _in_blocks(logits, _PEAK_BLOCK, -torch.inf)
    ids = torch.arange(blocks.shape[1] * _PEAK_BLOCK, device=logits.device).view(1, -1, _PEAK_BLOCK)
    if count < blocks.shape[1]:
        order = blocks.amax(dim=-1).sort(dim=-1, descending=True, stable=True).indices[:, :count, None]
        order = order.expand(-1, -1, _PEAK_BLOCK)
        blocks, ids = blocks.gather(1, order), ids.expand(len(blocks), -1, -1).gather(1, order)
    keys = (_ordered(blocks).long() << _ID_BITS) | ((1 << _ID_BITS) - 1 - ids)
    found = (1 << _ID_BITS) - 1 - (keys.flatten(1).topk(count).values & ((1 << _ID_BITS) - 1))
    found = found.clamp(max=logits.shape[1] - 1)  # ids of padding, which only a negative NaN ranks after
    return logits.gather(1, found), found


class _Chunk:
    """Some rows of a step in float32, with their draws."""

    def __init__(self, logits: Tensor, best: Tensor, table: NDArray[np.void]) -> None:
        """Copy the rows. `best` (B,): the id of each row's largest logit."""
        names = "row", "top_k", "uniform", "top_p", "inverse_temperature", "log_min_p"
        columns = np.stack([table[name].astype(np.float64) for name in names])  # one copy to the device
        row, top_k, uniform, top_p, scale, log_min_p = to_device(torch.from_numpy(columns), logits.device)[..., None]
        rows = row.long().squeeze(1)
        self.logits, self._best = logits.index_select(0, rows).float(), best[rows][:, None]
        self._largest, self._has_min_p = self.logits.gather(1, self._best), bool((table["log_min_p"] > -np.inf).any())
        self._top_k, self._top_p, self._uniform = top_k, top_p, uniform
        self._scale, self._log_min_p = scale.float(), log_min_p.float()

    def drawn_by_id(self) -> Tensor:
        """Return (R,): in id order, the first id whose cumulative mass exceeds the uniform number times the total."""
        masses = _in_blocks(self._masses(self.logits), _BLOCK, 0.0)  # (R, blocks, _BLOCK)
        sums = masses.sum(dim=-1).double().cumsum(dim=-1)
        threshold = self._uniform * sums[:, -1:]
        block = torch.searchsorted(sums, threshold, right=True).clamp(max=sums.shape[1] - 1)
        before = pad(sums, (1, 0)).gather(1, block)
        inside = masses.gather(1, block[..., None].expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(dim=-1) + before
        place = torch.searchsorted(inside, threshold, right=True).clamp(max=_BLOCK - 1)
        return self._possible(block * _BLOCK + place)

    def held_by(self, values: Tensor) -> Tensor | None:
        """Return the total mass (R, 1), or None if these largest values (R, K) are not enough to draw from."""
        total = self._masses(self.logits).sum(dim=-1, keepdim=True, dtype=torch.float64)
        masses = self._masses(values).sum(dim=-1, keepdim=True, dtype=torch.float64)
        is_enough = (self._top_k == 0) & (masses >= self._top_p * total * (1 + _ROUNDING))
        return total if bool(is_enough.all()) else None

    def drawn_by_rank(self, values: Tensor, ids: Tensor, total: Tensor | None = None) -> Tensor:
        """Return (R,): the same in rank order, over the top_k ids, cut to the fewest that have top_p of their mass.

        Dims: values and ids (R, K), ranked, K >= every top_k. `total` (R, 1): the mass of all ids, if there are more
        than K and no top_k applies.
        """
        masses = self._masses(values).double()
        rank = torch.arange(values.shape[1], device=ids.device)
        masses = masses.masked_fill((rank >= self._top_k) & (self._top_k > 0), 0)
        sums = masses.cumsum(dim=-1)
        total = sums[:, -1:] if total is None else total
        is_kept = (sums - masses < self._top_p * total) | (self._top_p == 1) | (rank == 0)
        sums = masses.where(is_kept, 0).cumsum(dim=-1)
        place = torch.searchsorted(sums, self._uniform * sums[:, -1:], right=True).clamp(max=sums.shape[1] - 1)
        return self._possible(ids.gather(1, place))

    def _masses(self, logits: Tensor) -> Tensor:
        """Return e^((logit - largest) / temperature), 0 below min_p times the largest."""
        exponents = (logits - self._largest).mul_(self._scale)
        if not self._has_min_p:
            return exponents.exp_()
        return exponents.exp().masked_fill_(exponents < self._log_min_p, 0.0)

    def _possible(self, ids: Tensor) -> Tensor:
        """Return the ids (R, 1) as (R,). Replace ids without mass, which rounding can select, by the best id."""
        ids = ids.clamp(max=self.logits.shape[1] - 1)
        return torch.where(self._masses(self.logits.gather(1, ids)) > 0, ids, self._best).squeeze(1)


def _ranked(chunk: _Chunk, on_host: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ranked logits and ids: of all ids, or a sufficient short list with the total mass."""
    if on_host and chunk.logits.shape[1] > _SHORT_LIST:
        values, ids = largest(chunk.logits, _SHORT_LIST)
        if (total := chunk.held_by(values)) is not None:
            return values, ids, total
    return *(chunk.logits + 0.0).sort(
        dim=-1, descending=True, stable=True
    ), None  # + 0.0 turns -0 into +0, which would sort differently


def _chunks(is_chosen: NDArray[np.bool_], size: int) -> Iterator[NDArray[np.int64]]:
    rows = np.flatnonzero(is_chosen)
    yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _put(tokens: Tensor, rows: NDArray[np.int64], chosen: Tensor) -> None:
    tokens.index_copy_(0, to_device(torch.from_numpy(rows), tokens.device), chosen)


def _in_blocks(x: Tensor, size: int, filler: float) -> Tensor:
    """Return x (R, V) as (R, blocks, size), with the last block padded."""
    return pad(x, (0, -x.shape[1] % size), value=filler).view(len(x), -1, size)


def _ordered(x: Tensor) -> Tensor:
    """Return int32 values with the order of the float32 x; -0 and +0 are equal."""
    bits = (x + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
