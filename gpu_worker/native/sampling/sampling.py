"""Choose the next token of every row by its own logits, seed, position and settings, independent of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.front.draw import Draw, make_table
from gpu_worker.front.logprobs import Scored
from gpu_worker.model.transfer import to_device
from gpu_worker.native.sampling import sampling_torch
from gpu_worker.native.sampling.argmax import argmax
from gpu_worker.native.sampling.penalties import adjust
from gpu_worker.native.sampling.sampling_kernel import WANTED, SamplingKernel

_LEAST_COPIED = 4  # rows copied per pass if logits change; small copies reuse memory


class Sampler:
    """A stateless sampler that chooses and scores the tokens of all rows at once.

    `kernel`: the compiled sampler, for logits in host memory. Without it torch computes the same.
    """

    def __init__(self, kernel: SamplingKernel | None = None) -> None:
        self._kernel = kernel

    def __call__(self, logits: Tensor, draws: Sequence[Draw]) -> tuple[list[int | None], list[Scored | None]]:
        """Return each row's token, and its score if the request wants log probabilities.

        Both are None if the row's logits contain NaN or +inf, or if no allowed id has more than -inf.
        Dims: logits (B, V), one draw per row. The logits do not change. Log probabilities are those of these logits,
        before temperature, penalties, bias and masks.
        """
        if not draws:
            return [], []
        table = make_table(draws, logits.shape[1])
        changed = [row for row, draw in enumerate(draws) if draw.changes_logits]
        wanted = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
        if self._kernel is not None and self._kernel.serves(logits):
            tokens, scores = _by_kernel(self._kernel, logits, draws, table, changed, wanted)
        else:
            tokens, scores = _by_torch(logits, draws, table, changed, wanted)
        is_sound = [token >= 0 for token in tokens]
        chosen = [token if sound else None for token, sound in zip(tokens, is_sound, strict=True)]
        return chosen, [scores.get(row) if sound else None for row, sound in enumerate(is_sound)]

    def score(self, logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Scored | None]:
        """Return the score and the rank of one token in each row of logits; None if they contain NaN or +inf.

        `counts`: how many of the most likely ids to report for each row. Dims: logits (B, V).
        """
        on_host, vocabulary = logits.device.type == "cpu", logits.shape[1]
        ids = to_device(torch.tensor(tokens), logits.device)
        sound = [row for row, is_sound in enumerate(argmax(logits)[1].tolist()) if is_sound]
        ranks = sampling_torch.ranks(logits, ids, on_host=on_host).tolist()
        counts = [min(count, vocabulary) for count in counts]
        if self._kernel is not None and self._kernel.serves(logits):
            scores = _scored_by_kernel(self._kernel, logits, sound, [tokens[row] for row in sound], counts)
        else:
            width = max(counts, default=0)
            found = sampling_torch.score(logits, ids, sound, width, on_host=on_host).tolist() if sound else []
            scores = {row: _scored(numbers, counts[row], width) for row, numbers in zip(sound, found, strict=True)}
        return [replace(scores[row], rank=rank) if row in scores else None for row, rank in enumerate(ranks)]


def _by_kernel(
    kernel: SamplingKernel,
    logits: Tensor,
    draws: Sequence[Draw],
    table: NDArray[np.void],
    changed: list[int],
    wanted: list[int],
) -> tuple[list[int], dict[int, Scored]]:
    if not changed:
        tokens = kernel.choose(logits, table)
    else:
        tokens, kept = np.empty(len(draws), np.int64), np.delete(np.arange(len(draws)), changed)
        tokens[kept] = kernel.choose(logits, table[kept])
    at_once = max(_LEAST_COPIED, torch.get_num_threads())
    for rows in (changed[start : start + at_once] for start in range(0, len(changed), at_once)):
        own = table[rows]
        own["row"] = range(len(rows))
        tokens[rows] = kernel.choose(_adjusted(logits, draws, rows), own)
    sound = [row for row in wanted if tokens[row] >= 0]
    counts = _counts(logits, draws, range(len(draws)))
    return tokens.tolist(), _scored_by_kernel(kernel, logits, sound, tokens[sound].tolist(), counts)


def _scored_by_kernel(
    kernel: SamplingKernel, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], counts: Sequence[int]
) -> dict[int, Scored]:
    """Return the score of one token for each of these rows, which are sound. `counts`: by row of the logits."""
    if not rows:
        return {}
    asked = np.zeros(len(rows), WANTED)
    asked["row"], asked["token"], asked["count"] = rows, tokens, [counts[row] for row in rows]
    results = (part.tolist() for part in kernel.score(logits, asked))
    return {
        row: Scored.of(logprob, ids[: counts[row]], top[: counts[row]])
        for row, logprob, ids, top in zip(rows, *results, strict=True)
    }


def _by_torch(
    logits: Tensor, draws: Sequence[Draw], table: NDArray[np.void], changed: list[int], wanted: list[int]
) -> tuple[list[int], dict[int, Scored]]:
    """Choose and score with torch. All results leave the device in one copy."""
    on_host = logits.device.type == "cpu"
    allowed = with_masks(_with_adjusted(logits, draws, changed), draws, is_copy=bool(changed))
    tokens = sampling_torch.choose(allowed, table, on_host=on_host)
    results, counts = tokens.double(), _counts(logits, draws, wanted)
    width = max(counts, default=0)
    if wanted:
        scores = sampling_torch.score(logits, tokens, wanted, width, on_host=on_host)
        results = torch.cat([results, scores.flatten()])
    numbers = results.cpu().numpy()  # float64 holds ids exactly
    found = numbers[len(draws) :].reshape(len(wanted), 1 + 2 * width).tolist()
    return numbers[: len(draws)].astype(np.int64).tolist(), {
        row: _scored(numbers, count, width) for row, count, numbers in zip(wanted, counts, found, strict=True)
    }


def _scored(numbers: Sequence[float], count: int, width: int) -> Scored:
    """Return the score of one row of `sampling_torch.score`, with `count` of its `width` most likely ids."""
    return Scored.of(numbers[0], numbers[1 : 1 + count], numbers[1 + width : 1 + width + count])


def _counts(logits: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> list[int]:
    """Return the number of most likely ids to report for each of these rows."""
    return [min(draws[row].params.logprobs or 0, logits.shape[1]) for row in rows]


def _adjusted(logits: Tensor, draws: Sequence[Draw], rows: list[int]) -> Tensor:
    """Return an adjusted float32 copy of these rows. Penalties can be smaller than bfloat16's resolution."""
    copy = logits.index_select(0, torch.tensor(rows)).to(torch.float32)
    adjust(copy, [draws[row] for row in rows])
    return copy


def _with_adjusted(logits: Tensor, draws: Sequence[Draw], rows: list[int]) -> Tensor:
    """Return all rows; if some change, an adjusted copy."""
    if not rows:
        return logits
    copy = logits.to(torch.float32, copy=True)
    adjust(copy, draws)
    return copy


def with_masks(logits: Tensor, draws: Sequence[Draw], *, is_copy: bool) -> Tensor:
    """Return the logits with -inf for every id that its row's mask excludes, in place if they are a copy already.

    NaN and +inf stay, so that an unsound row stays unsound. Without masks the logits are returned as they are.
    Dims: logits (B, V), one draw per row.
    """
    masks = [(row, draw.allowed) for row, draw in enumerate(draws) if draw.allowed is not None]
    if not masks:
        return logits
    masked = logits if is_copy else logits.clone()
    mask_bytes = np.stack([allowed for _, allowed in masks]).astype("<u4", copy=False).view(np.uint8)
    is_allowed = _expanded(to_device(torch.from_numpy(mask_bytes), logits.device), logits.shape[1])
    rows = to_device(torch.tensor([row for row, _ in masks]), logits.device)
    chosen = masked.index_select(0, rows)
    return masked.index_copy_(0, rows, torch.where(is_allowed | ~(chosen < torch.inf), chosen, -torch.inf))


def _expanded(mask_bytes: Tensor, vocabulary: int) -> Tensor:
    """Return the bits (R, V) of the bytes (R, W), the lowest first."""
    bits = mask_bytes[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask_bytes.device)
    return (bits & 1).flatten(1)[:, :vocabulary].bool()
