"""The settings of the application."""

from __future__ import annotations

import math
import os
import re
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Le
from pydantic import Field, SecretStr, field_validator, model_validator

from deployments.config.parts import RetrievalSettings as RetrievalSettings
from deployments.config.parts import SamplingDefaults as SamplingDefaults
from deployments.config.parts import Settings
from deployments.config.parts import WorkerSettings as WorkerSettings
from deployments.config.settings_errors import refuse_renamed
from deployments.config.source_prefixes import SourcePrefix
from deployments.json_types import JsonObject
from deployments.scaling.settings import ScalingSettings
from gpu_worker.config import (
    PACKAGED_ALIASES,
    PACKAGED_MODEL,
    EngineSettings,
    ToolParser,
    WorkerConfig,
)
from gpu_worker.front.request.model_files import (
    chat_templates_of_files,
    read_chat_template,
    sampling_defaults_of_files,
    template_of_files,
)
from gpu_worker.front.request.request import EXPECTED_NEW_TOKENS
from lora_store import Limits, Visibility, is_valid_name
from lora_store.location import DEFAULT_CACHE_DIR, Location
from lora_store.peft_files import template_digest
from retriever_svc import ServedBases

FORM_OVERHEAD_BYTES = 1 << 20  # boundaries, headers and form fields of an upload
EVERY_TENANT = "*"  # in source_prefixes
_ROUTING_STATS_PERIOD_S = 1.0  # how often Serve asks each worker for its adapters and load
_NAME = r"^[A-Za-z0-9._-]{1,64}$"


class AppConfig(Settings):
    """All settings of the application. Unknown names and invalid values stop the start."""

    base_model: str = PACKAGED_MODEL  # the packaged default, a Hugging Face id, or a local folder
    base_model_name: str = Field(
        default="", pattern=r"^$|" + _NAME
    )  # the name that clients use; default: the last path part
    accepts_base: tuple[str, ...] = ()  # other base_model_name_or_path values that adapters may have
    store_uri: str = "loraretriever-pool"
    cache_dir: Path = DEFAULT_CACHE_DIR
    # The prompt template of chats. auto: the base model's own chat template, or Alpaca's if it has none.
    template: Literal["auto", "alpaca", "chat"] = "auto"
    chat_template: Path | None = None  # a Jinja file in place of the base model's own chat template
    tool_parser: ToolParser = "auto"  # the form of tool calls with template chat; auto: as the chat template shows
    # Sampling parameters that a request leaves unset. auto: those of the base model's generation_config.json.
    generation_config: Literal["auto", "none"] = "auto"
    # Whether loopback clients may publish folders of the server's file system. None: only without keys. With keys, the
    # owner of a publishing key need not be the operator, and `kubectl port-forward` makes clients appear local.
    publish_paths: bool | None = None
    # Names allowed in the `Host` header, without port, such as the name of a reverse proxy. Loopback names and IP
    # addresses are always allowed. With keys, an empty list allows any name.
    allowed_hosts: tuple[str, ...] = ()
    # Pages of other origins that may use this server in a browser, as `https://chat.example`, or `*` for every origin.
    cors_origins: tuple[str, ...] = ()
    strict_fields: bool = False  # refuse unknown fields of OpenAI requests with 400 in place of ignoring them
    allow_remote_publish: bool = False  # without keys: whether other machines may change the pool
    keys_file: Path | None = None  # API keys; None: every client is the local tenant
    # One key for every client, with every role of the local tenant; not together with keys_file.
    api_key: SecretStr | None = Field(default=None, min_length=8, max_length=512)
    keys_missing_grace_s: float = Field(default=300, ge=0)  # how long keys stay valid while keys_file is missing
    public_requires_approval: bool = False  # for other tenants' `auto`; default with keys: true
    encoders: tuple[str, ...] = ()  # with keys: encoders that a reindex may name, besides retrieval.encoder
    owner_names: bool = False  # other tenants' adapters are owner/name only; default with keys: true
    allow_self_approval: bool = False  # with keys: whether admins may approve their own tenant's adapters
    # Prefixes of URIs that adapters may be published from, by tenant; "*" means every tenant. They begin with s3://,
    # gs://, file://, hf://, runs:/ or models:/. A plain list applies to every tenant and is refused with keys.
    source_prefixes: dict[str, tuple[str, ...]] | tuple[str, ...] = ()
    # Files of one adapter, uploaded or copied from a source. The files in themselves: `admission`.
    max_upload_bytes: int = Field(default=1040 << 20, ge=1)
    # All uploads in one Ingress replica at once, which spools them to disk. With keys, a tenant above
    # `max_upload_bytes` may use at most as much as remains free.
    max_upload_total_bytes: int = Field(default=2 << 30, ge=1)
    # Uploads and sources that one Store replica validates at once, on its disk. Others wait up to a minute, then get
    # a 503.
    max_staging_bytes: int = Field(default=2 << 30, ge=1)
    # All other bodies in one Ingress replica; one body has at most 4 MiB. With keys, a tenant may use at most as
    # much as remains free.
    max_body_total_bytes: int = Field(default=256 << 20, ge=4 << 20)
    max_concurrent_requests: int = Field(
        default=1024, ge=1
    )  # requests in one Ingress replica; above it the answer is 429
    max_request_s: float = Field(default=600, gt=0)  # upper bound of `timeout_s`
    # Of one answer, within max_model_len. A request without max_tokens may use all of it.
    max_new_tokens: int = Field(default=8192, ge=EXPECTED_NEW_TOKENS)
    store_object_cache_bytes: int = Field(default=256 << 20, ge=0)  # weights in Ray's object store
    disk_cache_bytes: int = Field(default=4 << 30, ge=0)  # local copy of the weights of a remote store
    # Start without Ray's token authentication: anyone who reaches one of Ray's ports can then run code as this server.
    allow_unauthenticated_ray: bool = False
    # nice value of the processes of Ray that `loraretriever serve` starts, added to its own. Ray's default is 15, at
    # which any other busy process takes nearly all of a core that both want. With `ray start`: RAY_worker_niceness.
    ray_niceness: Annotated[int, Ge(0), Le(19)] = 0
    # Measure adapters on each other's sample outputs after a publish, while the workers are idle; see `loraretriever
    # evaluate`. Off by default: it generates answers and changes which adapters `auto` prefers.
    evaluate_after_publish: bool = False
    # Adapter folders, or folders of adapter folders. The start publishes those whose names have no live version for the
    # served base model.
    preload: tuple[Path, ...] = ()
    admission: Limits = Limits()
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    worker: WorkerSettings = WorkerSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    ingress_scaling: ScalingSettings = ScalingSettings(
        max_ongoing_requests=10_000, max_queued_requests=-1, target_ongoing_requests=500
    )
    # High limits: prompts wait in the replica's own queue, which is fair to tenants.
    retriever_scaling: ScalingSettings = ScalingSettings(max_ongoing_requests=10_000, target_ongoing_requests=64)
    store_scaling: ScalingSettings = ScalingSettings(max_ongoing_requests=64)
    worker_scaling: ScalingSettings = ScalingSettings(num_cpus=1, max_ongoing_requests=2112, target_ongoing_requests=48)
    worker_target_waiting_tokens: int = Field(default=8192, ge=1)  # per engine; above it Serve adds workers
    scale_from_zero_timeout_s: float = Field(default=120, gt=0)  # how long requests wait for the first worker

    @model_validator(mode="before")
    @classmethod
    def _check_names_and_set_defaults(cls, settings: object) -> Any:
        """Refuse old names. With keys, protect tenants: a publisher could attract the `auto` requests of others."""
        if isinstance(settings, dict):
            refuse_renamed(settings)
            settings = settings | _scaling_groups(cls, settings)
        if isinstance(settings, dict) and settings.get("keys_file") is not None:
            return {"public_requires_approval": True, "owner_names": True} | settings
        return settings

    @model_validator(mode="after")
    def _base_has_a_name(self) -> Self:
        name = self.served_base_name
        if name == "auto" or not re.fullmatch(_NAME, name):
            raise ValueError(
                f"base_model_name: {name!r} cannot be the name of a model: use 1 to 64 of A-Za-z0-9._- except 'auto'"
            )
        return self

    @model_validator(mode="after")
    def _device_is_placed(self) -> Self:
        device, num_gpus = self.worker.device, self.worker_scaling.num_gpus
        if (device == "cuda") != (num_gpus > 0):
            raise ValueError(
                f"worker.device is {device} but worker_scaling.num_gpus is {num_gpus:g}: "
                "cuda needs num_gpus above 0, and cpu needs 0"
            )
        size = self.worker.tensor_parallel_size
        if device == "cuda" and size > 1 and num_gpus != size:
            raise ValueError(
                f"worker.tensor_parallel_size is {size} but worker_scaling.num_gpus is {num_gpus:g}: "
                f"set num_gpus to {size}, which reserves {size} GPUs of one machine for each worker"
            )
        return self

    @model_validator(mode="after")
    def _bounds_fit_each_other(self) -> Self:
        if self.max_upload_total_bytes < self.max_upload_bytes + FORM_OVERHEAD_BYTES:
            least = self.max_upload_bytes + FORM_OVERHEAD_BYTES
            raise ValueError(
                f"max_upload_total_bytes must be at least max_upload_bytes + {FORM_OVERHEAD_BYTES} = {least}, "
                f"got {self.max_upload_total_bytes}"
            )
        if self.max_staging_bytes < self.max_upload_bytes:
            raise ValueError(
                f"max_staging_bytes must be at least max_upload_bytes = {self.max_upload_bytes}, "
                f"got {self.max_staging_bytes}"
            )
        for name, scaling in (("ingress_scaling", self.ingress_scaling), ("worker_scaling", self.worker_scaling)):
            if scaling.graceful_shutdown_timeout_s < self.max_request_s:
                raise ValueError(
                    f"{name}.graceful_shutdown_timeout_s must be at least max_request_s = {self.max_request_s:g}, "
                    f"got {scaling.graceful_shutdown_timeout_s:g}"
                )
        return self

    @model_validator(mode="after")
    def _only_workers_scale_to_zero(self) -> Self:
        for name in ("ingress_scaling", "retriever_scaling", "store_scaling"):
            if getattr(self, name).min_replicas == 0:
                raise ValueError(f"{name}.min_replicas must be at least 1, got 0: only workers may scale to zero")
        return self

    @field_validator("base_model")
    @classmethod
    def _folder_with_home(cls, base: str) -> str:
        return os.path.expanduser(base)

    @field_validator("store_uri")
    @classmethod
    def _absolute(cls, uri: str) -> str:
        """Resolve a relative path here, because replicas run in other folders."""
        return Location(uri if "://" in uri else str(Path(uri).expanduser().resolve())).uri

    @field_validator("source_prefixes")
    @classmethod
    def _prefixes_can_be_compared(
        cls, prefixes: dict[str, tuple[str, ...]] | tuple[str, ...]
    ) -> dict[str, tuple[str, ...]] | tuple[str, ...]:
        by_tenant = prefixes if isinstance(prefixes, dict) else {EVERY_TENANT: prefixes}
        for tenant, allowed in by_tenant.items():
            if tenant != EVERY_TENANT and not is_valid_name(tenant):
                raise ValueError(f"{tenant!r} is neither the name of a tenant nor {EVERY_TENANT!r}")
            for prefix in allowed:
                SourcePrefix.parse(prefix)
        return prefixes

    @model_validator(mode="after")
    def _prefixes_name_their_tenants(self) -> Self:
        if self.keys_file is not None and self.source_prefixes and not isinstance(self.source_prefixes, dict):
            raise ValueError(
                "source_prefixes: a list would let every tenant read below these prefixes. With keys_file, give them "
                f"by tenant, as {{acme: [...]}}, or as {{'{EVERY_TENANT}': [...]}} for all tenants"
            )
        return self

    @field_validator("allowed_hosts")
    @classmethod
    def _plain_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", host):
                raise ValueError(f"{host!r} must be a host name without scheme, port and wildcards")
        return tuple(host.lower().removesuffix(".") for host in hosts)

    @field_validator("cors_origins")
    @classmethod
    def _plain_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:_-]{1,253}", origin):
                raise ValueError(f"{origin!r} must be '*' or scheme and host, as https://chat.example, without a path")
        return tuple(origin.lower() for origin in origins)

    @field_validator("api_key", mode="before")
    @classmethod
    def _not_a_placeholder(cls, key: object) -> object:
        """Refuse what looks like a key and is known to everybody."""
        if isinstance(key, str) and "${" in key:
            raise ValueError("${…} is not replaced here; write the key itself, or use keys_file")
        if isinstance(key, str) and key and not key.strip("*"):
            raise ValueError("is the mask that --print-config prints; write the key itself")
        return key

    @model_validator(mode="after")
    def _one_kind_of_keys(self) -> Self:
        if self.api_key is not None and self.keys_file is not None:
            raise ValueError("api_key: cannot be combined with keys_file; add the key to that file")
        return self

    @field_validator("chat_template")
    @classmethod
    def _absolute_template(cls, path: Path | None) -> Path | None:
        if path is None:
            return None
        path = path.expanduser().absolute()
        try:
            read_chat_template(path)
        except OSError as exc:
            raise ValueError(f"{path}: cannot be read: {exc.strerror}") from exc
        return path

    @field_validator("cache_dir")
    @classmethod
    def _with_home(cls, path: Path) -> Path:
        return path.expanduser()

    @field_validator("keys_file")
    @classmethod
    def _absolute_file(cls, path: Path | None) -> Path | None:
        """Keep symbolic links: Kubernetes swaps a secret by changing the link."""
        return None if path is None else path.expanduser().absolute()

    @field_validator("preload")
    @classmethod
    def _absolute_paths(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(path.expanduser().resolve() for path in paths)

    @cached_property
    def has_keys(self) -> bool:
        """Whether every request needs a key: the one of `api_key`, or one of the keys file."""
        return self.keys_file is not None or self.api_key is not None

    @property
    def may_publish_paths(self) -> bool:
        return not self.has_keys if self.publish_paths is None else self.publish_paths

    @cached_property
    def default_visibility(self) -> Visibility:
        """The visibility of a new adapter whose publisher sets none."""
        return "public" if self.keys_file is None else "private"

    def source_prefixes_of(self, tenant: str) -> tuple[str, ...]:
        """Return the URI prefixes that `tenant` may publish from."""
        if not isinstance(self.source_prefixes, dict):
            return self.source_prefixes
        return (*self.source_prefixes.get(tenant, ()), *self.source_prefixes.get(EVERY_TENANT, ()))

    @cached_property
    def served_base_name(self) -> str:
        return self.base_model_name or self.base_model.rstrip("/").rpartition("/")[2]

    @cached_property
    def template_in_use(self) -> str:
        """The template of chats: `alpaca` or `chat`, or `auto` where the model's files are not on this machine."""
        if self.template != "auto":
            return self.template
        if self.chat_template is not None:
            return "chat"
        return "alpaca" if self.base_model == PACKAGED_MODEL else template_of_files(self.base_model)

    @cached_property
    def known_templates(self) -> dict[str, str] | None:
        """The template `chat` by the digests of its files: the operator's, and the base model's own.

        None where the base model's files are not on this machine, so that an adapter's file cannot be compared.
        """
        own = () if self.base_model == PACKAGED_MODEL else chat_templates_of_files(self.base_model)
        if own is None:
            return None
        named = () if self.chat_template is None else (read_chat_template(self.chat_template),)
        return {template_digest(source): "chat" for source in (*named, *own)}

    @cached_property
    def sampling_defaults_in_use(self) -> dict[str, float]:
        """The values for what a request leaves unset, by name: the settings', then the base model's if it is here."""
        has_own = self.generation_config == "auto" and self.base_model != PACKAGED_MODEL  # the packaged one has none
        own = sampling_defaults_of_files(self.base_model) if has_own else {}
        return own | self.sampling_defaults.given

    @cached_property
    def accepted_bases(self) -> frozenset[str]:
        """Every `base_model_name_or_path` that an adapter may have: names, and the path of the base model's folder."""
        is_packaged = self.base_model == PACKAGED_MODEL
        names = {self.base_model, self.served_base_name, *self.accepts_base}
        if is_packaged:
            names.update(PACKAGED_ALIASES)
        if is_packaged or Path(self.base_model).is_absolute() or Path(self.base_model).is_dir():
            folder = self.cache_dir / PACKAGED_MODEL if is_packaged else Path(self.base_model).absolute()
            names.update({str(folder), str(folder.resolve()), folder.name})
        return frozenset(names)

    @cached_property
    def served_bases(self) -> ServedBases:
        """The base models whose adapters are served: those that publishing accepts."""
        return ServedBases(self.served_base_name, self.accepted_bases)

    @property
    def weights_cache(self) -> tuple[Path, int] | None:
        """The folder and the size in bytes of a worker's disk cache; None where the store is a local folder."""
        if self.disk_cache_bytes == 0 or Location(self.store_uri).is_local:
            return None
        return self.cache_dir / "weights", self.disk_cache_bytes

    @property
    def workers_scale_to_zero(self) -> bool:
        return self.worker_scaling.min_replicas == 0

    def worker_options(self) -> JsonObject:
        """Return the keywords of the Worker's `Deployment.options`, with its autoscaling policy and request router."""
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
        """Logical CPUs of all replicas at their maximum. They may exceed the real cores."""
        scalings = (self.ingress_scaling, self.retriever_scaling, self.store_scaling, self.worker_scaling)
        return math.ceil(sum(scaling.max_replicas * scaling.num_cpus for scaling in scalings)) + 1  # 1 for Serve itself

    def worker_config(self) -> WorkerConfig:
        settings = {field.name: getattr(self.worker, field.name) for field in fields(EngineSettings)}
        num_gpus = self.worker_scaling.num_gpus
        share = num_gpus if 0 < num_gpus < 1 else 1.0  # Ray places as many such workers on one GPU as fit
        chat_template = None if self.chat_template is None else read_chat_template(self.chat_template)
        return WorkerConfig(
            chat_template=chat_template,
            tool_parser=self.tool_parser,
            base_model=self.base_model,
            max_new_tokens=self.max_new_tokens,
            generation_config=self.generation_config,
            sampling_defaults=tuple(self.sampling_defaults.given.items()),
            cache_dir=self.cache_dir,
            device_share=share,
            **settings,
        )


def _scaling_groups(model: type[AppConfig], settings: JsonObject) -> JsonObject:
    """Return the scaling groups with the defaults that they leave. `device: cuda` implies the GPUs of a worker."""
    defaults = {name: field.default for name, field in model.model_fields.items()}
    groups = {name: default for name, default in defaults.items() if isinstance(default, ScalingSettings)}
    given = {name: settings.get(name, {}) for name in groups}
    found = {name: groups[name].changed(group) for name, group in given.items() if isinstance(group, dict)}
    worker = settings.get("worker")
    if isinstance(worker, dict) and worker.get("device") == "cuda" and "worker_scaling" in found:
        found["worker_scaling"].setdefault("num_gpus", worker.get("tensor_parallel_size", 1))
    return found
