"""The tables about scale and cost, from finished results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs.generate.markdown import table

_RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "scale" / "results.json"
_LOADS = ("1e4", "1e6")
_COSTS = {
    "tokens_s": "tokens per second of one machine with two cores, `model: auto` over HTTP, 32 streams",
    "encoder_ms": "added by a new text to a request for a route, ms",
    "search_ms": "search among 1,000,000 adapters, ms",
    "load_ms": "added to the first token by an adapter from the store, ms",
    "index_mib": "index of 1,000,000 adapters, MiB",
}
_NEEDS = {
    "machines": "machines with two cores",
    "usd_hour": "US dollars an hour",
    "usd_month": "US dollars a month of 730 hours",
    "usd_million": "US dollars for a million requests",
    "retriever_cores": "cores for retrievers, part of the machines",
    "index_gib": "index in the memory of each retriever, GiB",
    "bank_miss": "share of adapters that are in no bank",
    "loads_machine_s": "adapters brought into the bank, a second and machine",
    "store_miss": "share of adapters that are in no host memory either",
    "store_reads_s": "reads of the store a second",
    "store_mb_s": "MB a second from the store",
    "store_tb": "all adapters in the store, TB",
}


def scale_costs() -> str:
    """Return the measured costs, and the texts a second that follow from two of them."""
    figures = _results()["figures"]
    rows = [(text, _number(figures[f"cost_{name}"])) for name, text in _COSTS.items()]
    texts_s = 1000 / (figures["cost_encoder_ms"] + figures["cost_search_ms"])
    rows.append(("new texts that one core encodes and searches, a second", _number(texts_s)))
    return table(("measured", ""), rows)


def scale_needs() -> str:
    """Return what two loads need."""
    figures = _results()["figures"]
    rows = [(text, *[_number(figures[f"{name}_{load}"]) for load in _LOADS]) for name, text in _NEEDS.items()]
    return table(("requests a minute, 1,000,000 adapters", "10,000", "1,000,000"), rows)


def scale_measured() -> str:
    """Return the simulated fleet of four workers next to the measured one."""
    rows = [run for run in _results()["runs"] if "measured" in run]
    cells = [(run["case"], _percent(run["simulated"]), _percent(run["measured"])) for run in rows]
    return table(("loads from the store for each adapter of each request", "simulated", "measured"), cells)


def scale_formula() -> str:
    """Return simulated fleets next to the formula."""
    rows = [run for run in _results()["runs"] if "one_worker" in run]
    shares = ("simulated", "one_worker", "two_workers")
    cells = [(run["case"], *[_percent(run[share]) for share in shares]) for run in rows]
    return table(("adapters that are not in the bank", "simulated", "each on one worker", "each on two"), cells)


def _results() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_RESULTS.read_text(encoding="utf-8"))
    return content


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 10 and value != int(value) else f"{value:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
