"""Retrieval: the encoder, the adapter index, and the Retriever that turns prompts into plans."""

from retriever_svc.calibration import calibrate_floor
from retriever_svc.encoder import Encoder, embed_samples
from retriever_svc.errors import (
    EncoderUnusable,
    NoAdapterMatched,
    NothingToEmbed,
    RetrieverError,
    RouteInvalid,
    StaleIndex,
)
from retriever_svc.index import AdapterIndex, Match
from retriever_svc.retriever import Retriever
from retriever_svc.route import Candidate, Route, RouteRequest

__all__ = [
    "AdapterIndex",
    "Candidate",
    "Encoder",
    "EncoderUnusable",
    "Match",
    "NoAdapterMatched",
    "NothingToEmbed",
    "Retriever",
    "RetrieverError",
    "Route",
    "RouteInvalid",
    "RouteRequest",
    "StaleIndex",
    "calibrate_floor",
    "embed_samples",
]
