"""Compute the embedding of an adapter from its samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_store.adapter import Sample
from lora_store.records import Embedding
from retriever_svc.bulk import BulkEncoding
from retriever_svc.calibration import leave_one_out_scores
from retriever_svc.encoder import Encoder, Vectors, project, unit_rows
from retriever_svc.output_profile import make_profile, texts_to_encode
from retriever_svc.shared_wording import without_shared_wording

CORE_WEIGHT = 0.4  # on the tune pools of `python -m benchmarks.routing.wording` 0.3 to 0.5 are alike


def embed_groups(
    encoder: Encoder, groups: Sequence[Sequence[Sample]], tenants: Sequence[str] | None = None
) -> list[Embedding | None]:
    """Return one embedding per group of samples, None as in `make_embeddings`. Encode all texts together.

    `tenants` has one entry per group: the owner of the part of the encoder's cache to use. Without it no cache is used.
    """
    encoding = make_encoding(encoder, groups, tenants)
    encoding.encode_all()
    return make_embeddings(encoding, groups)


def make_encoding(
    encoder: Encoder, groups: Sequence[Sequence[Sample]], tenants: Sequence[str] | None = None
) -> BulkEncoding:
    """Return a chunk-by-chunk encoding of the samples of all groups, in order; `tenants` as in `embed_groups`.

    Of each group: first the inputs, then the inputs without the wording that they share, then those outputs that its
    profile needs.
    """
    texts = [_find_texts(samples) for samples in groups]
    owners = None
    if tenants is not None:
        owners = [tenant for tenant, own in zip(tenants, texts, strict=True) for _ in own]
    return BulkEncoding(encoder, [text for own in texts for text in own], owners)


def _find_texts(samples: Sequence[Sample]) -> list[str]:
    inputs = [sample.input for sample in samples]
    return inputs + without_shared_wording(inputs) + texts_to_encode(samples)


def make_embeddings(encoding: BulkEncoding, groups: Sequence[Sequence[Sample]]) -> list[Embedding | None]:
    """Return one embedding per group. `encoding` of the same groups must be complete.

    None: the group is empty, or the encoder gives numbers that are not finite, as one that overflows does.
    """
    rows = encoding.plain_vectors()
    embeddings: list[Embedding | None] = []
    start = 0
    for samples in groups:
        num, end = len(samples), start + len(_find_texts(samples))
        own, start = rows[start:end], end
        inputs, cores, outputs = np.split(own, [num, 2 * num])
        is_usable = bool(samples) and np.isfinite(own).all()
        embeddings.append(_make_embedding(encoding.encoder, samples, inputs, cores, outputs) if is_usable else None)
    return embeddings


def _make_embedding(
    encoder: Encoder, samples: Sequence[Sample], inputs: Vectors, cores: Vectors, outputs: Vectors
) -> Embedding:
    """Return the embedding of an adapter from its samples' vectors before the projection.

    `inputs` (S, D): of the samples; `cores` (S, D): of the samples without the wording that they share.

        E(adapter) = mean over its samples of (1 − w) · E(instruction ⊕ sample) + w · E(instruction ⊕ core)

    scaled to length 1, so that inner products are cosines. The paper's mean has w = 0. Then the words of one training
    set weigh more than its task, and prompts in other words find the adapter less often.
    Source: LoraRetriever (ACL Findings 2024), section 4.1.
    """
    mixed = (1 - CORE_WEIGHT) * project(encoder, inputs) + CORE_WEIGHT * project(encoder, cores)
    if encoder.projection is None:
        scores = leave_one_out_scores(inputs, (1 - CORE_WEIGHT) * inputs + CORE_WEIGHT * cores)
    else:
        texts = [sample.input for sample in samples]
        scores = encoder.projection.own_scores(inputs, texts, cores, CORE_WEIGHT)
    return Embedding(encoder.identity, unit_rows(mixed.mean(axis=0)), scores, make_profile(samples, outputs))
