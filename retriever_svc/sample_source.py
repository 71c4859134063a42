"""Read the stored samples of an adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from lora_store.adapter import Sample
from lora_store.errors import AdapterNotFound, BlobCorrupted
from lora_store.records import AdapterRecord

logger = logging.getLogger(__name__)

SampleSource = Callable[[AdapterRecord], Sequence[Sample]]


def read_samples(source: SampleSource, record: AdapterRecord) -> Sequence[Sample] | None:
    """Return the samples, or log a warning and return None if they are damaged or were withdrawn meanwhile."""
    try:
        return source(record)
    except (AdapterNotFound, BlobCorrupted) as exc:
        logger.warning("cannot read the samples of version %s: %s", record.ref.digest, exc)
        return None


def without_accepted(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Return the samples that the publisher gave, without accepted prompts."""
    return tuple(sample for sample in samples if not sample.is_accepted)
