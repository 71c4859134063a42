"""Embed a pool with another encoder or projection while the current index stays in service."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lora_store.adapter import AdapterRef
from lora_store.records import Embedding
from lora_store.snapshot import Snapshot
from retriever_svc.bulk import BulkEncoding
from retriever_svc.embedding import embed_groups
from retriever_svc.encoder import Encoder
from retriever_svc.sample_source import SampleSource, read_samples
from retriever_svc.whitening import Whitening, fit_whitening

logger = logging.getLogger(__name__)

_BATCH = 32
MAX_FITTED = 1024  # adapters that a projection is fitted to
_FITTED_SAMPLES = 32  # of one adapter, so that none counts for many
# All texts: 20 for each of 384 dimensions, more than made the packaged projection. The encoder reads them in less than
# a minute on two cores.
_FITTED_TEXTS = 8192


@dataclass(frozen=True, slots=True)
class ReindexStep:
    """Embeddings to store, after `num_done` of `num_total` adapters. `unreadable`: adapters without any."""

    num_done: int
    num_total: int
    embeddings: Mapping[AdapterRef, Embedding]
    unreadable: tuple[AdapterRef, ...] = ()


def reindex(snapshot: Snapshot, encoder: Encoder, samples: SampleSource) -> Iterator[ReindexStep]:
    """Embed the live adapters that `encoder` has not embedded yet. Yield a step for each batch."""
    lacking = [
        record
        for record in snapshot.records.values()
        if record.samples_digest is not None and not snapshot.is_embedded(record, encoder.identity)
    ]
    for start in range(0, len(lacking), _BATCH):
        batch = lacking[start : start + _BATCH]
        read = [(record.ref, read_samples(samples, record) or ()) for record in batch]
        embedded = embed_groups(encoder, [own for _, own in read])
        pairs = [(ref, embedding) for (ref, _), embedding in zip(read, embedded, strict=True)]
        for (ref, own), embedding in zip(read, embedded, strict=True):
            if own and embedding is None:
                logger.warning("the encoder gives no finite vector for the samples of version %s", ref.digest)
        yield ReindexStep(
            num_done=start + len(batch),
            num_total=len(lacking),
            embeddings={ref: embedding for ref, embedding in pairs if embedding is not None},
            unreadable=tuple(ref for ref, embedding in pairs if embedding is None),
        )


def refit(snapshot: Snapshot, encoder: Encoder, samples: SampleSource, prior: Whitening | None) -> Whitening:
    """Fit a projection for `encoder`, which has none, to the pool's samples.

    Of a large pool read `MAX_FITTED` adapters, evenly spread, and `_FITTED_TEXTS` texts.
    Raises: ProjectionUnusable if the pool has too few.
    """
    records = [record for record in snapshot.records.values() if record.samples_digest is not None]
    if len(records) > MAX_FITTED:
        records = [records[number * len(records) // MAX_FITTED] for number in range(MAX_FITTED)]
    groups, texts = [], []
    num_samples = min(_FITTED_SAMPLES, _FITTED_TEXTS // max(1, len(records)))
    for record in records:
        own = [sample.input for sample in (read_samples(samples, record) or ())[:num_samples]]
        if len(own) > 1:
            groups.append(BulkEncoding(encoder, own).encode_all())
            texts.append(own)
    return fit_whitening(encoder.identity, groups, texts, prior)
