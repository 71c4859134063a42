"""Retrieval: the encoder, the adapter index, and the Retriever that turns prompts into plans."""

from retriever_svc.asked_prompts import AskedPrompt, AskedReport
from retriever_svc.bulk import BulkEncoding
from retriever_svc.calibration import Abstain
from retriever_svc.competence import Region, Scorer
from retriever_svc.doctor import AdapterFinding, Collision, DoctorReport, DoctorStep
from retriever_svc.draws import Drawn, DrawnAdapter, Draws
from retriever_svc.embedding import embed_groups, make_embeddings
from retriever_svc.encoder import Encoder
from retriever_svc.errors import (
    AdapterIncompatible,
    EncoderExists,
    EncoderUnusable,
    NoAdapterMatched,
    PlanGone,
    ProjectionUnusable,
    RetrieverError,
    RouteInvalid,
    StaleIndex,
    TooFewSamples,
    TrainingUnavailable,
)
from retriever_svc.index import AdapterIndex, Allowed, IndexSettings, Match
from retriever_svc.learning import Learnt, Resampled
from retriever_svc.listing import Page, PageRequest
from retriever_svc.live_pool import IndexStats, LivePool
from retriever_svc.projection import Cluster, Place, Point, PoolMap
from retriever_svc.projection_files import ProjectionFiles
from retriever_svc.reindex import ReindexStep
from retriever_svc.retriever import PoolSize, Retriever
from retriever_svc.route import Candidate, NearSample, PinnedAdapter, Route, RouteRequest
from retriever_svc.sample_source import SampleSource
from retriever_svc.saved_index import SavedIndexes, SavedLists
from retriever_svc.served_bases import BaseCounts, ServedBases
from retriever_svc.training_pairs import choose_tasks
from retriever_svc.weightings import WEIGHTINGS, Weighting
from retriever_svc.whitening import Whitening, fit_whitening

__all__ = [
    "WEIGHTINGS",
    "Abstain",
    "AdapterFinding",
    "AdapterIncompatible",
    "AdapterIndex",
    "Allowed",
    "AskedPrompt",
    "AskedReport",
    "BaseCounts",
    "BulkEncoding",
    "Candidate",
    "Cluster",
    "Collision",
    "DoctorReport",
    "DoctorStep",
    "Drawn",
    "DrawnAdapter",
    "Draws",
    "Encoder",
    "EncoderExists",
    "EncoderUnusable",
    "IndexSettings",
    "IndexStats",
    "Learnt",
    "LivePool",
    "Match",
    "NearSample",
    "NoAdapterMatched",
    "Page",
    "PageRequest",
    "PinnedAdapter",
    "Place",
    "PlanGone",
    "Point",
    "PoolMap",
    "PoolSize",
    "ProjectionFiles",
    "ProjectionUnusable",
    "Region",
    "ReindexStep",
    "Resampled",
    "Retriever",
    "RetrieverError",
    "Route",
    "RouteInvalid",
    "RouteRequest",
    "SampleSource",
    "SavedIndexes",
    "SavedLists",
    "Scorer",
    "ServedBases",
    "StaleIndex",
    "TooFewSamples",
    "TrainingUnavailable",
    "Weighting",
    "Whitening",
    "choose_tasks",
    "embed_groups",
    "fit_whitening",
    "make_embeddings",
]
