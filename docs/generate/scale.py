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


def fleet_queues() -> str:
    """Return how the simulated fleet fares with queues and reports of different ages."""
    head = ("queues and reports", "prefixes found", "adapters not in the bank", "waits, p99 s", "busiest worker / mean")
    cells = [
        (
            row["case"],
            *map(_percent, (row["prefix_hits"], row["bank_misses"])),
            *map(_number, (row["wait_p99_s"], row["busiest"])),
        )
        for row in _fleet("simulated")["rows"]
        if "case" in row
    ]
    return table(head, cells)


def fleet_texts() -> str:
    """Return how retrievers carry new texts."""
    rows = [row for row in _fleet("simulated")["rows"] if "retrievers" in row]
    head = ("Retriever replicas", "new texts a second", "encoders busy", "delay, p50 ms", "delay, p99 ms")
    cells = [
        (
            str(row["retrievers"]),
            f"{row['rate']:,}",
            _percent(row["busy"]),
            *map(_number, (row["p50_ms"], row["p99_ms"])),
        )
        for row in rows
    ]
    return table(head, cells)


def _fleet(part: str) -> dict[str, Any]:
    content = json.loads((_RESULTS.parents[1] / "fleet" / "results.json").read_text(encoding="utf-8"))
    [found] = [run for run in content["runs"] if run["part"] == part]
    return dict(found)


def _results() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_RESULTS.read_text(encoding="utf-8"))
    return content


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 10 and value != int(value) else f"{value:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
