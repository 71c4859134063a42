"""Compute the embedding of an adapter from its samples."""

from __future__ import annotations

from collections.abc import Sequence

from lora_store.adapter import Sample
from lora_store.records import Embedding
from retriever_svc.bulk import BulkEncoding
from retriever_svc.calibration import leave_one_out_scores
from retriever_svc.encoder import Encoder, unit_rows


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
    """Return a chunk-by-chunk encoding of the samples of all groups, in order; `tenants` as in `embed_groups`."""
    texts = [sample.input for samples in groups for sample in samples]
    owners = None
    if tenants is not None:
        owners = [tenant for tenant, samples in zip(tenants, groups, strict=True) for _ in samples]
    return BulkEncoding(encoder, texts, owners)


def embeddings_of(encoding: BulkEncoding, groups: Sequence[Sequence[Sample]]) -> list[Embedding | None]:
    """Return one embedding per group, None for an empty group. `encoding` of the same groups must be complete.

    E(adapter) = mean over its samples of E(instruction ⊕ sample), scaled to length 1, so that inner products are
    cosines.
    Source: LoraRetriever (ACL Findings 2024), section 4.1.
    """
    rows = encoding.vectors()
    embeddings: list[Embedding | None] = []
    start = 0
    for samples in groups:
        own = rows[start : start + len(samples)]
        start += len(samples)
        vector = unit_rows(own.mean(axis=0)) if samples else None
        embeddings.append(None if vector is None else Embedding(encoding.identity, vector, leave_one_out_scores(own)))
    return embeddings
