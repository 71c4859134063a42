"""Retrieval: the encoder, the adapter index, and the Retriever that turns prompts into plans."""

from retriever_svc.asked_prompts import AskedPrompt, AskedReport
from retriever_svc.bulk import BulkEncoding
from retriever_svc.calibration import Abstain
from retriever_svc.competence import Region, Scorer
from retriever_svc.doctor import Collision, DoctorReport, DoctorStep
from retriever_svc.draws import Drawn, Draws
from retriever_svc.embedding import embed_groups, make_embeddings
from retriever_svc.encoder import Encoder
from retriever_svc.errors import EncoderUnusable, NoAdapterMatched, PlanGone, RetrieverError, StaleIndex, TooFewSamples
from retriever_svc.index import AdapterIndex, IndexSettings
from retriever_svc.learning import Learnt, Resampled
from retriever_svc.listing import Page, PageRequest
from retriever_svc.live_pool import IndexStats, LivePool
from retriever_svc.projection import Place, Point, PoolMap
from retriever_svc.projection_files import ProjectionFiles
from retriever_svc.reindex import ReindexStep
from retriever_svc.retriever import PoolSize, Retriever
from retriever_svc.route import Candidate, PinnedAdapter, Route, RouteRequest
from retriever_svc.saved_index import SavedIndexes
from retriever_svc.served_bases import BaseCounts, ServedBases
from retriever_svc.training_pairs import choose_tasks
from retriever_svc.weightings import WEIGHTINGS, Weighting
from retriever_svc.whitening import Whitening, fit_whitening

__all__ = [
    "WEIGHTINGS",
    "Abstain",
    "AdapterIndex",
    "AskedPrompt",
    "AskedReport",
    "BaseCounts",
    "BulkEncoding",
    "Candidate",
    "Collision",
    "DoctorReport",
    "DoctorStep",
    "Drawn",
    "Draws",
    "Encoder",
    "EncoderUnusable",
    "IndexSettings",
    "IndexStats",
    "Learnt",
    "LivePool",
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
    "Region",
    "ReindexStep",
    "Resampled",
    "Retriever",
    "RetrieverError",
    "Route",
    "RouteRequest",
    "SavedIndexes",
    "Scorer",
    "ServedBases",
    "StaleIndex",
    "TooFewSamples",
    "Weighting",
    "Whitening",
    "choose_tasks",
    "embed_groups",
    "fit_whitening",
    "make_embeddings",
]
