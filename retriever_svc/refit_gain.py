"""Measure whether a projection fitted to the pool's own samples would find their adapters better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retriever_svc.encoder import Encoder, Vectors, unit_rows
from retriever_svc.errors import ProjectionUnusable
from retriever_svc.whitening import Whitening, fit_whitening, split_identity

MIN_GAIN = 0.01  # of the samples; a reindex costs more than a smaller gain is worth
_ERRORS = 2.0  # standard errors


@dataclass(frozen=True, slots=True)
class RefitGain:
    """How many of the samples rank their adapter first: with the current projection, and with one fitted to them.

    A sample is left out of its adapter's vector and of the fit. `num_won`: samples that only the new one ranks right;
    `num_lost`: those that only the current one does.
    """

    num_samples: int
    num_first: int
    num_won: int
    num_lost: int

    @property
    def num_refitted(self) -> int:
        """The samples that rank their adapter first after a refit."""
        return self.num_first + self.num_won - self.num_lost

    @property
    def pays(self) -> bool:
        """Whether the gain is at least `MIN_GAIN` and above two of its standard errors."""
        gain = self.num_won - self.num_lost
        return gain >= MIN_GAIN * self.num_samples and gain > _ERRORS * math.sqrt(self.num_won + self.num_lost)


def refit_gain(
    encoder: Encoder, groups: Sequence[Vectors], texts: Sequence[Sequence[str]], prior: Whitening | None
) -> RefitGain | None:
    """Compare projections on the samples of some adapters; None for too few samples or one adapter.

    `groups`: each adapter's sample vectors (n, D) before the projection; `texts`: the samples, in the same order.
    `prior`: as in `fit_whitening`.
    """
    usable = [place for place, group in enumerate(groups) if len(group) > 1]
    vectors, own_texts = [groups[place] for place in usable], [texts[place] for place in usable]
    if len(vectors) < 2:
        return None
    try:
        fitted = fit_whitening(split_identity(encoder.identity)[0], vectors, own_texts, prior)
    except ProjectionUnusable:
        return None
    now, later = (_is_first(projection, vectors, own_texts) for projection in (encoder.projection, fitted))
    return RefitGain(len(now), int(now.sum()), int((later & ~now).sum()), int((now & ~later).sum()))


def _is_first(
    projection: Whitening | None, groups: Sequence[Vectors], texts: Sequence[Sequence[str]]
) -> NDArray[np.bool_]:
    """Return whether each sample, left out of its adapter, is nearer to it than to all others: (S,)."""
    rows, owners = np.concatenate(groups), np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    if projection is None:
        return _first_in_space(rows, owners)
    found = np.zeros(len(rows), np.bool_)
    for held_out, projected in projection.held_out(rows, [text for own in texts for text in own]):
        found[held_out] = _first_in_space(projected, owners)[held_out]
    return found


def _first_in_space(rows: Vectors, owners: NDArray[np.int64]) -> NDArray[np.bool_]:
    sums = np.zeros((owners[-1] + 1, rows.shape[1]))
    np.add.at(sums, owners, rows)
    scores = rows @ unit_rows(sums.astype(np.float32)).T
    places = np.arange(len(rows))
    own = np.sum(rows * unit_rows((sums[owners] - rows).astype(np.float32)), axis=1)
    scores[places, owners] = own
    first: NDArray[np.bool_] = scores.argmax(axis=1) == owners
    return first
