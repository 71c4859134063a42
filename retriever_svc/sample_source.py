"""Where an adapter's samples come from, when they are needed again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lora_store.adapter import Sample
from lora_store.errors import AdapterNotFound, BlobCorrupted
from lora_store.records import AdapterRecord

logger = logging.getLogger(__name__)

SampleSource = Callable[[AdapterRecord], Sequence[Sample]]


def read_samples(source: SampleSource, record: AdapterRecord) -> Sequence[Sample] | None:
    """The samples, or None and a line in the log for what was withdrawn meanwhile or is damaged."""
    try:
        return source(record)
    except (AdapterNotFound, BlobCorrupted) as exc:
        logger.warning("the samples of version %s cannot be read: %s", record.ref.digest, exc)
        return None
