"""Calibrate how well a prompt must fit an adapter, so that the base model answers when none fits.

A cosine means something different for each adapter: the samples of one lie close together, those of another far apart,
and some lie near ordinary prompts. So a score s of an adapter is turned into a *fit* before it is judged:

    fit(s) = (s − m) / d  +  ½ · (s − b) / c  −  max(0, 1.2 · (n − s) / e)

m and d are the mean and the spread of the scores of the adapter's own samples, each compared with the others. b and c
are the same of ordinary prompts, compared with the adapter. Estimates from few samples are shrunk towards the pool's.
n is the nearness of the prompt itself to ordinary prompts, and e the spread of this nearness among ordinary prompts
(see `ordinary_prompts`). So the last term counts against prompts that are nearer to ordinary prompts than to the
adapter. It is left out for own samples, few of which are. A score that one ordinary prompt in twenty reaches,
(s − b) / c < 1.64, fits no adapter: otherwise an adapter whose samples are as various as ordinary prompts would answer
these.

The *confidence* of a candidate is the share of own samples in the pool that fit their adapter less well. An operating
point is a confidence: below it a candidate is dropped, and so is that share of the pool's own prompts. As the fit grows
with s, each adapter has a cosine of its own at which it is reached, its *threshold*.

The distribution comes from the adapters of the caller's own tenant and from public ones that an admin approved. Each
counts once, whatever its number of samples. Adapters of other tenants do not count, so they cannot move it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

Abstain = Literal["never", "lenient", "balanced", "strict"]
# The share of in-pool prompts that is turned away.
SHARES: dict[Abstain, float] = {"never": 0.0, "lenient": 0.01, "balanced": 0.03, "strict": 0.08}
NO_THRESHOLD = -1.0  # the lowest possible cosine
MIN_SCORES = 5  # an adapter with fewer own scores says nothing about the pool
MAX_VOTERS = 512
_ORDINARY_WEIGHT = 0.5
_NEARNESS_WEIGHT = 1.2
_ONE_IN_TWENTY = 1.64  # in spreads of ordinary prompts' scores
_SPREAD_PRIOR = 5  # the pool's spread counts as this many samples of an adapter
_FEW_VOTERS = 3  # fewer are filled up with `_USUAL_FITS`
_USUAL_DISTANCE = 4.0  # of own samples from ordinary prompts, in spreads of these
# The 20 quantiles 2.5 %, 7.5 %, … of own samples' fits, over the 183 spare tasks of the paper's study. The last term of
# the fit was left out, which would lower the first two.
_USUAL_FITS = (-0.9, 0.1, 0.8, 1.3, 1.7, 2.0, 2.4, 2.7, 3.1, 3.5, 3.9, 4.3, 4.8, 5.2, 5.8, 6.5, 7.2, 8.1, 9.1, 10.2)
_SMALL = 1e-4  # the least spread of scores: equal samples have none
Floats = NDArray[np.float64]


def leave_one_out_scores(vectors: np.ndarray) -> NDArray[np.float32]:
    """Return the cosine of each row (n, D) to the mean of the other rows: (n,), or (0,) for fewer than two rows."""
    rows = np.asarray(vectors, np.float64)
    if len(rows) < 2:
        return np.empty(0, np.float32)
    others = rows.sum(axis=0) - rows  # proportional to the mean of the others; a cosine ignores the length
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    scores = np.sum(rows * others, axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return np.asarray(scores, np.float32)


@dataclass(frozen=True, slots=True)
class Adapters:
    """The data of some adapters that calibration needs. Dims: A adapters, D dimensions."""

    vectors: np.ndarray  # (A, D) unit rows
    own_scores: Sequence[np.ndarray]  # A arrays, as `leave_one_out_scores` returns them


@dataclass(frozen=True, slots=True)
class Nearness:
    """The nearness of prompts to ordinary prompts (C,), and its spread among ordinary prompts."""

    values: Floats
    spread: float


@dataclass(frozen=True, slots=True)
class _Moments:
    """Mean and spread of scores, by adapter (A,)."""

    mean: Floats
    spread: Floats


@dataclass(frozen=True, slots=True)
class _Fits:
    """The fit of a score, by adapter: slope · s − offset. All fields: (A,).

    `floor`: the least score that fits at all.
    """

    slope: Floats
    offset: Floats
    floor: Floats

    def of(self, scores: Floats) -> Floats:
        """Return the fits of one score for each adapter."""
        return self.slope * scores - self.offset

    def of_groups(self, groups: Sequence[Floats]) -> Floats:
        """Return the fits of all scores of each adapter, one group after the other."""
        counts = [len(group) for group in groups]
        return np.repeat(self.slope, counts) * np.concatenate(groups) - np.repeat(self.offset, counts)

    def least_score(self, fit: float, near: Floats, pull: float) -> Floats:
        """Return the score s at which each adapter reaches this fit, less pull · max(0, near − s), near (A,).

        The fit is the lower one of two lines, so the score is the larger one at which they reach it.
        """
        far, close = ((fit + self.offset + steep * near) / (self.slope + steep) for steep in (0.0, pull))
        least: Floats = np.maximum(np.maximum(far, close), self.floor)
        return least


@dataclass(frozen=True, slots=True)
class _Prior:
    """The pool's typical own scores: their spread, and the cosine of two samples of one adapter. None if unknown."""

    spread: float
    pair: float

    @classmethod
    def of(cls, groups: Sequence[np.ndarray]) -> Self:
        """Return the prior of own scores (A arrays, A ≥ 1).

        For samples of pairwise cosine r, the cosine of one to the mean of n others is m = r / √(r + (1 − r) / n);
        solved for r.
        """
        n = float(np.median([len(group) for group in groups])) - 1
        m2 = max(float(np.median([group.mean() for group in groups])), _SMALL) ** 2
        half = m2 * (1 - 1 / n) / 2
        spread = np.sqrt(np.median([group.var(ddof=1) for group in groups]))
        return cls(max(float(spread), _SMALL), float(half + np.sqrt(half**2 + m2 / n)))

    def mean_of(self, counts: Floats) -> Floats:
        """Return the mean score expected of adapters with these numbers of samples."""
        expected: Floats = self.pair / np.sqrt(self.pair + (1 - self.pair) / np.maximum(counts, 1))
        return expected


class Calibration:
    """Judges candidates for one tenant at one generation. Immutable. Dims: C candidates, J ordinary prompts."""

    def __init__(self, prior: _Prior | None, fits: Floats, weights: Floats, ordinary: np.ndarray | None) -> None:
        """Create a calibration; use `of`. `fits` (F,) with `weights` (F,) describe own samples; F = 0: no thresholds.

        Linear between the samples, and zero and one a spread beyond them.
        """
        order = np.argsort(fits, kind="stable")
        self._prior, self._ordinary, self._fits = prior, ordinary, fits[order]
        if len(fits):
            shares = np.cumsum(weights[order]) / weights.sum()
            self._shares = np.concatenate([[0.0], shares - weights[order] / weights.sum() / 2, [1.0]])
            self._fits = np.concatenate([[self._fits[0] - 1], self._fits, [self._fits[-1] + 1]])

    @classmethod
    def of(cls, trusted: Adapters, ordinary: np.ndarray | None = None) -> Self:
        """Calibrate on the adapters that count for a tenant. `ordinary` (J, D): vectors of ordinary prompts, if any.

        Without adapters of enough samples the usual distribution applies; without ordinary prompts either, there are
        no thresholds.
        """
        voters = [i for i, scores in enumerate(trusted.own_scores) if len(scores) >= MIN_SCORES]
        groups = [np.asarray(trusted.own_scores[i], np.float64) for i in voters]
        prior = _Prior.of(groups) if groups else None
        blank = cls(prior, np.empty(0), np.empty(0), ordinary)
        if not groups:
            usual = () if ordinary is None else _USUAL_FITS
            return cls(prior, np.asarray(usual), np.ones(len(usual)), ordinary)
        counts = np.asarray([len(group) for group in groups])
        fits = blank._fits_of(Adapters(trusted.vectors[voters], groups)).of_groups(groups)
        weights = np.repeat(1 / counts, counts)
        if ordinary is not None and len(groups) < _FEW_VOTERS:
            fits = np.concatenate([fits, _USUAL_FITS])
            each = (_FEW_VOTERS - len(groups)) / len(_USUAL_FITS)
            weights = np.concatenate([weights, np.full(len(_USUAL_FITS), each)])
        return cls(prior, fits, weights, ordinary)

    def judge(
        self, candidates: Adapters, scores: Floats, share: float, prompts: Nearness | None = None
    ) -> tuple[Floats, Floats]:
        """Return (thresholds, confidences), each (C,), of candidates with these scores (C,).

        `prompts`: the nearness of each candidate's prompt. A score below its threshold has a confidence below `share`.
        A share of 0 turns nothing away.
        """
        if not len(self._fits):
            return np.full(len(scores), NO_THRESHOLD), np.ones(len(scores))
        near, pull = (scores, 0.0) if prompts is None else (prompts.values, _NEARNESS_WEIGHT / prompts.spread)
        fits = self._fits_of(candidates)
        reached = fits.of(scores) - pull * np.maximum(near - scores, 0)
        confidences = np.interp(reached, self._fits, self._shares) * (scores >= fits.floor)
        if share <= 0:
            return np.full(len(scores), NO_THRESHOLD), confidences
        least = float(np.interp(share, self._shares, self._fits))
        return fits.least_score(least, near, pull).clip(-1, 1), confidences

    def _fits_of(self, adapters: Adapters) -> _Fits:
        ordinary = self._ordinary_moments(adapters.vectors)
        own = self._own_moments(adapters.own_scores, ordinary)
        slope, offset, none = 1 / own.spread, own.mean / own.spread, np.full(len(own.mean), NO_THRESHOLD)
        if ordinary is None:
            return _Fits(slope, offset, none)
        return _Fits(
            slope=slope + _ORDINARY_WEIGHT / ordinary.spread,
            offset=offset + _ORDINARY_WEIGHT * ordinary.mean / ordinary.spread,
            floor=ordinary.mean + _ONE_IN_TWENTY * ordinary.spread,
        )

    def _ordinary_moments(self, vectors: np.ndarray) -> _Moments | None:
        if self._ordinary is None:
            return None
        scores = np.asarray(vectors @ self._ordinary.T, np.float64)
        return _Moments(scores.mean(axis=1), np.maximum(scores.std(axis=1), _SMALL))

    def _own_moments(self, groups: Sequence[np.ndarray], ordinary: _Moments | None) -> _Moments:
        """Return the mean and spread of own scores, shrunk towards the pool's, or towards the usual place."""
        counts = np.asarray([len(group) for group in groups], np.float64)
        sums = np.asarray([group.sum(dtype=np.float64) for group in groups])
        squares = counts * np.asarray([group.var(dtype=np.float64) if len(group) else 0.0 for group in groups])
        if self._prior is not None:
            usual = _Moments(self._prior.mean_of(counts), np.full(len(groups), self._prior.spread))
        else:
            assert ordinary is not None  # otherwise there are no thresholds
            usual = _Moments(ordinary.mean + _USUAL_DISTANCE * ordinary.spread, ordinary.spread)
        lacking = np.maximum(MIN_SCORES - counts, 0)  # filled up with the pool's mean
        mean = (sums + lacking * usual.mean) / (counts + lacking)
        freedom = np.maximum(counts - 1, 0)
        spread = np.sqrt((squares + _SPREAD_PRIOR * usual.spread**2) / (freedom + _SPREAD_PRIOR))
        return _Moments(mean, np.maximum(spread, _SMALL))
