"""The derivation of machines and money, compared with a case computed by hand and with a slow loop."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.results_file import RESULTS
from benchmarks.scale import ADAPTER_MB, BANK, HOST_GIB, Assumed, Costs, missed, needs_of, with_neighbours, zipf

COSTS = Costs(tokens_s=100.0, encoder_ms=15.0, search_ms=5.0, load_ms=40.0, index_mib=2048.0)


def test_a_tiny_case_by_hand() -> None:
    """600 requests a minute of 20 tokens are 200 tokens/s: at half of 100 a machine, four machines.

    10 requests/s x 20 ms at half load are 0.4 cores of the encoder. 100 adapters fit four banks of 32.
    """
    found = needs_of(600, 100, COSTS, Assumed(new_tokens=20, price_hour=0.5, busy=0.5, exponent=1.0))
    assert (found["machines"], found["usd_hour"]) == (4, 2.0)
    assert found["usd_month"] == pytest.approx(1460.0)
    assert found["usd_million"] == pytest.approx(2.0 / 36_000 * 1e6)
    assert found["retriever_cores"] == pytest.approx(0.4)
    assert found["index_gib"] == pytest.approx(2.0 / 10_000)
    assert (found["bank_miss"], found["store_miss"], found["store_reads_s"]) == (0.0, 0.0, 0.0)
    assert found["store_tb"] == pytest.approx(100 * ADAPTER_MB / 1e6)


def test_adapters_beyond_the_banks_are_loaded_and_those_beyond_host_memory_read_from_the_store() -> None:
    """All adapters are equally popular, so the share of hits is the share of adapters that fit the bank."""
    num, assumed = 10_000, Assumed(new_tokens=20, price_hour=0.5, busy=0.5, exponent=0.0)
    found = needs_of(600, num, COSTS, assumed)
    host = HOST_GIB * 1024**3 / (ADAPTER_MB * 1e6)
    assert found["bank_miss"] == pytest.approx(1 - 4 * BANK / num)
    assert found["store_miss"] == pytest.approx(1 - 4 * host / num)
    assert found["store_reads_s"] == pytest.approx(10 * 3 * found["store_miss"])
    assert found["store_mb_s"] == pytest.approx(found["store_reads_s"] * ADAPTER_MB)
    assert found["loads_machine_s"] == pytest.approx(10 * 3 * found["bank_miss"] / 4)


def test_zipfs_law_and_its_neighbours() -> None:
    assert zipf(3, 1.0) == pytest.approx(np.array([6, 3, 2]) / 11)
    assert with_neighbours(zipf(3, 1.0)) == pytest.approx(np.full(3, 1 / 3)), (
        "on a ring of three each has two neighbours"
    )
    assert with_neighbours(zipf(50, 1.0)).sum() == pytest.approx(1.0)


@pytest.mark.parametrize(("num_kept", "exponent"), [(5, 1.0), (40, 1.0), (20, 0.6)])
def test_the_formula_agrees_with_an_lru_list(num_kept: int, exponent: float) -> None:
    chances = zipf(100, exponent)
    kept: OrderedDict[int, None] = OrderedDict()
    num_missed, draws = 0, random.Random(0).choices(range(100), weights=chances.tolist(), k=12_000)
    for number in draws:
        num_missed += number not in kept
        kept[number] = kept.pop(number, None)
        if len(kept) > num_kept:
            kept.popitem(last=False)
    assert missed(chances, num_kept) == pytest.approx(num_missed / len(draws), abs=0.015)


def test_nothing_is_missed_where_everything_fits_and_everything_where_nothing_is_kept() -> None:
    chances = zipf(10, 1.0)
    assert missed(chances, 10) == 0.0
    assert missed(chances, 1e-6) == pytest.approx(1.0, abs=1e-5)


def test_the_committed_results_have_the_costs() -> None:
    costs = Costs.measured()
    assert costs.tokens_s > 100 and 1 < costs.encoder_ms < 100 and 0 < costs.search_ms < 10 and costs.index_mib > 1000


def test_the_committed_derivation_uses_the_committed_measurements() -> None:
    figures = json.loads((RESULTS / "scale" / "results.json").read_text())["figures"]
    assert {name: figures[f"cost_{name}"] for name in asdict(Costs.measured())} == asdict(Costs.measured())
