"""A Retriever over a few adapters on a plane."""

from __future__ import annotations

from lora_store.records import AdapterRecord
from retriever_svc import Retriever, Route, RouteRequest
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, live_pool, record_of

EAST, NORTH, NORTHEAST = (1.0, 0.0), (0.0, 1.0), (0.6, 0.8)
TABLE = {"east": EAST, "north": NORTH, "northeast": NORTHEAST, "west": (-1.0, 0.0)}
POOL = (record_of("e", EAST), record_of("n", NORTH), record_of("ne", NORTHEAST))


def retriever_of(*records: AdapterRecord, encoder: FakeEncoder | None = None, **options: object) -> Retriever:
    return Retriever(live_pool(encoder or FakeEncoder(TABLE), Source(*records)), **options)


def route_one(retriever: Retriever, text: str = "east", **fields: object) -> Route:
    [answer] = retriever.route([RouteRequest(text, **fields)])
    assert isinstance(answer, Route)
    return answer
