"""Compute the embedding of an adapter from its samples."""

from __future__ import annotations

from collections.abc import Sequence

from lora_store.adapter import Sample
from lora_store.records import Embedding
from retriever_svc.bulk import BulkEncoding
from retriever_svc.calibration import leave_one_out_scores
from retriever_svc.encoder import Encoder, Vectors, project, unit_rows
from retriever_svc.output_profile import profile_of, texts_to_encode


def embed_groups(
    encoder: Encoder, groups: Sequence[Sequence[Sample]], tenants: Sequence[str] | None = None
) -> list[Embedding | None]:
    """Return one embedding per group of samples, None for an empty group. Encode all texts together.

    `tenants` has one entry per group: the owner of the part of the encoder's cache to use. Without it no cache is used.
    """
    encoding = encoding_of(encoder, groups, tenants)
    encoding.encode_all()
    return embeddings_of(encoding, groups)


def encoding_of(
    encoder: Encoder, groups: Sequence[Sequence[Sample]], tenants: Sequence[str] | None = None
) -> BulkEncoding:
    """Return a chunk-by-chunk encoding of the samples of all groups, in order; `tenants` as in `embed_groups`.

    Of each group: first the inputs, then those outputs that its profile needs.
    """
    texts = [_texts_of(samples) for samples in groups]
    owners = None
    if tenants is not None:
        owners = [tenant for tenant, own in zip(tenants, texts, strict=True) for _ in own]
    return BulkEncoding(encoder, [text for own in texts for text in own], owners)


def _texts_of(samples: Sequence[Sample]) -> list[str]:
    return [sample.input for sample in samples] + texts_to_encode(samples)


def embeddings_of(encoding: BulkEncoding, groups: Sequence[Sequence[Sample]]) -> list[Embedding | None]:
    """Return one embedding per group, None for an empty group. `encoding` of the same groups must be complete."""
    rows = encoding.plain_vectors()
    embeddings: list[Embedding | None] = []
    start = 0
    for samples in groups:
        middle, end = start + len(samples), start + len(_texts_of(samples))
        inputs, outputs = rows[start:middle], rows[middle:end]
        start = end
        embeddings.append(_embedding_of(encoding.encoder, samples, inputs, outputs) if samples else None)
    return embeddings


def _embedding_of(encoder: Encoder, samples: Sequence[Sample], inputs: Vectors, outputs: Vectors) -> Embedding:
    """Return the embedding of an adapter from its samples' vectors before the projection: inputs (S, D), outputs.

    E(adapter) = mean over its samples of E(instruction ⊕ sample), scaled to length 1, so that inner products are
    cosines.
    Source: LoraRetriever (ACL Findings 2024), section 4.1.
    """
    vector = unit_rows(project(encoder, inputs).mean(axis=0))
    if encoder.projection is None:
        scores = leave_one_out_scores(inputs)
    else:
        scores = encoder.projection.own_scores(inputs, [sample.input for sample in samples])
    return Embedding(encoder.identity, vector, scores, profile_of(samples, outputs))
