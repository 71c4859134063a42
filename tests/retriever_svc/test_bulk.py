from __future__ import annotations

import numpy as np

from retriever_svc import BulkEncoding
from tests.retriever_svc.pool_fakes import FakeEncoder

TABLE = {f"{number} {'x' * 2000}": (float(number), 1.0) for number in range(9)}


def test_rows_have_the_order_of_the_texts_and_each_owner_has_its_own_encoded() -> None:
    encoder = FakeEncoder(TABLE)
    texts = [*reversed(TABLE), *TABLE]
    rows = BulkEncoding(encoder, texts).encode_all()
    np.testing.assert_array_equal(rows, np.asarray([TABLE[text] for text in texts], np.float32))
    assert len(encoder.batches) > 1
    assert sum(map(len, encoder.batches)) == len(TABLE)
    encoder = FakeEncoder({"a": (1.0, 0.0)})
    assert BulkEncoding(encoder, ["a", "a", "a"], ["me", "you", "me"]).encode_all().tolist() == [[1.0, 0.0]] * 3
    assert sum(map(len, encoder.batches)) == 2
    none = BulkEncoding(FakeEncoder({}), [])
    assert (none.chunks, none.encode_all().shape) == ([], (0, 2))
