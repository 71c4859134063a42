"""The score floor: what a prompt must reach, measured on how the pool's own samples score."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import Sample
from lora_store.errors import LoraStoreError
from lora_store.records import AdapterRecord
from retriever_svc.encoder import Encoder

NO_FLOOR = -1.0  # the least a cosine can be: nothing is below it
_FLOOR_PERCENTILE = 1.0
SampleSource = Callable[[AdapterRecord], Sequence[Sample]]
_log = logging.getLogger(__name__)


def calibrate_floor(groups: Sequence[np.ndarray]) -> float:
    """The score under which 1 % of the samples fall when each is scored against the others of its adapter.

    score(x_i) = cos(x_i, mean of x_j over j ≠ i). `groups`: per adapter (n, D) unit rows; an adapter of one sample
    has no others and does not count. NO_FLOOR where nothing counts.
    """
    return floor_of(leave_one_out_scores(group) for group in groups)


def floor_of(scores: Iterable[NDArray[np.float64]]) -> float:
    """The first percentile of all `scores`, interpolated; NO_FLOOR where there is none."""
    together = np.concatenate([np.empty(0), *scores])
    return float(np.percentile(together, _FLOOR_PERCENTILE)) if together.size else NO_FLOOR


def leave_one_out_scores(vectors: np.ndarray) -> NDArray[np.float64]:
    """Cosine of each row (n, D) to the mean of the other rows: (n,), or (0,) for fewer than two rows."""
    rows = np.asarray(vectors, np.float64)
    if len(rows) < 2:
        return np.empty(0)
    others = rows.sum(axis=0) - rows  # the mean of the others but for its length, which a cosine drops
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    return np.asarray(np.sum(rows * others, axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny))


class OwnScores:
    """How each adapter's own samples score against it, embedded once per version and kept while the version lives.

    Not safe for two threads at once: the Retriever calls it under its refresh lock.
    """

    def __init__(self, encoder: Encoder, source: SampleSource) -> None:
        self._encoder, self._source = encoder, source
        self._scores: dict[str, NDArray[np.float64]] = {}

    def refresh(self, records: Iterable[AdapterRecord]) -> Mapping[str, NDArray[np.float64]]:
        """Leave-one-out scores by version digest, of exactly `records`; known versions are not read again.

        An adapter whose samples cannot be read is left out and tried again at the next refresh.
        """
        scores = {}
        for record in records:
            digest = record.ref.digest
            try:
                scores[digest] = self._scores[digest] if digest in self._scores else self._measure(record)
            except (LoraStoreError, OSError):
                _log.warning(
                    "samples of %s cannot be read; the score floor does without them", record.ref, exc_info=True
                )
        self._scores = scores
        return scores

    def _measure(self, record: AdapterRecord) -> NDArray[np.float64]:
        return leave_one_out_scores(self._encoder.encode([sample.input for sample in self._source(record)]))
