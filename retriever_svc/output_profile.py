"""Summarise an adapter's sample outputs, and decide whether two adapters do the same with their inputs.

Adapters with similar inputs may have different functions: one answers with the past tense, another with the plural. A
mixture of such adapters answers worse than either alone. The outputs in the samples show the function, as far as an
encoder distinguishes outputs: it cannot distinguish a word's letters from the same letters in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import Sample
from lora_store.records import OutputProfile
from retriever_svc.encoder import Vectors

MIN_OUTPUTS = 4
MAX_LABELS = 16
MAX_LABEL_CHARS = 64
SHARED_LABELS = 0.5  # of the labels of both adapters must be common to both
NEAR_OUTPUTS = 0.98  # two halves of one task score 0.95 to 0.997, two tasks up to 0.95: prefer a miss to a mistake
_INT8 = 127


def find_outputs(samples: Sequence[Sample]) -> list[str]:
    """Return the outputs that are given and not blank; an empty list for fewer than `MIN_OUTPUTS`."""
    outputs = [sample.output for sample in samples if sample.output is not None and sample.output.strip()]
    return outputs if len(outputs) >= MIN_OUTPUTS else []


def label_set(outputs: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct outputs, sorted, if they are the labels of a classifier; else ().

    Labels are short, at most `MAX_LABELS` differ, and each occurs twice on average. Case, surrounding space and a final
    full stop do not count.
    """
    labels = {normalized(output) for output in outputs}
    is_small = len(labels) <= min(MAX_LABELS, len(outputs) // 2)
    return tuple(sorted(labels)) if is_small and all(len(label) <= MAX_LABEL_CHARS for label in labels) else ()


def normalized(output: str) -> str:
    """Return the output without case, surrounding space and a final full stop."""
    return output.strip().removesuffix(".").rstrip().casefold()


def texts_to_encode(samples: Sequence[Sample]) -> list[str]:
    """Return the outputs whose vectors `make_profile` needs: none for a label set or too few outputs."""
    outputs = find_outputs(samples)
    return [] if label_set(outputs) else outputs


def make_profile(samples: Sequence[Sample], rows: Vectors) -> OutputProfile | None:
    """Return the profile of the outputs, None for too few. `rows` (N, D): the vectors of `texts_to_encode`."""
    outputs = find_outputs(samples)
    if not outputs:
        return None
    labels = label_set(outputs)
    return OutputProfile(labels) if labels else OutputProfile((), _as_bytes(rows.mean(axis=0)))


def functions_agree(a: OutputProfile | None, b: OutputProfile | None) -> bool:
    """Return whether both adapters are known to do the same: their label sets overlap, or their outputs are similar.

    Label sets A and B agree if |A ∩ B| ≥ |A ∪ B| / 2, since 20 samples may miss a rare label. Free text agrees if the
    cosine of the mean vectors is at least `NEAR_OUTPUTS`. Without a profile nothing is known, so nothing agrees.
    """
    if a is None or b is None:
        return False
    if a.labels and b.labels:
        first, second = set(a.labels), set(b.labels)
        return len(first & second) >= SHARED_LABELS * len(first | second)
    if a.vector is None or b.vector is None or len(a.vector) != len(b.vector):
        return False
    return _cosine(a.vector.astype(np.float64), b.vector.astype(np.float64)) >= NEAR_OUTPUTS


def _as_bytes(vector: Vectors) -> NDArray[np.int8]:
    """Return the direction of the vector in int8: (D,). The cosine to the exact one is above 0.9999."""
    largest = max(float(np.abs(vector).max()), float(np.finfo(np.float32).tiny))
    scaled: NDArray[np.int8] = np.rint(vector / largest * _INT8).astype(np.int8)
    return scaled


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), float(np.finfo(np.float64).tiny)))
