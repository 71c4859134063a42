"""The study of large pools, with a small one."""

from __future__ import annotations

import numpy as np

from benchmarks.pool_scale import Data, measure_size
from retriever_svc.encoder import unit_rows
from tests.shared_encoders import shared_encoder


def test_a_size_is_measured_for_every_caller_and_change() -> None:
    encoder = shared_encoder(num_threads=1)
    rows = unit_rows(np.random.default_rng(0).standard_normal((20, encoder.dim)).astype(np.float32))
    row = measure_size(Data(encoder, rows, rows), 100, 4, 0.6)
    assert list(row["callers"]) == ["all", "half", "tenth", "five"]
    assert all(measured["recall_at_3"] == 1 for measured in row["callers"].values())
    assert all(row[name] > 0 for name in ("add_ms", "remove_ms", "first_ms"))
