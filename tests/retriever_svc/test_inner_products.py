from __future__ import annotations

import numpy as np
import pytest

from retriever_svc.inner_products import best_rows


@pytest.mark.parametrize("num_wanted", [1, 3, 40])
@pytest.mark.parametrize("kind", ["all", "scattered", "last"])
def test_the_best_of_chosen_rows_equal_a_slow_loop(kind: str, num_wanted: int) -> None:
    rng = np.random.default_rng(num_wanted)
    matrix, query = rng.standard_normal((500, 20)).astype(np.float32), rng.standard_normal(20).astype(np.float32)
    chosen = {
        "all": np.arange(500),
        "scattered": np.sort(rng.choice(500, 90, replace=False)),
        "last": np.arange(460, 500),
    }
    rows = chosen[kind]
    scored = sorted((sum(float(a) * float(b) for a, b in zip(matrix[row], query, strict=True)), row) for row in rows)
    scores, found = best_rows(query, matrix, rows, num_wanted)
    assert found.tolist() == [row for _, row in scored[::-1][:num_wanted]]
    assert scores.tolist() == pytest.approx([score for score, _ in scored[::-1][:num_wanted]], abs=1e-4)


def test_only_the_first_rows_of_a_longer_matrix_may_be_given() -> None:
    matrix = np.eye(4, dtype=np.float32)[:3]
    assert best_rows(np.asarray([0, 0, 1, 9], np.float32), matrix, np.arange(3), 1)[1].tolist() == [2]
