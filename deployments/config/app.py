"""The settings of the application."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, SecretStr, field_validator, model_validator

from deployments.config.parts import (
    AbsolutePath,
    HomePath,
    HostNames,
    ModelSettings,
    Origins,
    PoolUri,
    ResolvedPaths,
    make_default,
)
from deployments.config.parts import AdmissionSettings as AdmissionSettings
from deployments.config.parts import RetrievalSettings as RetrievalSettings
from deployments.config.parts import SamplingDefaults as SamplingDefaults
from deployments.config.served_model import ServedModel, ServedModels, find_accepted_names
from deployments.config.source_prefixes import SourcePrefix
from deployments.json_types import JsonObject
from deployments.scaling.settings import ServeOptions, default_options, with_defaults
from gpu_worker.config import (
    PACKAGED_MODEL,
    NativeWorkerConfig,
    VllmWorkerConfig,
    configure_worker,
)
from gpu_worker.front.request.model_files import read_chat_template
from gpu_worker.front.request.request import EXPECTED_NEW_TOKENS
from lora_store import Visibility, is_valid_name
from lora_store.location import DEFAULT_CACHE_DIR, Location

FORM_OVERHEAD_BYTES = 1 << 20  # boundaries, headers and form fields of an upload
OTHER_FILES_BYTES = 16 << 20  # files of one adapter besides its weights
EVERY_TENANT = "*"  # in source_prefixes
# Replicas accept many requests: these wait in queues of the replica, which are fair to tenants.
_SERVE_DEFAULTS = {
    "ingress_scaling": default_options(
        target_ongoing_requests=500, max_ongoing_requests=10_000, max_queued_requests=-1
    ),
    "retriever_scaling": default_options(target_ongoing_requests=64, max_ongoing_requests=10_000),
    "store_scaling": default_options(target_ongoing_requests=32, max_ongoing_requests=10_000),
}


class AppConfig(ModelSettings):
    """All settings of the application. Unknown names and invalid values stop the start."""

    models: tuple[ModelSettings, ...] = ()
    """Several base models in one application. Each item takes the settings from `base_model` to `worker_scaling`,
    `sampling_defaults` and `worker`, which are then unset at the top level. Each has workers of its own; all share the
    pool. `auto` answers on the base model of the adapter that it finds, and on the first one where none fits."""
    store_uri: PoolUri = Field(default="loraretriever-pool", validate_default=True)
    """Where the pool is kept: a folder, `s3://bucket/prefix` or `gs://bucket/prefix`. Set it before the first publish;
    a server with another value has another pool."""
    cache_dir: HomePath = DEFAULT_CACHE_DIR
    """Where converted models, compiled kernels and copies of weights are kept. Set it to a disk with room; everything
    in it is made again if it is deleted, except the usage of the last seconds, which is on its way to the pool."""
    publish_paths: bool | None = None
    """Whether clients on the server's own machine may publish folders of its file system. Unset: only without keys.
    With keys, the owner of a publishing key need not be the operator, and `kubectl port-forward` makes clients appear
    local."""
    allowed_hosts: HostNames = ()
    """Names allowed in the `Host` header, without port. Add the name of your reverse proxy; loopback names and IP
    addresses are always allowed. With keys, an empty list allows any name."""
    cors_origins: Origins = ()
    """Pages of other origins that may use this server in a browser, as `https://chat.example`, or `*` for every origin.
    Add the address of a chat page that calls this server; other pages cannot read answers."""
    strict_fields: bool = False
    """Refuse unknown fields of OpenAI requests with 400 instead of ignoring them. Turn it on while you write a
    client."""
    allow_remote_publish: bool = False
    """Whether other machines may change the pool of a server without keys. Turn it on only in a network where everybody
    may publish and withdraw."""
    keys_file: AbsolutePath | None = None
    """The file with the API keys of tenants; `loraretriever keys new` writes entries. With it every request needs a
    key, `public_requires_approval` becomes true, and other tenants' adapters are named `owner/name`."""
    api_key: SecretStr | None = Field(default=None, min_length=8, max_length=512)
    """One key for every client, with every role. Set it for a server of one team; several teams need `keys_file`, and
    both cannot be combined."""
    public_requires_approval: bool = False
    """Whether an admin must approve a public adapter before other tenants' `auto` finds it. True with `keys_file`. Turn
    it off where tenants trust each other: a publisher can attract the prompts of others."""
    allow_self_approval: bool = False
    """With keys, whether admins may approve adapters of their own tenant. Turn it on where one team is both."""
    encoders: tuple[str, ...] = ()
    """With keys, encoders that a reindex may name, besides `retrieval.encoder`. Add one before you change to it;
    without keys every encoder is allowed."""
    source_prefixes: dict[str, tuple[str, ...]] | tuple[str, ...] = ()
    """Prefixes of URIs that adapters may be published from, by tenant; `*` means every tenant. They begin with s3://,
    gs://, file://, hf://, runs:/ or models:/. A plain list applies to every tenant and is refused with `keys_file`."""
    max_upload_total_bytes: int = Field(default=2 << 30, ge=1)
    """Bytes of files that one Ingress replica receives at once, and that one Store replica checks at once, on their
    disks. Raise it together with the disk for `/tmp` if many publish at once; above it publishes wait up to a minute,
    then get a 503."""
    max_concurrent_requests: int = Field(default=1024, ge=1)
    """Requests in one Ingress replica. Above it the answer is 429. Lower it to protect a small machine."""
    max_request_s: float = Field(default=600, gt=0)
    """The upper bound of a request's `timeout_s`, in seconds. Raise it for long answers, together with the
    `graceful_shutdown_timeout_s` of Ingress and Worker."""
    max_new_tokens: int = Field(default=8192, ge=EXPECTED_NEW_TOKENS)
    """Tokens of one answer, within `worker.max_model_len`. A request without `max_tokens` may use all of it. Lower it
    to bound what one request costs."""
    disk_cache_bytes: int = Field(default=4 << 30, ge=0)
    """Bytes of weights that a machine keeps on disk from a remote store. Raise it for a large pool; 0 fetches from the
    Store every time."""
    allow_unauthenticated_ray: bool = False
    """Start without Ray's token authentication. Anyone who reaches one of Ray's ports can then run code as this server:
    turn it on only where a network policy closes them."""
    evaluate_after_publish: bool = False
    """Measure adapters on each other's sample outputs after a publish, while the workers are idle. It generates answers
    and changes which adapters `auto` prefers; `loraretriever pool evaluate` does the same once."""
    learning: Literal["off", "observe", "apply"] = "off"
    """Whether prompts of clients are kept to learn from. `observe` proposes prompts of requests that name an adapter as
    samples to its owner, keeps prompts of other requests for a day, and counts outcomes. `apply` also lets outcomes
    change which adapters `auto` chooses for their own tenant. `off` keeps no prompt."""
    usage_days: int = Field(default=400, ge=0, le=36_500)
    """Days that the usage of each request is kept in the pool, by tenant, key and adapter, without its prompt. Set what
    your accounting needs; 0 records nothing."""
    tenant_metrics: int = Field(default=0, ge=0, le=10_000)
    """How many tenants have counters of their own in the metrics of one Ingress replica; the others share one. Raise it
    for dashboards and alerts by tenant; each tenant adds four series."""
    preload: ResolvedPaths = ()
    """Adapter folders, or folders of adapter folders. The start publishes those whose names have no live version for
    the served base model."""
    scale_from_zero_timeout_s: float = Field(default=120, gt=0)
    """How long requests wait for the first worker after scaling to zero, in seconds; after this time the answer is 503.
    Raise it for a base model that takes long to load."""
    admission: AdmissionSettings = AdmissionSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    ingress_scaling: ServeOptions = make_default(_SERVE_DEFAULTS["ingress_scaling"])
    """Serve's options of the Ingress deployment, which answers HTTP. Set `autoscaling_config` for more replicas behind
    a load balancer."""
    retriever_scaling: ServeOptions = make_default(_SERVE_DEFAULTS["retriever_scaling"])
    """Serve's options of the Retriever deployment, which embeds prompts and searches. Raise `num_cpus` of its
    `ray_actor_options`, or its replicas, when routing takes long."""
    store_scaling: ServeOptions = make_default(_SERVE_DEFAULTS["store_scaling"])
    """Serve's options of the Store deployment, which checks and keeps adapters. Two replicas survive the loss of
    one."""

    @model_validator(mode="before")
    @classmethod
    def _set_defaults(cls, settings: object) -> Any:
        """Complete Serve's options. With keys, protect tenants: publishers could attract the prompts of others."""
        if isinstance(settings, dict):
            groups = {name: settings[name] for name in _SERVE_DEFAULTS if isinstance(settings.get(name), dict)}
            completed = {name: with_defaults(given, _SERVE_DEFAULTS[name]) for name, given in groups.items()}
            settings = settings | completed
        if isinstance(settings, dict) and settings.get("keys_file") is not None:
            return {"public_requires_approval": True} | settings
        return settings

    @model_validator(mode="after")
    def _models_are_told_apart(self) -> Self:
        """Names must decide which base model answers a request, and which one an adapter was made for."""
        if not self.models:
            return self
        unset = {name: getattr(self, name) == field.default for name, field in ModelSettings.model_fields.items()}
        if not all(unset.values()):
            given = ", ".join(name for name, is_unset in unset.items() if not is_unset)
            raise ValueError(f"models: cannot be combined with {given}; move it into a model of the list")
        names = [model.served_base_name for model in self.models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"models: {twice[0]!r} is the name of two; give each its own base_model_name")
        if words := sorted({*names} & {"base", "error"}):
            problem = f"the name {words[0]!r} has a special meaning in lora.fallback"
            raise ValueError(f"models: {problem}; choose another base_model_name")
        owners: dict[str, str] = {}
        for model in self.served_models:
            for name in sorted(model.accepted_names):
                if name in owners:
                    raise ValueError(
                        f"models: {owners[name]!r} and {model.name!r} both accept adapters of {name!r}; serve that base"
                        " model once, leave the name out of one accepts_base, or rename the folder of one"
                    )
                owners[name] = model.name
        return self

    @model_validator(mode="after")
    def _bounds_fit_each_other(self) -> Self:
        least = self.max_upload_bytes + FORM_OVERHEAD_BYTES
        if self.max_upload_total_bytes < least:
            raise ValueError(
                "max_upload_total_bytes must hold one upload, which has admission.max_weights_bytes"
                f" + {least - self.admission.max_weights_bytes} = {least} bytes, got {self.max_upload_total_bytes}"
            )
        workers = [("worker_scaling", model.worker_scaling) for model in self.by_model.values()]
        for name, scaling in (("ingress_scaling", self.ingress_scaling), *workers):
            if scaling.graceful_shutdown_timeout_s < self.max_request_s:
                raise ValueError(
                    f"{name}.graceful_shutdown_timeout_s must be at least max_request_s = {self.max_request_s:g}, "
                    f"got {scaling.graceful_shutdown_timeout_s:g}"
                )
        for name in ("ingress_scaling", "retriever_scaling", "store_scaling"):
            if getattr(self, name).min_replicas == 0:
                raise ValueError(
                    f"{name}.autoscaling_config.min_replicas must be at least 1, got 0: only workers may scale to zero"
                )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _no_number_is_a_truth_value(cls, settings: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Refuse `true` for a number, which pydantic takes for 1."""
        config = handler(settings)
        if found := next(_find_truth_values(settings, config), None):
            raise ValueError(f"{found}: must be a number, got true or false")
        return config

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

    @field_validator("api_key", mode="before")
    @classmethod
    def _not_a_placeholder(cls, key: object) -> object:
        """Refuse what looks like a key and is known to everybody."""
        if isinstance(key, str) and "${" in key:
            raise ValueError("${…} is not replaced here; write the key itself, or use keys_file")
        if isinstance(key, str) and key and not key.strip("*"):
            raise ValueError("is the mask that --print-config prints; write the key itself")
        if isinstance(key, str) and key and not re.fullmatch("[!-~]([ -~]*[!-~])?", key):
            raise ValueError("must be of ASCII, without space around it, because clients send it in a header")
        return key

    @model_validator(mode="after")
    def _one_kind_of_keys(self) -> Self:
        if self.api_key is not None and self.keys_file is not None:
            raise ValueError("api_key: cannot be combined with keys_file; add the key to that file")
        return self

    @field_validator("learning", mode="before")
    @classmethod
    def _off_without_quotes(cls, value: object) -> object:
        """YAML reads `off` as false."""
        return "off" if value is False else value

    @cached_property
    def has_keys(self) -> bool:
        """Whether every request needs a key: the one of `api_key`, or one of the keys file."""
        return self.keys_file is not None or self.api_key is not None

    @property
    def may_publish_paths(self) -> bool:
        return not self.has_keys if self.publish_paths is None else self.publish_paths

    @property
    def owner_names(self) -> bool:
        """Whether other tenants' adapters have the name `owner/name` only."""
        return self.keys_file is not None

    @property
    def max_upload_bytes(self) -> int:
        """The largest upload of one adapter: its weights and its other files."""
        return self.admission.max_weights_bytes + OTHER_FILES_BYTES

    @cached_property
    def default_visibility(self) -> Visibility:
        """The visibility of a new adapter whose publisher sets none."""
        return "public" if self.keys_file is None else "private"

    def find_source_prefixes(self, tenant: str) -> tuple[str, ...]:
        """Return the URI prefixes that `tenant` may publish from."""
        if not isinstance(self.source_prefixes, dict):
            return self.source_prefixes
        return (*self.source_prefixes.get(tenant, ()), *self.source_prefixes.get(EVERY_TENANT, ()))

    @property
    def by_model(self) -> dict[str, AppConfig]:
        """The settings for each served base model by its name, as if it were the only one; the first is the default."""
        if not self.models:
            return {self.served_base_name: self}
        own, names = dict(self), tuple(ModelSettings.model_fields)
        return {
            model.served_base_name: AppConfig.model_construct(
                **own | {name: getattr(model, name) for name in names} | {"models": ()}
            )
            for model in self.models
        }

    @cached_property
    def served_models(self) -> ServedModels:
        """The served base models as clients and publishers meet them."""
        return ServedModels(tuple(config.served_model for config in self.by_model.values()))

    @cached_property
    def served_model(self) -> ServedModel:
        """The base model as clients and publishers meet it, of several the first."""
        if self.models:
            return self.served_models.first
        name, given = self.served_base_name, self.sampling_defaults.given
        return ServedModel(
            name=name,
            base=self.base_model,
            accepted_names=find_accepted_names(self.base_model, name, self.accepts_base, self.cache_dir),
            template=self.template,
            chat_template=self.chat_template,
            has_own_defaults=self.generation_config == "auto" and self.base_model != PACKAGED_MODEL,
            given_defaults=given,
            max_model_len=self.worker.max_model_len,
            max_new_tokens=self.max_new_tokens,
            max_request_s=self.max_request_s,
        )

    @property
    def weights_cache(self) -> tuple[Path, int] | None:
        """The folder and the size in bytes of a worker's disk cache; None where the store is a local folder."""
        if self.disk_cache_bytes == 0 or Location(self.store_uri).is_local:
            return None
        return self.cache_dir / "weights", self.disk_cache_bytes

    @property
    def usage_folder(self) -> Path | None:
        """The folder of this machine for usage events on their way to the pool; None where none are recorded."""
        if self.usage_days == 0:
            return None
        return self.cache_dir / "usage" / hashlib.sha256(self.store_uri.encode()).hexdigest()[:16]

    @property
    def workers_scale_to_zero(self) -> bool:
        return self.worker_scaling.min_replicas == 0

    def worker_options(self) -> JsonObject:
        """Return Serve's options of the Worker, with its autoscaling policy and request router."""
        router = {"request_router_class": "deployments.scaling.adapter_affinity_router:AdapterAffinityRouter"}
        return {"request_router_config": router} | _scaled_by("WorkerScaling", self.worker_scaling)

    def retriever_options(self) -> JsonObject:
        """Return Serve's options of the Retriever, with its autoscaling policy."""
        return _scaled_by("RetrieverScaling", self.retriever_scaling)

    @property
    def num_logical_cpus(self) -> int:
        """Logical CPUs of all replicas at their maximum. They may exceed the real cores."""
        workers = [model.worker_scaling for model in self.by_model.values()]
        scalings = (self.ingress_scaling, self.retriever_scaling, self.store_scaling, *workers)
        return math.ceil(sum(scaling.max_replicas * scaling.num_cpus for scaling in scalings)) + 1  # 1 for Serve itself

    def worker_config(self) -> NativeWorkerConfig | VllmWorkerConfig:
        """Return what a worker needs: the settings of its engine and of its base model."""
        num_gpus = self.worker_scaling.num_gpus
        return configure_worker(
            **{field.name: getattr(self.worker, field.name) for field in fields(self.worker)},
            chat_template=None if self.chat_template is None else read_chat_template(self.chat_template),
            tool_parser=self.tool_parser,
            base_model=self.base_model,
            max_new_tokens=self.max_new_tokens,
            generation_config=self.generation_config,
            sampling_defaults=tuple(self.sampling_defaults.given.items()),
            cache_dir=self.cache_dir,
            device_share=num_gpus if 0 < num_gpus < 1 else 1.0,  # Ray places as many such workers on one GPU as fit
        )


def _find_truth_values(given: object, used: object, path: str = "") -> Iterator[str]:
    """Yield the settings that are a truth value in `given` and a number in `used`."""
    if isinstance(given, bool) and isinstance(used, int | float) and not isinstance(used, bool):
        yield path
    if isinstance(given, dict):
        for name, value in given.items():
            part = used.get(name) if isinstance(used, dict) else getattr(used, str(name), None)
            yield from _find_truth_values(value, part, f"{path}.{name}" if path else str(name))
    if isinstance(given, list) and isinstance(used, tuple | list) and len(given) == len(used):
        for number, (value, part) in enumerate(zip(given, used, strict=True)):
            yield from _find_truth_values(value, part, f"{path}.{number}")


def _scaled_by(policy: str, given: ServeOptions) -> JsonObject:
    """Return these options with a policy of ours, unless they have no range of replicas or another policy."""
    options = dict(given.root)
    if scaling := options.get("autoscaling_config"):
        function = f"deployments.scaling.autoscaling_policy:{policy}"
        options["autoscaling_config"] = {"policy": {"policy_function": function}} | scaling
    return options
