"""Whiten vectors: a linear projection after the encoder, in which samples of one adapter spread evenly.

An encoder spends most of its dimensions on what differs between two prompts of one task. The projection divides by that
spread, so that what remains are the differences between tasks:

    project(v) = u / |u|,  u = (v − mean) · matrix,  matrix · matrixᵀ = W⁻¹

W is the covariance of samples within their adapter, pooled over adapters and shrunk towards that of an earlier
projection, if there is one, or else towards a multiple of the identity.
Samples score too well in a space that was made from them. So a projection holds one more matrix for each fold of texts,
made without the samples of that fold, and own scores are measured with these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from retriever_svc.calibration import leave_one_out_scores
from retriever_svc.errors import ProjectionUnusable

NUM_FOLDS = 5
MIN_SAMPLES = 200  # fewer say too little about 384 dimensions
# Chosen on the `choice` part of the paper's study, where the top-1 hardly depends on them (`docs/benchmarks/index.md`).
_IDENTITY_SAMPLES = 50  # the multiple of the identity counts as this many samples
_PRIOR_SAMPLES = 200  # an earlier projection, in its place, as this many
_SEPARATOR, _DIGEST_CHARS = "+", 16
Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """A projection for one encoder. Dims: D dimensions, K folds (0 if its samples are in no pool)."""

    encoder: str  # identity of the encoder without a projection
    mean: Rows  # (D,)
    matrix: Rows  # (D, D)
    folds: Rows  # (K, D, D)
    digest: str = ""

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a projection from safetensors. Raises: ProjectionUnusable."""
        try:
            arrays = {name: np.asarray(array, np.float32) for name, array in load(data).items()}
            encoder = bytes(arrays["encoder"].astype(np.uint8)).decode()
            mean, matrix, folds = (arrays[name] for name in ("mean", "matrix", "folds"))
        except Exception as exc:  # safetensors has no error class of its own for each fault
            raise ProjectionUnusable(f"the file of a projection is damaged: {exc}") from exc
        dim = len(mean)
        if matrix.shape != (dim, dim) or folds.shape[1:] != (dim, dim):
            raise ProjectionUnusable(
                f"the shapes of a projection disagree: {mean.shape}, {matrix.shape}, {folds.shape}"
            )
        return cls(encoder, mean, matrix, folds, hashlib.sha256(data).hexdigest())

    def to_bytes(self) -> bytes:
        """Return the projection as safetensors, with 16-bit numbers."""
        arrays = {"mean": self.mean, "matrix": self.matrix, "folds": self.folds}
        half = {name: array.astype(np.float16) for name, array in arrays.items()}
        return bytes(save({**half, "encoder": np.frombuffer(self.encoder.encode(), np.uint8)}))

    @property
    def identity(self) -> str:
        """The identity of the encoder with this projection. Vectors of different identities are not comparable."""
        return f"{self.encoder}{_SEPARATOR}{self.digest[:_DIGEST_CHARS]}"

    def project(self, vectors: np.ndarray) -> Rows:
        """Project unit rows (N, D) to unit rows (N, D)."""
        return _projected(vectors, self.mean, self.matrix)

    def own_scores(
        self, vectors: np.ndarray, texts: Sequence[str], cores: np.ndarray | None = None, core_weight: float = 0.0
    ) -> Rows:
        """Return how near one adapter's samples (n, D) are to the others, each in a space made without its text.

        `cores` (n, D) and `core_weight`: of the samples without shared wording, as in `embedding`.
        """
        scores = np.empty(len(texts) if len(texts) > 1 else 0, np.float32)
        if len(scores):
            others = vectors if cores is None else cores
            spaces = zip(self.held_out(vectors, texts), self.held_out(others, texts), strict=True)
            for (held_out, rows), (_, core_rows) in spaces:
                mixed = (1 - core_weight) * rows + core_weight * core_rows
                scores[held_out] = leave_one_out_scores(rows, mixed)[held_out]
        return scores

    def held_out(self, vectors: np.ndarray, texts: Sequence[str]) -> Iterator[tuple[NDArray[np.bool_], Rows]]:
        """Yield spaces as (which of the texts made it not, all vectors (N, D) projected to it).

        Each text is left out once. Without folds no text made the projection, so all are left out of the only space.
        """
        if not len(self.folds):
            yield np.ones(len(texts), np.bool_), self.project(vectors)
            return
        fold_of = np.asarray([fold_of_text(text, len(self.folds)) for text in texts], np.int64)
        for fold in np.unique(fold_of):
            yield fold_of == fold, _projected(vectors, self.mean, self.folds[fold])


def _projected(vectors: np.ndarray, mean: Rows, matrix: Rows) -> Rows:
    """Project in float64, so that a row's float32 result does not depend on the other rows of the batch."""
    rows = (np.asarray(vectors, np.float64) - mean) @ matrix.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, np.finfo(np.float64).tiny), np.float32)


def split_identity(identity: str) -> tuple[str, str]:
    """Return (the encoder's own identity, the start of its projection's digest, or "" without a projection)."""
    encoder, _, digest = identity.partition(_SEPARATOR)
    return encoder, digest


def fold_of_text(text: str, num_folds: int = NUM_FOLDS) -> int:
    """Return the fold of a text. It depends on the text alone, so a sample published again stays in its fold."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:4], "big") % num_folds


def fit_whitening(
    encoder: str,
    groups: Sequence[np.ndarray],
    texts: Sequence[Sequence[str]] | None = None,
    prior: Whitening | None = None,
) -> Whitening:
    """Fit a projection for the encoder of this identity to the samples' vectors, one group (n, D) per adapter.

    With `texts`, in the same order, make the matrices of the folds too; do so if these adapters are to be scored.
    `prior`: an earlier projection of the same encoder, which matters less the more samples there are.
    Raises: ProjectionUnusable if there are too few samples.
    """
    usable = [i for i, group in enumerate(groups) if len(group) > 1]
    groups = [np.asarray(groups[i], np.float64) for i in usable]
    if (num := sum(len(group) for group in groups)) < MIN_SAMPLES:
        raise ProjectionUnusable(f"a projection needs at least {MIN_SAMPLES} samples, but these adapters have {num}")
    mean = np.mean([group.mean(axis=0) for group in groups], axis=0)
    if prior is not None:
        mean = (num * mean + _PRIOR_SAMPLES * prior.mean) / (num + _PRIOR_SAMPLES)
    matrices = []
    if texts is not None:
        folds = [np.asarray([fold_of_text(text) for text in texts[i]]) for i in usable]
        for fold in range(NUM_FOLDS):
            rest = [group[own != fold] for group, own in zip(groups, folds, strict=True)]
            matrices.append(_matrix([group for group in rest if len(group) > 1], prior))
    stacked = np.stack(matrices) if matrices else np.empty((0, len(mean), len(mean)))
    rows = [np.asarray(array, np.float32) for array in (mean, _matrix(groups, prior), stacked)]
    fitted = Whitening(encoder, rows[0], rows[1], rows[2])
    return Whitening.from_bytes(fitted.to_bytes())  # as every replica will read it


def _matrix(groups: Sequence[np.ndarray], prior: Whitening | None) -> NDArray[np.float64]:
    """Return L with L · Lᵀ = W⁻¹, for W the covariance within the groups, shrunk towards the prior or the identity."""
    dim = groups[0].shape[1]
    scatter, freedom = np.zeros((dim, dim)), 0
    for group in groups:
        centred = group - group.mean(axis=0)
        scatter += centred.T @ centred
        freedom += len(group) - 1
    if prior is None:
        level, num = np.trace(scatter) / freedom / dim, _IDENTITY_SAMPLES
        target = level * np.eye(dim)
    else:
        target, num = np.linalg.inv(prior.matrix.astype(np.float64) @ prior.matrix.T), _PRIOR_SAMPLES
    within = (scatter + num * target) / (freedom + num)
    matrix: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(within))
    return matrix
