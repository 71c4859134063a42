from __future__ import annotations

import numpy as np

from retriever_svc import BulkEncoding
from tests.retriever_svc.pool_fakes import FakeEncoder

TABLE = {f"{number} {'x' * 2000}": (float(number), 1.0) for number in range(9)}


def test_rows_have_the_order_of_the_texts_for_any_chunks() -> None:
    encoder = FakeEncoder(TABLE)
    texts = [*reversed(TABLE), *TABLE]
    rows = BulkEncoding(encoder, texts).encode_all()
    np.testing.assert_array_equal(rows, np.asarray([TABLE[text] for text in texts], np.float32))
    assert len(encoder.batches) > 1
    assert sum(map(len, encoder.batches)) == len(TABLE)


def test_each_owner_has_its_own_texts_encoded() -> None:
    encoder = FakeEncoder({"a": (1.0, 0.0)})
    bulk = BulkEncoding(encoder, ["a", "a", "a"], ["me", "you", "me"])
    assert bulk.encode_all().tolist() == [[1.0, 0.0]] * 3
    assert sum(map(len, encoder.batches)) == 2


def test_no_texts_give_no_rows() -> None:
    bulk = BulkEncoding(FakeEncoder({}), [])
    assert bulk.chunks == []
    assert bulk.encode_all().shape == (0, 2)
