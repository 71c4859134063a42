"""Calibrate the score floor: the score below which the base model answers a prompt instead of an adapter.

Each adapter has one vote, whatever its number of samples: the score that nearly all of its own samples reach when each
is compared with the others. The floor is a low quantile of the votes, so a few unusual adapters do not decide it.

The following vote on a tenant's floor:

- each of its own adapters, and each public adapter that an admin approved;
- if none of these has a vote, each other tenant once, with the mean vote of its public adapters.

Unapproved adapters of other tenants therefore cannot move a floor that has a trusted vote. An adapter with fewer than
`MIN_SCORES` samples has no vote, as its samples do not show how well prompts of its task score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NO_FLOOR = -1.0  # the lowest possible cosine
NO_VOTE = float("nan")
MIN_SCORES = 5
_VOTE_SHARE = 0.01  # of an adapter's own samples score below its vote
_FLOOR_SHARE = 0.2  # of the votes are below the floor
Votes = NDArray[np.float64]


def calibrate_floor(groups: Sequence[np.ndarray]) -> float:
    """Return the floor for adapters with these samples, all of them trusted; NO_FLOOR if none has a vote.

    `groups`: (n, D) unit rows per adapter.
    """
    return floor_of(np.asarray([vote_of(leave_one_out_scores(group)) for group in groups], np.float64))


def leave_one_out_scores(vectors: np.ndarray) -> NDArray[np.float32]:
    """Return the cosine of each row (n, D) to the mean of the other rows: (n,), or (0,) for fewer than two rows."""
    rows = np.asarray(vectors, np.float64)
    if len(rows) < 2:
        return np.empty(0, np.float32)
    others = rows.sum(axis=0) - rows  # proportional to the mean of the others; a cosine ignores the length
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    scores = np.sum(rows * others, axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return np.asarray(scores, np.float32)


def vote_of(own_scores: NDArray[np.float32]) -> float:
    """Return the score below which 1 % of an adapter's own samples fall, or NO_VOTE for fewer than `MIN_SCORES`.

    Interpolate as `numpy.percentile` does, at a tenth of its cost: a large pool has a million adapters.
    """
    if len(own_scores) < MIN_SCORES:
        return NO_VOTE
    ordered = np.sort(own_scores)
    place = _VOTE_SHARE * (len(ordered) - 1)
    below, above = float(ordered[int(place)]), float(ordered[int(place) + 1])
    return min(1.0, max(-1.0, below + (place - int(place)) * (above - below)))


def floor_of(trusted: Votes, others: Votes | None = None) -> float:
    """Return the score below which a fifth of the votes fall, or NO_FLOOR without votes. Ignore NO_VOTE entries.

    `trusted` (T,): votes of the caller's own and of approved adapters. `others` (O,): one vote per other tenant, used
    only if there is no trusted vote.
    """
    votes = trusted[np.isfinite(trusted)]
    if others is not None and not len(votes):
        votes = others[np.isfinite(others)]
    return float(np.quantile(votes, _FLOOR_SHARE)) if len(votes) else NO_FLOOR
