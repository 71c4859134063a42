"""One offline run: its input, its settings, its parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import pyarrow as pa

from deployments.batch.input import BatchInput, scan
from deployments.batch.output import BatchOutput, Manifest
from deployments.batch.rows import ANSWER, ANSWER_OF_SEVERAL, check_columns
from deployments.config.app import AppConfig
from deployments.config.parts import ModelSettings
from deployments.errors import BatchRefused
from deployments.json_types import JsonMapping, JsonObject
from gpu_worker.front.request.model_files import read_chat_template
from lora_store import LOCAL_TENANT, GenerationGone, Location, LoraStore, Snapshot
from lora_store.files import Files
from lora_store.pool_files import PoolState, StoredPool
from retriever_svc import BaseCounts

# Settings that affect answers. Others, such as threads and batch sizes, may change when a run is resumed.
_OF_MODEL = ("base_model", "base_model_name", "accepts_base", "template", "generation_config", "sampling_defaults")
_OF_APP = (*_OF_MODEL, "store_uri", "max_new_tokens", "public_requires_approval", "strict_fields")
_OTHERS_OF_RETRIEVAL = ("encoder_threads", "encoder_dtype", "max_waiting")
_OF_WORKER = ("engine", "dtype", "max_model_len", "bank_rank_rows", "quantization")  # the last of the native engine
_POOL = "_pool"  # a file of the output, which readers of parquet folders skip


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """Settings of a run. `defaults`: request fields for rows that lack them. `tenant`: who the run is for."""

    config: AppConfig
    input_uri: str
    output_uri: str
    part_rows: int = 256
    tenant: str = LOCAL_TENANT
    defaults: JsonMapping = field(default_factory=dict)

    @property
    def answer(self) -> pa.Schema:
        """The columns that the run adds to those of the input."""
        return ANSWER_OF_SEVERAL if self.config.models else ANSWER

    @property
    def engine_cpus(self) -> float:
        """Logical CPUs of the process with the engines of all base models."""
        return sum(config.worker_scaling.num_cpus for config in self.config.by_model.values())

    @property
    def engine_gpus(self) -> float:
        """GPUs of that process."""
        return sum(config.worker_scaling.num_gpus for config in self.config.by_model.values())


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
    began_at: datetime

    @property
    def num_rows_left(self) -> int:
        return sum(part.stop - part.start for part in self.parts)


def begin(settings: BatchSettings) -> BatchRun:
    """Start or resume a run, and find the missing parts. Raises: BatchRefused, StoreUnavailable."""
    if "://" not in settings.output_uri:  # processes of a cluster run in other folders
        settings = replace(settings, output_uri=str(Path(settings.output_uri).absolute()))
    try:
        output = BatchOutput(settings.output_uri)
    except ValueError as exc:
        raise BatchRefused(f"{settings.output_uri} cannot be written: {exc}") from exc
    check_devices(settings.config)
    source = scan(settings.input_uri)
    check_columns(source.schema, settings.answer)
    store = open_pool(settings.config)
    newest = store.snapshot().generation
    wanted = Manifest(generation=newest, input=_described(source), settings=_deciding(settings))
    manifest = output.begin(wanted)
    if manifest.generation > newest:
        raise BatchRefused(f"the run began at generation {manifest.generation}, but the store is at {newest}")
    done = output.done()
    starts = range(0, source.num_rows, settings.part_rows)
    parts = [Part(n, start, min(start + settings.part_rows, source.num_rows)) for n, start in enumerate(starts)]
    left = tuple(part for part in parts if part.number not in done)
    try:
        records = pool_of_run(store, settings, manifest.generation).records
    except GenerationGone as exc:
        raise BatchRefused(f"the run cannot be resumed: {exc}; start a new one in another output folder") from exc
    unserved = settings.config.served_models.bases.unserved(records.values())
    num_adapters = len(records) - sum(num for _, num in unserved)
    num_done = len(parts) - len(left)
    return BatchRun(
        settings,
        source,
        manifest.generation,
        num_adapters=num_adapters,
        unserved=unserved,
        parts=left,
        num_done=num_done,
        id=manifest.run,
        began_at=manifest.began_at,
    )


def pool_of_run(store: LoraStore, settings: BatchSettings, generation: int) -> Snapshot:
    """Return the pool as it was when the run began. What the tenant may use is kept with the run, as stores forget.

    Raises: GenerationGone if it was not kept, as by an earlier version; StoreUnavailable.
    """
    files = Files(Location(settings.output_uri))
    try:
        snapshot = store.snapshot_at(generation)
    except GenerationGone:
        if (kept := files.read(_POOL)) is None:
            raise
        return PoolState.from_parquet(kept).snapshot
    if not files.contains(_POOL):
        files.write(_POOL, PoolState(snapshot).usable_by(settings.tenant).to_parquet())
    return snapshot


def open_pool(config: AppConfig) -> LoraStore:
    """Return the store. Raises: BatchRefused if it has no pool, where a server would begin one; StoreUnavailable."""
    try:
        StoredPool(config.store_uri)
    except ValueError as exc:
        raise BatchRefused(f"{exc}; name the store of a server, or publish to this one first") from exc
    return LoraStore(config.store_uri, accepts_base=config.served_models.accepted_names)


def check_devices(config: AppConfig) -> None:
    """Raises: BatchRefused if the engines of several base models do not fit on the one GPU of their process."""
    shares = [model.worker_scaling.num_gpus for model in config.models if model.worker_scaling.num_gpus]
    if len(shares) > 1 and sum(shares) > 1:
        raise BatchRefused(
            f"models: the num_gpus of their workers add up to {sum(shares):g}, and an offline run has one GPU for all;"
            " set worker_scaling.ray_actor_options.num_gpus of each to its share, as 0.5"
        )


def _described(source: BatchInput) -> JsonObject:
    names = [file.path.rpartition("/")[2] for file in source.files]
    return {name: file.sha256 for name, file in zip(names, source.files, strict=True)}


def _deciding(settings: BatchSettings) -> JsonObject:
    config = settings.config.model_dump(mode="json")
    deciding: JsonObject = {name: config[name] for name in _OF_APP}
    deciding["retrieval"] = {
        name: value for name, value in config["retrieval"].items() if name not in _OTHERS_OF_RETRIEVAL
    }
    deciding["worker"] = _pick_worker_settings(config["worker"])
    deciding["chat_template"] = _chat_template(settings.config)
    if config["models"]:  # a manifest may lack a setting, so that of a run with fewer of them must differ in this one
        deciding["base_model"] = [model["base_model"] for model in config["models"]]
    for number, model in enumerate(config["models"]):
        deciding[f"models.{number}"] = {
            **{name: model[name] for name in _OF_MODEL},
            "worker": _pick_worker_settings(model["worker"]),
            "chat_template": _chat_template(settings.config.models[number]),
        }
    deciding["learning: apply"] = settings.config.learning == "apply"  # "off" and "observe" answer alike
    deciding["owner_names"] = settings.config.owner_names
    deciding["defaults"] = dict(settings.defaults)
    return deciding | {"tenant": settings.tenant, "part_rows": settings.part_rows}


def _chat_template(model: ModelSettings) -> str | None:
    """Return the digest of the template's text, which may be edited in its file."""
    if model.chat_template is None:
        return None
    return f"sha256:{hashlib.sha256(read_chat_template(model.chat_template).encode()).hexdigest()}"


def _pick_worker_settings(worker: JsonObject) -> JsonObject:
    return {name: worker[name] for name in _OF_WORKER if name in worker}
