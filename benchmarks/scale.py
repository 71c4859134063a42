"""Derive machines and money for large loads from measured costs, and check that: `python -m benchmarks.scale`.

The costs are those of `benchmarks/results`. The share of adapters that a fleet must load is computed from Zipf's law,
simulated with the product's router and bank (`fleet_simulation.py`), and compared with the measured fleet of four
workers. Prices and the length of an answer are assumptions: see `--help`. About two minutes on one core.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.affinity import BANK_ADAPTERS, NUM_ADAPTERS, NUM_WORKERS, drawing
from benchmarks.engine_cases import Quick, console, shown
from benchmarks.fleet_simulation import Counts, Draw, Fleet, Simulation, digest_of
from benchmarks.results_file import RESULTS, write_results

MEASURED_RATE, MEASURED_ROWS, ANSWER_S = 40.0, 16, 0.3  # of the measured fleet; the time of an answer is assumed
ADAPTER_MB = 3.83  # rank 8 in all linear modules of Gemma-3-270M
BANK, HOST_GIB = 32, 1.0  # adapters of rank 8 in the default bank; the default host cache
K = 3
HOURS_A_MONTH = 730


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured on one machine with two cores. `tokens_s`: of a whole server with `auto`; times are of one core."""

    tokens_s: float
    encoder_ms: float
    search_ms: float
    load_ms: float
    index_mib: float

    @classmethod
    def measured(cls) -> Costs:
        """Read the costs from the committed results."""
        http = [row["HTTP, auto"] for row in _runs("http") if "HTTP, auto" in row]
        largest = max(_runs("pool_scale"), key=lambda row: int(row.get("adapters", 0)))
        return cls(
            tokens_s=statistics.median(http),
            encoder_ms=_figures("http")["encoder_p50_ms"],
            search_ms=_figures("pool_scale")["search_p50_ms_1e6"],
            load_ms=_figures("cluster")["cold_load_ms"],
            index_mib=float(largest["index_mib"]),
        )


@dataclass(frozen=True, slots=True)
class Assumed:
    """Assumptions that the reader may change. `busy`: the share of the rate at which machines are filled."""

    new_tokens: int
    price_hour: float
    busy: float
    exponent: float


def zipf(num_adapters: int, exponent: float) -> NDArray[np.float64]:
    """Return the probability of each adapter, the most popular first."""
    weights = np.arange(1, num_adapters + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def with_neighbours(chances: NDArray[np.float64], seed: int = 1) -> NDArray[np.float64]:
    """Return the probabilities where each request also uses the two neighbours on a random ring."""
    ring = np.random.default_rng(seed).permutation(chances)
    return (ring + np.roll(ring, 1) + np.roll(ring, -1)) / 3


def missed(chances: NDArray[np.float64], num_kept: float) -> float:
    """Return the share of requests for adapters that an LRU cache of `num_kept` does not have.

    Source: Che, Tung, Wang, "Hierarchical Web Caching Systems" (2002): adapter i is kept with probability
    1 - exp(-p_i T), where T is chosen so that these sum to `num_kept`.
    """
    if num_kept >= len(chances):
        return 0.0
    low, high = 0.0, 1.0
    while np.sum(-np.expm1(-chances * high)) < num_kept:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(-np.expm1(-chances * middle)) < num_kept else (low, middle)
    return float(np.sum(chances * np.exp(-chances * high)))


def needs_of(minute: float, num_adapters: int, costs: Costs, assumed: Assumed) -> dict[str, float]:
    """Return what a load of `minute` requests a minute needs. Every worker is a machine with two cores."""
    rate = minute / 60
    machines = int(np.ceil(rate * assumed.new_tokens / costs.tokens_s / assumed.busy))
    chances = with_neighbours(zipf(num_adapters, assumed.exponent))
    host = HOST_GIB * 1024**3 / (ADAPTER_MB * 1e6)
    bank_miss, store_miss = missed(chances, machines * BANK), missed(chances, machines * host)
    return {
        "machines": machines,
        "usd_hour": machines * assumed.price_hour,
        "usd_month": machines * assumed.price_hour * HOURS_A_MONTH,
        "usd_million": machines * assumed.price_hour / (60 * minute) * 1e6,
        "retriever_cores": rate * (costs.encoder_ms + costs.search_ms) / 1000 / assumed.busy,
        "index_gib": costs.index_mib / 1024 * num_adapters / 1e6,
        "bank_miss": bank_miss,
        "store_miss": store_miss,
        "store_reads_s": rate * K * store_miss,
        "store_mb_s": rate * K * store_miss * ADAPTER_MB,
        "loads_machine_s": rate * K * bank_miss / machines,
        "store_tb": num_adapters * ADAPTER_MB / 1e6,
    }


def simulated(fleet: Fleet, num_adapters: int, k: int, rate: float, num: int, *, is_affine: bool = True) -> Counts:
    """Simulate requests by Zipf's law, as the measured ones: k - 1 neighbours on a ring are added."""
    draw: Draw = drawing([digest_of(number) for number in range(num_adapters)], k)
    return Simulation(fleet, draw, is_affine=is_affine).run(rate, num + num // 4, num // 4)


def compared_with_measured(num: int) -> Iterator[tuple[str, float, float]]:
    """Yield (case, simulated share of cold loads, measured one) for the fleet of `benchmarks.affinity`."""
    [part] = [run for run in _runs("cluster") if run["part"] == "affinity"]
    measured = {(row["router"], row["k"]): row["cold_rate"] for row in part["rows"] if "router" in row}
    fleet = Fleet(NUM_WORKERS, BANK_ADAPTERS, 0, MEASURED_ROWS, ANSWER_S)
    for (router, k), cold in sorted(measured.items()):
        found = simulated(fleet, NUM_ADAPTERS, k, MEASURED_RATE, num, is_affine=router == "affinity")
        yield f"{router}, k = {k}", found.cold_share, float(cold)


def compared_with_formula(num: int) -> Iterator[tuple[str, float, float, float]]:
    """Yield (case, simulated misses of the bank, the formula's if each adapter is on one worker, and on two)."""
    for num_workers, num_adapters in ((4, 200), (16, 2_000), (64, 10_000)):
        fleet = Fleet(num_workers, BANK, 0, MEASURED_ROWS, ANSWER_S)
        rate = 0.5 * num_workers * MEASURED_ROWS / ANSWER_S / 4
        found = simulated(fleet, num_adapters, K, rate, num)
        chances = with_neighbours(zipf(num_adapters, 1.0))
        kept = num_workers * BANK
        yield (
            f"{num_workers} workers, {num_adapters:,} adapters",
            found.cold_share,
            *(missed(chances, kept / copies) for copies in (1, 2)),
        )


def needs_table(costs: Costs, assumed: Assumed) -> tuple[Table, dict[str, float]]:
    """Return the table of both loads, and its numbers by name."""
    table = Table(title=f"{assumed.new_tokens} new tokens, ${assumed.price_hour:g} an hour, {assumed.busy:.0%} busy")
    loads = {"1e4": 1e4, "1e6": 1e6}
    table.add_column("requests a minute, 1,000,000 adapters")
    found = {name: needs_of(minute, 1_000_000, costs, assumed) for name, minute in loads.items()}
    for name in loads:
        table.add_column(name, justify="right")
    for row in found["1e4"]:
        table.add_row(
            row, *[f"{needs[row]:,.3g}" if needs[row] < 100 else f"{needs[row]:,.0f}" for needs in found.values()]
        )
    return table, {f"{row}_{name}": needs[row] for name, needs in found.items() for row in needs}


def main(
    new_tokens: Annotated[int, typer.Option(help="tokens of an answer")] = 64,
    price_hour: Annotated[float, typer.Option(help="US dollars for an hour of a machine with two cores")] = 0.08,
    busy: Annotated[float, typer.Option(help="share of the measured rate at which machines are filled")] = 0.7,
    exponent: Annotated[float, typer.Option(help="of Zipf's law for the popularity of adapters")] = 1.0,
    requests: Annotated[int, typer.Option(help="simulated requests of each case")] = 8_000,
    quick: Quick = False,
) -> None:
    """Print the derivation and its checks, and write results/scale."""
    num = 200 if quick else requests
    costs, assumed = Costs.measured(), Assumed(new_tokens, price_hour, busy, exponent)
    needs, figures = needs_table(costs, assumed)
    against = Table(title="loads for each adapter of each request, 4 workers")
    for column in ("case", "simulated", "measured"):
        against.add_column(column, justify="left" if column == "case" else "right")
    rows: list[dict[str, Any]] = [{"costs": vars_of(costs)}]
    for case, cold, measured in compared_with_measured(num):
        against.add_row(case, f"{cold:.1%}", f"{measured:.1%}")
        rows.append({"case": case, "simulated": cold, "measured": measured})
    formula = Table(title="adapters that are not in a bank, k = 3")
    for column in ("case", "simulated", "formula, on one worker", "on two"):
        formula.add_column(column, justify="left" if column == "case" else "right")
    for case, cold, one, two in compared_with_formula(num):
        formula.add_row(case, *[f"{share:.1%}" for share in (cold, one, two)])
        rows.append({"case": case, "simulated": cold, "one_worker": one, "two_workers": two})
    text = "\n".join(shown(table) for table in (needs, against, formula))
    if quick:
        console.print("a trial run: nothing is written")
        return
    write_results("scale", figures=figures | {f"cost_{k}": v for k, v in vars_of(costs).items()}, table=text, runs=rows)


def vars_of(costs: Costs) -> dict[str, float]:
    return {name: getattr(costs, name) for name in Costs.__slots__}


def _figures(study: str) -> dict[str, float]:
    figures: dict[str, float] = _result(study)["figures"]
    return figures


def _runs(study: str) -> Sequence[dict[str, Any]]:
    runs: Sequence[dict[str, Any]] = _result(study)["runs"]
    return runs


def _result(study: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / study / "results.json").read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    typer.run(main)
