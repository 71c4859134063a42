"""Samples to the embedding of their adapter."""

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
    """Return one embedding per adapter's samples, None where there is no sample; all texts are encoded together.

    `tenants` runs along with `groups`: whose part of the encoder's cache the samples use. Without it they use none.
    """
    encoding = encoding_of(encoder, groups, tenants)
    encoding.encode_all()
    return embeddings_of(encoding, groups)


def encoding_of(
    encoder: Encoder, groups: Sequence[Sequence[Sample]], tenants: Sequence[str] | None = None
) -> BulkEncoding:
    """Return the samples of all groups, in order, to be encoded chunk by chunk; `tenants` as in `embed_groups`."""
    texts = [sample.input for samples in groups for sample in samples]
    owners = None
    if tenants is not None:
        owners = [tenant for tenant, samples in zip(tenants, groups, strict=True) for _ in samples]
    return BulkEncoding(encoder, texts, owners)


def embeddings_of(encoding: BulkEncoding, groups: Sequence[Sequence[Sample]]) -> list[Embedding | None]:
    """Return one embedding per group, None where there is no sample, once `encoding_of` the groups is encoded.

    E(adapter) = mean over its samples of E(instruction ⊕ sample), scaled to length 1: its products are cosines then.
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
