"""The application's configuration: the only code that reads YAML or environment variables."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deployments.config.source_prefixes import SourcePrefix
from deployments.scaling.settings import ScalingSettings
from gpu_worker.config import DEFAULT_CACHE_DIR, WorkerConfig
from gpu_worker.errors import WorkerConfigInvalid
from gpu_worker.request.request import DEFAULT_MAX_TOKENS
from lora_store import Visibility, is_valid_name
from lora_store.location import Location
from retriever_svc.encoder_files import DEFAULT_MODEL as DEFAULT_ENCODER

FORM_OVERHEAD_BYTES = 1 << 20  # boundaries, headers and fields of an upload, beside its files
EVERY_TENANT = "*"  # in source_prefixes
_ROUTING_STATS_PERIOD_S = 1.0  # how often each worker is asked what it holds
_NAME = r"^[A-Za-z0-9._-]{1,64}$"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorkerSettings(_Settings):
    """The engine of one worker replica; see `gpu_worker.config.WorkerConfig`."""

    device: Literal["cpu", "cuda"] = "cpu"  # cuda: with `num_gpus` in worker_scaling
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    num_threads: int | None = Field(default=None, ge=1)  # None: the CPUs the worker's process may use
    lora_products: Literal["auto", "torch"] = "auto"  # auto: by the compiled kernel where there is one, on the CPU
    bank_rank_rows: int = Field(default=256, ge=1)
    max_batch_size: int = Field(default=32, ge=1)
    max_model_len: int = Field(default=2048, ge=1)
    kv_tokens: int | None = Field(default=None, ge=1)  # None: every row at its longest, or what the device has room for
    max_step_tokens: int = Field(default=1024, ge=1)
    max_chunk_tokens: int | None = Field(default=None, ge=1)  # of prompts beside decoding rows; None: 192 on the CPU
    max_waiting: int = Field(default=2048, ge=1)
    max_wait_s: float = Field(default=90, gt=0)
    host_cache_bytes: int = Field(default=1 << 30, ge=0)
    stream_interval_ms: float = Field(default=25, ge=0)
    wedged_after_s: float = Field(default=120, gt=0)  # a step that takes longer hangs: the replica is replaced
    niceness: int = Field(default=5, ge=0, le=19)  # of the engine's thread: on shared cores the door comes first


class RetrievalSettings(_Settings):
    """Defaults of `model: auto`; a request's `lora` object overrides them."""

    encoder: str = DEFAULT_ENCODER
    encoder_threads: int | None = Field(default=None, ge=1)
    strategy: Literal["selection", "mixture", "fusion"] = "mixture"
    k: int = Field(default=3, ge=1, le=16)
    weights: Literal["uniform", "softmax"] = "softmax"  # uniform lost half the right answers: benchmarks/README.md
    softmax_temperature: float = Field(default=0.05, gt=0)
    min_score: float | None = None  # None: calibrated, see retriever_svc/calibration.py
    fallback: Literal["base", "error"] = "base"
    batch_size: int = Field(default=32, ge=1)  # texts, of about 2,048 tokens together at most
    batch_wait_s: float = Field(default=0.0, ge=0)  # what comes while a batch is encoded is the next one anyway
    max_waiting: int = Field(default=4096, ge=256)  # texts before one replica's encoder; others' may take their places
    poll_interval_s: float = Field(default=3.0, gt=0)  # how late a replica sees a commit it was not told of


class AppConfig(_Settings):
    """Everything `build_app` needs. Unknown keys and bad values stop start-up."""

    base_model: str = "gemma-3-270m"  # the packaged default, a Hugging Face id, or a local folder
    base_model_name: str = Field(default="", pattern=r"^$|" + _NAME)  # as clients name it; default: last path part
    accepts_base: tuple[str, ...] = ()  # other names of this base that an adapter's config may carry
    store_uri: str = "loraretriever-pool"
    cache_dir: Path = DEFAULT_CACHE_DIR
    template: Literal["alpaca", "chat"] = "alpaca"
    # Whether loopback clients may publish folders of the server's file system. None: where there are no keys. With keys
    # a key that may publish need not be its operator's, and `kubectl port-forward` is a loopback client.
    publish_paths: bool | None = None
    # Names that requests may carry in `Host`, without port: a reverse proxy's, this machine's. Loopback names and IP
    # addresses always may. With keys an empty list means any name.
    allowed_hosts: tuple[str, ...] = ()
    allow_remote_publish: bool = False  # whether, without keys, clients of other machines may change the pool
    keys_file: Path | None = None  # callers by their API keys; None: everybody is the local tenant
    keys_missing_grace_s: float = Field(default=300, ge=0)  # how long keys stay valid while keys_file is missing
    public_requires_approval: bool = False  # others' `auto` finds a public adapter once approved; True where keys are
    encoders: tuple[str, ...] = ()  # with keys a reindex may name these and retrieval.encoder, from any machine
    owner_names: bool = False  # others' public adapters are named as owner/name alone; True where keys are
    admins_approve_own: bool = False  # whether, with keys, an admin may approve adapters of its own tenant
    # s3://, gs:// or file:// URIs below which adapters may be published from: by tenant, "*" being every one. A list of
    # them means every tenant, and is refused with keys, which other tenants have.
    source_prefixes: dict[str, tuple[str, ...]] | tuple[str, ...] = ()
    max_upload_bytes: int = Field(default=512 << 20, ge=1)  # of one adapter's files, uploaded or copied from a source
    # Of all uploads that one Ingress replica holds at once. With keys a tenant beyond `max_upload_bytes` holds at most
    # as much as then remains free.
    max_upload_total_bytes: int = Field(default=1 << 30, ge=1)
    # Of uploads and sources that one Store replica checks at once: others wait for a minute, then are a 503.
    max_staging_bytes: int = Field(default=1 << 30, ge=1)
    # Of all other bodies it holds; one has 4 MiB. With keys one tenant holds at most as much as then remains free.
    max_body_total_bytes: int = Field(default=256 << 20, ge=4 << 20)
    max_in_flight: int = Field(default=1024, ge=1)  # requests one Ingress replica works on; above it answers 429
    max_request_s: float = Field(default=600, gt=0)  # the longest a request may take, whatever its `timeout_s`
    max_new_tokens: int = Field(default=8192, ge=DEFAULT_MAX_TOKENS)  # of one answer; the context bounds it too
    store_object_cache_bytes: int = Field(default=256 << 20, ge=0)  # weights kept in Ray's object store for workers
    disk_cache_bytes: int = Field(default=4 << 30, ge=0)  # a worker's copy of a remote store's weights
    # Start although Ray asks for no token: whoever reaches one of its ports can then run code as this server.
    allow_unauthenticated_ray: bool = False
    preload: tuple[
        Path, ...
    ] = ()  # adapter folders, or folders of them: names that are not live are published at start
    worker: WorkerSettings = WorkerSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    ingress_scaling: ScalingSettings = ScalingSettings(
        max_ongoing_requests=10_000, max_queued_requests=-1, target_ongoing_requests=500
    )
    # Many requests: those that wait for the encoder do so in the replica's own queue, where tenants take turns.
    retriever_scaling: ScalingSettings = ScalingSettings(max_ongoing_requests=10_000, target_ongoing_requests=64)
    store_scaling: ScalingSettings = ScalingSettings(max_ongoing_requests=64)
    worker_scaling: ScalingSettings = ScalingSettings(num_cpus=1, max_ongoing_requests=2112, target_ongoing_requests=48)
    worker_target_waiting_tokens: int = Field(default=8192, ge=1)  # in one engine's queue; more ask for more workers
    wake_timeout_s: float = Field(default=120, gt=0)  # how long a request is held where no worker runs

    @model_validator(mode="before")
    @classmethod
    def _keys_change_defaults(cls, settings: Any) -> Any:
        """With keys there are other tenants, whose `auto` or whose withdrawn names a publisher could draw to itself."""
        if isinstance(settings, dict) and settings.get("keys_file") is not None:
            return {"public_requires_approval": True, "owner_names": True} | settings
        return settings

    @model_validator(mode="after")
    def _base_has_a_name(self) -> Self:
        name = self.served_base_name
        if name == "auto" or not re.fullmatch(_NAME, name):
            raise ValueError(f"{name!r} cannot be asked for as a model; set base_model_name")
        return self

    @model_validator(mode="after")
    def _worker_could_start(self) -> Self:
        try:
            self.worker_config()
        except WorkerConfigInvalid as exc:
            raise ValueError(str(exc)) from exc
        return self

    @model_validator(mode="after")
    def _device_is_placed(self) -> Self:
        device, num_gpus = self.worker.device, self.worker_scaling.num_gpus
        if (device == "cuda") != (num_gpus > 0):
            raise ValueError(
                f"worker.device is {device} and worker_scaling.num_gpus {num_gpus:g}: set both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _bounds_fit_each_other(self) -> Self:
        if self.max_upload_total_bytes < self.max_upload_bytes + FORM_OVERHEAD_BYTES:
            raise ValueError(f"max_upload_total_bytes is below one upload: max_upload_bytes + {FORM_OVERHEAD_BYTES}")
        if self.max_staging_bytes < self.max_upload_bytes:
            raise ValueError(f"max_staging_bytes ({self.max_staging_bytes}) is below max_upload_bytes: set it higher")
        for scaling in (self.ingress_scaling, self.worker_scaling):
            if scaling.graceful_shutdown_timeout_s < self.max_request_s:
                raise ValueError("graceful_shutdown_timeout_s of Ingress and Worker is at least max_request_s")
        return self

    @model_validator(mode="after")
    def _only_workers_sleep(self) -> Self:
        for name in ("ingress_scaling", "retriever_scaling", "store_scaling"):
            if getattr(self, name).min_replicas == 0:
                raise ValueError(f"{name}: min_replicas is at least 1; only workers may scale to zero")
        return self

    @field_validator("store_uri")
    @classmethod
    def _absolute(cls, uri: str) -> str:
        """Replicas run in folders of their own, so a relative path is resolved where the application is built."""
        return Location(uri if "://" in uri else str(Path(uri).expanduser().resolve())).uri

    @field_validator("source_prefixes")
    @classmethod
    def _prefixes_can_be_compared(
        cls, prefixes: dict[str, tuple[str, ...]] | tuple[str, ...]
    ) -> dict[str, tuple[str, ...]] | tuple[str, ...]:
        by_tenant = prefixes if isinstance(prefixes, dict) else {EVERY_TENANT: prefixes}
        for tenant, allowed in by_tenant.items():
            if tenant != EVERY_TENANT and not is_valid_name(tenant):
                raise ValueError(f"{tenant!r} is neither a tenant's name nor {EVERY_TENANT!r}")
            for prefix in allowed:
                SourcePrefix.parse(prefix)
        return prefixes

    @model_validator(mode="after")
    def _prefixes_name_their_tenants(self) -> Self:
        if self.keys_file is not None and self.source_prefixes and not isinstance(self.source_prefixes, dict):
            raise ValueError(
                "source_prefixes is a list, which would let every tenant read below them; with keys_file, give them by "
                f"tenant, as {{acme: [...]}}, or as {{'{EVERY_TENANT}': [...]}} where all may"
            )
        return self

    @field_validator("allowed_hosts")
    @classmethod
    def _plain_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", host):
                raise ValueError(f"{host!r} must be a host's name alone, without scheme, port and wildcards")
        return tuple(host.lower().removesuffix(".") for host in hosts)

    @field_validator("keys_file")
    @classmethod
    def _absolute_file(cls, path: Path | None) -> Path | None:
        """Links stay: what they lead to changes when Kubernetes swaps a secret."""
        return None if path is None else path.expanduser().absolute()

    @field_validator("preload")
    @classmethod
    def _absolute_paths(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(path.expanduser().resolve() for path in paths)

    @property
    def may_publish_paths(self) -> bool:
        return self.keys_file is None if self.publish_paths is None else self.publish_paths

    @property
    def default_visibility(self) -> Visibility:
        """Of a new name whose publisher says nothing: with keys there are others who could see it."""
        return "public" if self.keys_file is None else "private"

    def source_prefixes_of(self, tenant: str) -> tuple[str, ...]:
        """Return the URIs below which `tenant` may publish from."""
        if not isinstance(self.source_prefixes, dict):
            return self.source_prefixes
        return (*self.source_prefixes.get(tenant, ()), *self.source_prefixes.get(EVERY_TENANT, ()))

    @property
    def served_base_name(self) -> str:
        return self.base_model_name or self.base_model.rstrip("/").rpartition("/")[2]

    @property
    def accepted_bases(self) -> frozenset[str]:
        """Every `base_model_name_or_path` an adapter may carry."""
        return frozenset({self.base_model, self.served_base_name, *self.accepts_base})

    @property
    def weights_cache(self) -> tuple[Path, int] | None:
        """(folder, quota in bytes) of a worker's disk cache, where the store is not a folder itself."""
        if self.disk_cache_bytes == 0 or Location(self.store_uri).is_local:
            return None
        return self.cache_dir / "weights", self.disk_cache_bytes

    @property
    def workers_may_sleep(self) -> bool:
        return self.worker_scaling.min_replicas == 0

    def worker_options(self) -> dict[str, Any]:
        """The keywords of the Worker's `Deployment.options`: its own policy, and a router that knows what it holds."""
        policy_kwargs = {"target_waiting_tokens": self.worker_target_waiting_tokens}
        policy = {
            "policy_function": "deployments.scaling.autoscaling_policy:WorkerScaling",
            "policy_kwargs": policy_kwargs,
        }
        router = {
            "request_router_class": "deployments.scaling.adapter_affinity_router:AdapterAffinityRouter",
            "request_routing_stats_period_s": _ROUTING_STATS_PERIOD_S,
        }
        return self.worker_scaling.options(policy) | {"request_router_config": router}

    @property
    def num_logical_cpus(self) -> int:
        """What all replicas together ask for at most. Logical: two real cores hold many."""
        scalings = (self.ingress_scaling, self.retriever_scaling, self.store_scaling, self.worker_scaling)
        return math.ceil(sum(scaling.max_replicas * scaling.num_cpus for scaling in scalings)) + 1  # 1: Serve's own

    def worker_config(self) -> WorkerConfig:
        settings = self.worker.model_dump(exclude={"stream_interval_ms", "niceness", "wedged_after_s"})
        num_gpus = self.worker_scaling.num_gpus
        share = num_gpus if 0 < num_gpus < 1 else 1.0  # Ray places as many such workers on one GPU as fit
        return WorkerConfig(base_model=self.base_model, cache_dir=self.cache_dir, device_share=share, **settings)


def load_config(path: Path | None, **changes: Any) -> AppConfig:
    """The YAML file's settings with `changes` over them. Raises: ValueError, naming the key or the line."""
    try:
        settings = (yaml.safe_load(path.read_text()) if path is not None else None) or {}
    except yaml.YAMLError as exc:
        raise ValueError(f"{path} is no YAML: {exc}") from exc
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings by name, got a {type(settings).__name__}")
    return AppConfig.model_validate(settings | changes)
