"""One offline run: its input, its settings, its parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from deployments.batch.input import BatchInput, scan
from deployments.batch.output import BatchOutput, Manifest
from deployments.batch.rows import check_columns
from deployments.config.app import AppConfig
from deployments.config.served_model import ServedModel
from deployments.errors import BatchRefused
from deployments.json_types import JsonMapping, JsonObject
from lora_store import LOCAL_TENANT, GenerationGone, LoraStore
from retriever_svc import BaseCounts

# Settings that affect answers. Others, such as threads and batch sizes, may change when a run is resumed.
_OF_APP = (
    *("base_model", "base_model_name", "accepts_base", "store_uri", "template", "max_new_tokens", "generation_config"),
    "sampling_defaults",
    "public_requires_approval",
)
_OF_RETRIEVAL = (
    *("encoder", "projection", "strategy", "k", "weights", "strategy_options"),
    *("abstain", "min_score", "fallback"),
)
_OF_WORKER = ("engine", "dtype", "max_model_len", "bank_rank_rows")


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """Settings of a run. `defaults`: request fields for rows that lack them. `tenant`: who the run is for."""

    config: AppConfig
    input_uri: str
    output_uri: str
    part_rows: int = 256
    tenant: str = LOCAL_TENANT
    defaults: JsonMapping = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start` to `stop` of the input."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class BatchRun:
    """A run in progress. All its parts are answered from one generation of the pool."""

    settings: BatchSettings
    source: BatchInput
    generation: int
    num_adapters: int
    unserved: BaseCounts  # adapters that were made for other base models
    parts: tuple[Part, ...]
    num_done: int
    id: str

    @property
    def num_rows_left(self) -> int:
        return sum(part.stop - part.start for part in self.parts)


def begin(settings: BatchSettings) -> BatchRun:
    """Start or resume a run, and find the missing parts. Raises: BatchRefused, StoreUnavailable."""
    refuse_several(settings.config)
    source = scan(settings.input_uri)
    check_columns(source.schema)
    store = open_store(settings.config.store_uri, settings.config.served_model)
    newest = store.snapshot().generation
    output = BatchOutput(settings.output_uri)
    manifest = output.begin(Manifest(generation=newest, input=_described(source), settings=_deciding(settings)))
    if manifest.generation > newest:
        raise BatchRefused(f"the run began at generation {manifest.generation}, but the store is at {newest}")
    starts = range(0, source.num_rows, settings.part_rows)
    parts = [Part(n, start, min(start + settings.part_rows, source.num_rows)) for n, start in enumerate(starts)]
    done = output.done()
    left = tuple(part for part in parts if part.number not in done)
    try:
        records = store.snapshot_at(manifest.generation).records
    except GenerationGone as exc:
        raise BatchRefused(f"the run cannot be resumed: {exc}; start a new one in another output folder") from exc
    unserved = settings.config.served_model.bases.unserved(records.values())
    num_adapters = len(records) - sum(num for _, num in unserved)
    num_done = len(parts) - len(left)
    return BatchRun(settings, source, manifest.generation, num_adapters, unserved, left, num_done, manifest.run)


def refuse_several(config: AppConfig) -> None:
    """Raises: BatchRefused for settings with `models`: an offline run loads one base model."""
    if config.models:
        raise BatchRefused(
            "models: an offline run answers with one base model; give it a settings file with base_model instead"
        )


def open_store(uri: str, model: ServedModel) -> LoraStore:
    """Open the pool at `uri`, whose adapters are of the served base model."""
    return LoraStore(uri, accepts_base=model.accepted_names)


def _described(source: BatchInput) -> JsonObject:
    names = [file.path.rpartition("/")[2] for file in source.files]
    return {name: file.sha256 for name, file in zip(names, source.files, strict=True)}


def _deciding(settings: BatchSettings) -> JsonObject:
    config = settings.config.model_dump(mode="json")
    deciding: JsonObject = {name: config[name] for name in _OF_APP}
    deciding["retrieval"] = {name: config["retrieval"][name] for name in _OF_RETRIEVAL}
    deciding["worker"] = {name: config["worker"][name] for name in _OF_WORKER}
    deciding["owner_names"] = settings.config.owner_names
    deciding["defaults"] = dict(settings.defaults)
    return deciding | {"tenant": settings.tenant, "part_rows": settings.part_rows}
