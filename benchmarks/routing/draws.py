"""Measure what approvals catch: `python -m benchmarks.routing.draws`.

Each hand-written pool is shared by two owners in two ways. *Honest*: every second adapter belongs to the second owner,
whose adapters are approved one after another. *Copies in other words*: the second owner publishes the contents of every
adapter's samples again, in other wordings, and those that need no confirmation are approved. The table has the adapters
that need a confirmation, and the share of reworded prompts that the second owner's adapters then answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.paper.retrieval.ranking import embedded, records_of
from benchmarks.pool_scale import Source
from benchmarks.results_file import write_part
from benchmarks.routing.wording_pools import INPUT, REWORDED, Part, WordedAdapter, WordedPool, read_pools
from lora_store import AdapterRecord, Sample
from retriever_svc import Draws, Encoder, LivePool, ProjectionFiles, Retriever, Route, RouteRequest

_MOST_ADAPTERS = 40  # of a pool; the combinations of topics and formats have more
Texts = Mapping[str, Sequence[str]]
out = Console(width=160)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One pool and one way to share it. `drawn`: the second owner's share of reworded prompts."""

    pool: str
    way: str
    num_adapters: int
    num_confirmed: int
    drawn: float
    drawn_if_all: float


class Market:
    """Adapters of two owners, and the samples of each by name."""

    def __init__(self, encoder: Encoder, first: Texts, second: Texts) -> None:
        self._encoder, self._texts = encoder, {**first, **second}
        self.first = self._published(first, "first")
        self.second = self._published(second, "second")

    def _published(self, texts: Texts, tenant: str) -> list[AdapterRecord]:
        records = records_of(embedded(self._encoder, texts))
        return [replace(r, ref=replace(r.ref, tenant=tenant), approved=True, visibility="public") for r in records]

    def _retriever(self, records: Sequence[AdapterRecord]) -> Retriever:
        encoder = self._encoder
        source = Source([*self.first, *records])
        return Retriever(LivePool(lambda _: encoder, source, projections=ProjectionFiles(), projection="none"))

    def draws(self, record: AdapterRecord, approved: Sequence[AdapterRecord]) -> Draws:
        """Return what a version of the second owner would draw after these approvals."""
        retriever = self._retriever([*approved, record])
        measurement = retriever.draw_measurement("second", record.ref.name, self._samples)
        measurement.encoding.encode_all()
        return retriever.draws(measurement)

    def _samples(self, record: AdapterRecord) -> Sequence[Sample]:
        return [Sample(text) for text in self._texts[record.ref.name]]

    def share(self, records: Sequence[AdapterRecord], prompts: Sequence[str]) -> float:
        """Return the share of prompts that the second owner's adapters lead for a third tenant."""
        answers = self._retriever(records).route([RouteRequest(prompt, tenant="third") for prompt in prompts])
        plans = [answer.plan.adapters for answer in answers if isinstance(answer, Route)]
        return sum(bool(plan) and plan[0].ref.tenant == "second" for plan in plans) / len(prompts)


def in_other_words(adapter: WordedAdapter) -> list[str]:
    """Return the contents of an adapter's samples in its second and third wording in turn."""
    wordings = adapter.wordings[1:]
    return [wordings[place % len(wordings)].replace(INPUT, text) for place, text in enumerate(adapter.inputs)]


def measure(encoder: Encoder, pool: WordedPool) -> list[Outcome]:
    """Return the outcomes of one pool, whose adapters have samples of one wording."""
    one = {adapter.name: adapter.samples("one") for adapter in pool.adapters}
    names = sorted(one)
    honest = Market(encoder, {name: one[name] for name in names[::2]}, {name: one[name] for name in names[1::2]})
    copies = Market(encoder, one, {f"copy-{adapter.name}": in_other_words(adapter) for adapter in pool.adapters})
    prompts = [prompt.text for prompt in pool.of_kind(*REWORDED)]
    return [
        outcome_of(pool.name, "honest", honest, prompts, confirms=True),
        outcome_of(pool.name, "copies in other words", copies, prompts, confirms=False),
    ]


def outcome_of(pool: str, way: str, market: Market, prompts: Sequence[str], *, confirms: bool) -> Outcome:
    """Approve the second owner's adapters in turn. `confirms`: also those that need a confirmation."""
    approved: list[AdapterRecord] = []
    num_confirmed = 0
    for record in market.second:
        must = market.draws(record, approved).must_be_confirmed
        num_confirmed += must
        if confirms or not must:
            approved.append(record)
    shares = (market.share(records, prompts) for records in (approved, market.second))
    return Outcome(pool, way, len(market.second), num_confirmed, *shares)


def main(part: Annotated[str, typer.Option(help="tune or test")] = "test") -> None:
    """Measure every pool of a part, print the table and write the part of results/draws."""
    chosen: Part = "tune" if part == "tune" else "test"
    plain = Encoder(max_cached_texts=100_000)
    encoder = plain.projected(ProjectionFiles().shipped(plain.identity))
    pools = [pool for pool in read_pools(chosen) if len(pool.adapters) <= _MOST_ADAPTERS]
    table = Table("pool", "way", "adapters", "to be confirmed", "drawn", "drawn if all are confirmed")
    rows = [row for pool in pools for row in measure(encoder, pool)]
    for row in rows:
        shares = (f"{row.drawn:.1%}", f"{row.drawn_if_all:.1%}")
        table.add_row(row.pool, row.way, str(row.num_adapters), str(row.num_confirmed), *shares)
    with out.capture() as captured:
        out.print(table)
    out.print(table)
    figures = {
        f"{chosen}_{row.pool}_{row.way.replace(' ', '_')}_{name}": float(getattr(row, name))
        for row in rows
        for name in ("num_adapters", "num_confirmed", "drawn", "drawn_if_all")
    }
    write_part("draws", chosen, figures=figures, table=captured.get(), runs=list(map(asdict, rows)))


if __name__ == "__main__":
    typer.run(main)
