"""A Retriever over a few adapters on a plane."""

from __future__ import annotations

from collections.abc import Sequence

from lora_store.records import AdapterRecord
from retriever_svc import Retriever, Route, RouteRequest
from tests.retriever_svc.pool_fakes import FakeEncoder, OrdinaryRows, Source, live_pool, record_of

EAST, NORTH, NORTHEAST = (1.0, 0.0), (0.0, 1.0), (0.6, 0.8)
TABLE = {"east": EAST, "north": NORTH, "northeast": NORTHEAST, "west": (-1.0, 0.0)}
POOL = (record_of("e", EAST), record_of("n", NORTH), record_of("ne", NORTHEAST))


# Ordinary prompts that are far from every text of the plane's east and north.
SOUTHWEST = [(-0.6, -0.8), (-0.8, -0.6), (-0.7, -0.714), (-0.65, -0.76)]

# At this temperature adapters at right angles have weight. At the default one a companion so far away is left out.
TEMPERATURE = 1.0


def retriever_of(
    *records: AdapterRecord,
    encoder: FakeEncoder | None = None,
    ordinary: Sequence[Sequence[float]] | None = None,
    **options: object,
) -> Retriever:
    """Return a Retriever over these adapters. Without `ordinary` prompts there are no thresholds."""
    files = None if ordinary is None else OrdinaryRows(ordinary)
    pools = live_pool(encoder or FakeEncoder(TABLE), Source(*records), projections=files)
    return Retriever(pools, **{"temperature": TEMPERATURE} | options)


def route_one(retriever: Retriever, text: str = "east", **fields: object) -> Route:
    [answer] = retriever.route([RouteRequest(text, **fields)])
    assert isinstance(answer, Route)
    return answer
