from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from lora_store.adapter import Sample
from lora_store.errors import AdapterNotFound, BlobCorrupted, LoraStoreError, StoreUnavailable
from lora_store.records import AdapterRecord
from retriever_svc.sample_source import SampleSource, read_samples
from tests.retriever_svc.pool_fakes import record_of


def raising(error: LoraStoreError) -> SampleSource:
    def source(record: AdapterRecord) -> Sequence[Sample]:
        raise error

    return source


def test_samples_come_as_the_source_has_them() -> None:
    assert read_samples(lambda record: [Sample(record.ref.name)], record_of("a", None)) == [Sample("a")]


@pytest.mark.parametrize("error", [AdapterNotFound("x"), BlobCorrupted("x", "y")], ids=repr)
def test_missing_or_damaged_samples_are_none_and_their_digest_is_logged(
    error: LoraStoreError, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_samples(raising(error), record_of("a", None)) is None
    assert record_of("a", None).ref.digest in caplog.text
    assert str(error) in caplog.text


def test_a_store_that_does_not_answer_stops_the_work() -> None:
    with pytest.raises(StoreUnavailable):
        read_samples(raising(StoreUnavailable("down")), record_of("a", None))
