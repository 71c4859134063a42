"""Read the prompts of a tenant as its accepted prompts say that clients word their requests.

Clients word a task in other ways than samples do, and they do so alike for all adapters of a pool. An accepted prompt p
says which adapter, with the vector a, such a wording is for. From all of them a linear map is fitted by ridge
regression, and every prompt q of the tenant is read through it:

    read(q) = u / |u|,  u = q + q · M,  M = the matrix with the least Σ |p + p · M − a|² + λ · |M|²

Three bounds hold, whoever named an adapter or accepted a prompt:

- A prompt counts unless another adapter would answer it and is clearly nearer to it. So false names for the prompts
  that another adapter answers say nothing.
- Few prompts of one adapter, and a bounded number of a tenant, count.
- Thresholds *rise* by as much as keeps ordinary prompts away, and a little more: no more of them than before reach
  these adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from lora_store.records import AdapterRecord
from retriever_svc.calibration import MARGINS, handicaps_at
from retriever_svc.encoder import Vectors, unit_rows
from retriever_svc.index import Match
from retriever_svc.ordinary_prompts import nearness, nearness_to_others

MAX_PROMPTS, MAX_PER_ADAPTER = 128, 5
# Chosen on the tune pools of `python -m benchmarks.routing.learning`, by vectors that were projected without the pool.
MAX_GAP = 0.05  # by which the adapter's score for its accepted prompt may be below that of one that answers it
_RIDGE = 5.0  # λ
_POINT = MARGINS["balanced"]  # at which ordinary prompts are counted
LEAST_RISE = 0.005  # with it, at most 5 % of the prompts of neighbouring tasks are lost on the tune pools


@dataclass(frozen=True, slots=True, eq=False)
class Rewording:
    """The map of one tenant, of rank J. Dims: J accepted prompts, N queries, D dimensions."""

    prompts: Vectors  # (J, D)
    steps: Vectors  # (J, D), so that M = promptsᵀ · steps
    rise: float  # of the thresholds

    @classmethod
    def fit(cls, prompts: Vectors, adapters: Vectors, ordinary: Vectors) -> Self:
        """Fit the map to accepted prompts (J, D) and the vectors of their adapters (J, D)."""
        rows = np.asarray(prompts, np.float64)
        steps = np.linalg.solve(rows @ rows.T + _RIDGE * np.eye(len(rows)), adapters - rows)
        fitted = cls(prompts, steps.astype(np.float32), 0.0)
        return cls(prompts, fitted.steps, _rise(np.unique(adapters, axis=0), ordinary, fitted.read(ordinary)))

    def read(self, queries: Vectors) -> Vectors:
        """Return the queries (N, D) as they are read. A row does not depend on the other rows."""
        if not len(self.prompts):
            return queries
        shares = np.einsum("nd,jd->nj", queries, self.prompts, dtype=np.float64)  # BLAS would round by alignment
        return unit_rows(np.asarray(queries + np.einsum("nj,jd->nd", shares, self.steps), np.float32))


AS_WRITTEN = Rewording(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32), 0.0)


def accepted_prompts(records: Iterable[AdapterRecord]) -> list[tuple[Vectors, Vectors]]:
    """Return (vector of an accepted prompt, of its adapter), those of the newest versions first, as many as count."""
    newest = sorted(records, key=lambda record: record.created_at, reverse=True)
    embeddings = [record.embedding for record in newest if record.embedding is not None]
    pairs = [(p, e.vector) for e in embeddings if e.accepted is not None for p in e.accepted[:MAX_PER_ADAPTER]]
    return pairs[:MAX_PROMPTS]


def undisputed(
    pairs: Sequence[tuple[Vectors, Vectors]], found: Sequence[Sequence[Match]]
) -> list[tuple[Vectors, Vectors]]:
    """Return the pairs that count. `found`: the judged matches of each prompt, as it is written."""
    best = [max((match.score for match in matches if match.fits), default=-1.0) for matches in found]
    return [(p, a) for (p, a), score in zip(pairs, best, strict=True) if score - float(p @ a) <= MAX_GAP]


def _rise(adapters: Vectors, ordinary: Vectors, read: Vectors) -> float:
    """Return by how much thresholds must rise so that no more ordinary prompts (O, D) than before reach the adapters.

    `read`: the ordinary prompts as they are read.
    """
    near, handicaps = nearness_to_others(ordinary), handicaps_at(nearness(adapters, ordinary))
    before, after = ((rows @ adapters.T - handicaps).max(axis=1) - near for rows in (ordinary, read))
    num_before = int(np.count_nonzero(before >= _POINT))
    first_away = np.sort(after)[::-1][num_before : num_before + 1]
    return max(0.0, float(first_away.max(initial=-1.0)) - _POINT) + LEAST_RISE
