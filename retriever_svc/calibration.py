"""Calibrate the score floor: what a prompt must score to be answered by an adapter instead of the base model.

Each adapter has one vote, however many samples it has: the score that nearly all of its own samples reach when each is
compared with the others. The floor is a low quantile of the votes, so a few odd adapters do not decide it.

Who votes on a tenant's floor:

- every adapter of its own, and every public one an admin approved, once each;
- where none of those votes, each other tenant once, by the mean of what its public adapters vote.

So what another tenant publishes without approval does not move a floor that has a trusted vote. An adapter of fewer
than `MIN_SCORES` samples has no vote: its samples say nothing about how near prompts of its task come.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NO_FLOOR = -1.0  # the least a cosine can be: nothing is below it
NO_VOTE = float("nan")
MIN_SCORES = 5
_VOTE_SHARE = 0.01  # of an adapter's own samples score below its vote
_FLOOR_SHARE = 0.2  # of the votes lie below the floor
Votes = NDArray[np.float64]


def calibrate_floor(groups: Sequence[np.ndarray]) -> float:
    """Return the floor that adapters with these samples give, all of them trusted; NO_FLOOR where none votes.

    `groups`: per adapter (n, D) unit rows.
    """
    return floor_of(np.asarray([vote_of(leave_one_out_scores(group)) for group in groups], np.float64))


def leave_one_out_scores(vectors: np.ndarray) -> NDArray[np.float32]:
    """Return the cosine of each row (n, D) to the mean of the other rows: (n,), or (0,) for fewer than two rows."""
    rows = np.asarray(vectors, np.float64)
    if len(rows) < 2:
        return np.empty(0, np.float32)
    others = rows.sum(axis=0) - rows  # the mean of the others but for its length, which a cosine drops
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    scores = np.sum(rows * others, axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return np.asarray(scores, np.float32)


def vote_of(own_scores: NDArray[np.float32]) -> float:
    """Return the score below which 1 % of an adapter's own samples fall, or NO_VOTE for fewer than `MIN_SCORES`.

    Interpolated as `numpy.percentile` does, at a tenth of its cost: a large pool has a million of them.
    """
    if len(own_scores) < MIN_SCORES:
        return NO_VOTE
    ordered = np.sort(own_scores)
    place = _VOTE_SHARE * (len(ordered) - 1)
    below, above = float(ordered[int(place)]), float(ordered[int(place) + 1])
    return min(1.0, max(-1.0, below + (place - int(place)) * (above - below)))


def floor_of(trusted: Votes, others: Votes | None = None) -> float:
    """Return the score below which a fifth of the votes fall; NO_FLOOR without any. NO_VOTE entries are left out.

    `trusted` (T,): votes of the caller's own and of approved adapters. `others` (O,): one vote per other tenant, which
    counts only where there is no trusted vote.
    """
    votes = trusted[np.isfinite(trusted)]
    if others is not None and not len(votes):
        votes = others[np.isfinite(others)]
    return float(np.quantile(votes, _FLOOR_SHARE)) if len(votes) else NO_FLOOR
