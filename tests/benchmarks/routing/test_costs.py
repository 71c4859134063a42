from __future__ import annotations

import numpy as np
import pytest

from benchmarks.pool_scale import Data
from benchmarks.routing.costs import measure_refit, measure_search, ratios
from retriever_svc import Encoder
from retriever_svc.encoder import unit_rows


@pytest.fixture(scope="module")
def data(encoder: Encoder) -> Data:
    rows = unit_rows(np.random.default_rng(0).standard_normal((50, encoder.dim)).astype(np.float32))
    return Data(encoder, rows[:40], rows[40:])


def test_a_search_is_measured_with_the_projection_and_without_it(data: Data) -> None:
    figures = measure_search(data, 60, 10)
    kinds = ("plain", "projected")
    assert set(figures) == {f"{name}_{kind}_ms" for name in ("search", "choice") for kind in kinds} | {"project_ms"}
    assert all(value > 0 for value in figures.values())
    assert all(figures[f"choice_{kind}_ms"] > figures[f"search_{kind}_ms"] for kind in kinds)


def test_a_refit_reads_the_samples_of_the_pool(data: Data) -> None:
    figures = measure_refit(data, 12, 20)
    assert figures["refit_adapters_read"] == 12
    assert figures["refit_s"] > 0


def test_ratios_compare_the_projection_with_none_and_with_an_older_tree() -> None:
    measured = {
        "search_plain_ms": 2.0,
        "search_projected_ms": 3.0,
        "search_older_ms": 1.0,
        "project_ms": 1.0,
        "refit_s": 9.0,
    }
    assert ratios(measured) == {"search_over_plain": 1.5, "search_over_older": 3.0}
