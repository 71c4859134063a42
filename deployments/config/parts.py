"""The groups of settings, those of one base model, and the types of their fields."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from deployments.api.base import LoraOptions
from deployments.json_types import JsonMapping, JsonObject
from deployments.scaling.settings import ServeOptions, default_options, with_defaults
from gpu_worker.config import PACKAGED_MODEL, NativeSettings, ToolParser, VllmSettings
from gpu_worker.front.request.model_files import read_chat_template
from lora_store import MAX_PLAN_ADAPTERS, STRATEGIES, Limits, RoutedStrategy
from lora_store.location import Location
from retriever_svc.calibration import Abstain
from retriever_svc.encoder import EncoderDtype
from retriever_svc.encoder_files import DEFAULT_MODEL as DEFAULT_ENCODER
from retriever_svc.weightings import Weighting

_NAME = r"^[A-Za-z0-9._-]{1,64}$"
_SCALING_DEFAULTS = default_options(target_ongoing_requests=48, max_ongoing_requests=2112, num_cpus=1)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def expand_home(path: Path) -> Path:
    """Return the path with the home folder for `~` and `~user`. Raises: ValueError: there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise ValueError(
            f"{path}: this machine has no home folder for {path.parts[0]!r}; write the whole path"
        ) from exc


def make_absolute(path: Path) -> Path:
    """Return the whole path. Symbolic links stay: Kubernetes swaps a secret by changing the link."""
    return expand_home(path).absolute()


def resolve_paths(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return whole paths without symbolic links."""
    return tuple(expand_home(path).resolve() for path in paths)


def resolve_pool(uri: str) -> str:
    """Return the URI of a pool. A relative path is resolved here, because replicas run in other folders."""
    if not uri.strip():
        raise ValueError("is empty; name a folder, s3://… or gs://…")
    return Location.of_store(uri if "://" in uri else str(expand_home(Path(uri)).resolve())).uri


def check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the host names in lower case. Raises: ValueError for anything else than a name."""
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", host):
            raise ValueError(f"{host!r} must be a host name without scheme, port and wildcards")
    return tuple(host.lower().removesuffix(".") for host in hosts)


def check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Return the origins in lower case. Raises: ValueError for an address with a path."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:_-]{1,253}", origin):
            raise ValueError(f"{origin!r} must be '*' or scheme and host, as https://chat.example, without a path")
    return tuple(origin.lower() for origin in origins)


HomePath = Annotated[Path, AfterValidator(expand_home)]
AbsolutePath = Annotated[Path, AfterValidator(make_absolute)]
ResolvedPaths = Annotated[tuple[Path, ...], AfterValidator(resolve_paths)]
PoolUri = Annotated[str, AfterValidator(resolve_pool)]
HostNames = Annotated[tuple[str, ...], AfterValidator(check_hosts)]
Origins = Annotated[tuple[str, ...], AfterValidator(check_origins)]


def merge_group(old: JsonObject, new: JsonMapping) -> JsonObject:
    """Return the settings of a group with the new ones. Options of a strategy go where another one is set."""
    if new.get("strategy", old.get("strategy")) != old.get("strategy"):
        old = old | {"strategy_options": {}}
    return old | dict(new)


class AdmissionSettings(Settings):
    """Limits on a published adapter."""

    max_rank: int = Field(default=Limits().max_rank, ge=1)
    """The highest rank of a module. Raise it for adapters of a higher rank, together with `worker.bank_rank_rows`,
    which must hold at least one of them."""
    max_weights_bytes: int = Field(default=Limits().max_weights_bytes, ge=1)
    """Bytes of `adapter_model.safetensors`. Raise it for a large base model; an upload may have 16 MiB more for its
    other files, and `max_upload_total_bytes` must hold it."""

    @property
    def limits(self) -> Limits:
        """The limits on an adapter's folder."""
        return Limits(max_rank=self.max_rank, max_weights_bytes=self.max_weights_bytes)


class SamplingDefaults(Settings):
    """Sampling parameters for requests that leave them unset. They override those of the base model."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    """How random answers are. 0 always picks the most likely token. Set it where answers must repeat."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability. 1 means all tokens."""
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    """Sample from this many most likely tokens. 0 means all tokens."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Drop tokens below this share of the most likely token's probability. 0 drops none."""
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    """Divides the logits of tokens that the prompt or the answer has. 1 changes nothing; raise it for a base model that
    repeats itself."""
    max_repeats: int | None = Field(default=None, ge=0, lt=2**31)
    """End an answer once it repeats a passage of up to 64 tokens more than this many times in a row. 0 does not look.
    Set it for a small base model, which may repeat a sentence until `max_tokens`."""

    @property
    def given(self) -> dict[str, float]:
        """The parameters that are set, by name."""
        return self.model_dump(exclude_none=True)


class RetrievalSettings(Settings):
    """Defaults for `model: auto`. The `lora` object of a request overrides them."""

    encoder: str = DEFAULT_ENCODER
    """The model that embeds prompts and samples: the packaged one, a folder, or a model hub id of
    sentence-transformers. Used for a new pool; afterwards change it by `loraretriever pool reindex`, since `auto`
    does not find adapters that another encoder embedded."""
    encoder_threads: int | None = Field(default=None, ge=1)
    """CPU threads of the encoder. Unset: the CPUs that the process may use. Set it where containers share a machine."""
    encoder_dtype: EncoderDtype = "auto"
    """How the encoder computes. `auto` is OpenVINO, in bfloat16 where the processor has it. `float32` computes in
    float32: with OpenVINO for the packaged encoder, with torch for others. Set it where vectors of different machines
    are compared; encoding then takes longer."""
    strategy: RoutedStrategy = "mixture"
    """How adapters are composed. Change it when `loraretriever pool evaluate` shows better answers on your pool."""
    strategy_options: dict[str, float] = {}
    """Values for options of the strategy, by name. Set them where the strategy's own defaults do not suit your pool."""
    k: int = Field(default=3, ge=1, le=MAX_PLAN_ADAPTERS)
    """How many adapters are retrieved. Raise it where several adapters help with one prompt; each costs time."""
    weights: Weighting = "evidence"
    """How scores become weights. With `evidence`, companions of another function get at most a third of the best
    adapter's weight. Change it together with `strategy`."""
    projection: Literal["auto", "none"] = "auto"
    """The projection after the encoder of a new pool; afterwards `loraretriever pool reindex` changes it. `auto` is the
    packaged one, if there is one for the encoder; `none` compares plain embeddings."""
    abstain: Abstain = "balanced"
    """How readily a prompt goes to the base model. With `lenient`, `balanced` and `strict`, adapters answer up to 6,
    3 and 1 % of everyday prompts; with `never`, every prompt gets adapters. Choose by what your users ask besides
    your tasks."""
    min_score: float | None = Field(default=None, ge=-1, le=1)
    """The least cosine of every adapter. Unset: each adapter has a threshold of its own. Set it only where scores of
    your pool were measured; it overrides `abstain`."""
    fallback: Literal["base", "error"] = "base"
    """What happens to a prompt that no adapter fits: the base model answers, or the request is refused with 422. Set
    `error` where an answer of the base model would be wrong."""
    max_waiting: int = Field(default=4096, ge=1280)
    """Texts in the queue of one replica's encoder, which tenants share fairly. A request to `/v1/route` brings up to
    1280, five for each of 256 long prompts. Above it the answer is 503. Raise it for bursts; prompts then wait
    longer."""

    def changed(self, user_config: JsonMapping) -> tuple[RetrievalSettings, dict[str, float]]:
        """Return these settings with those of `user_config: {retrieval: ...}`, and its `sampling_defaults`.

        Requests could set all of them too. Raises: ValueError for any other setting, and for a value that is not
        allowed.
        """
        given = user_config.get("retrieval") or {}
        allowed = RetrievalSettings.model_fields.keys() & LoraOptions.model_fields.keys()
        others = [*(user_config.keys() - {"retrieval", "sampling_defaults"})]
        others += [f"retrieval.{name}" for name in given.keys() - allowed]
        if others:
            raise ValueError(
                f"user_config: {', '.join(sorted(others))} cannot change while the server runs; set it in args. "
                f"user_config takes sampling_defaults, and retrieval with {', '.join(sorted(allowed))}"
            )
        sampling = SamplingDefaults.model_validate(user_config.get("sampling_defaults") or {})
        return RetrievalSettings.model_validate(merge_group(self.model_dump(), given)), sampling.given

    @model_validator(mode="after")
    def _options_of_the_strategy(self) -> Self:
        STRATEGIES[self.strategy].read_options(self.strategy_options, {})
        return self


def _name_engine(worker: object) -> object:
    """Return the engine that a `worker` group names."""
    engine = worker.get("engine") if isinstance(worker, Mapping) else getattr(worker, "engine", None)
    return "native" if engine is None else engine


def make_default(options: JsonMapping) -> ServeOptions:
    """Return Serve's options as a default, without Serve, which takes seconds to import."""
    return ServeOptions.model_construct(with_defaults({}, options))


class ModelSettings(Settings):
    """What each base model of `models` has for itself. Unset, each setting has the default of the top level."""

    base_model: Annotated[str, AfterValidator(os.path.expanduser)] = PACKAGED_MODEL
    """The base model: the packaged default, a Hugging Face id, a folder, or a GGUF file. Set it first; adapters of
    other base models stay in the pool and are not served."""
    base_model_name: str = Field(default="", json_schema_extra={"pattern": r"^$|" + _NAME})
    """The name by which clients ask for the base model. Unset: the last part of `base_model`. Set it to keep the name
    when the folder changes."""
    accepts_base: tuple[str, ...] = ()
    """More values of `base_model_name_or_path` that adapters may have. Add the names that your training scripts write
    for this base model; a publish refuses others."""
    template: Literal["auto", "alpaca", "chat"] = "auto"
    """The prompt template of chats. `auto` is the base model's own chat template, or Alpaca's if it has none. Set the
    one that your adapters were trained with; another one makes answers poor."""
    chat_template: Path | None = None
    """A Jinja file that overrides the base model's own chat template. Set it if that one is missing or wrong."""
    tool_parser: ToolParser = "auto"
    """The form in which the base model writes tool calls. `auto` follows its chat template. Set it if tool calls arrive
    as text."""
    generation_config: Literal["auto", "none"] = "auto"
    """Whether the base model's `generation_config.json` gives the sampling parameters that a request leaves unset. Set
    `none` to begin with those of the OpenAI API."""
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    worker: Annotated[
        Annotated[NativeSettings, Tag("native")] | Annotated[VllmSettings, Tag("vllm")], Discriminator(_name_engine)
    ] = NativeSettings()
    worker_scaling: ServeOptions = make_default(_SCALING_DEFAULTS)
    """Serve's options of the Worker deployment, which computes. Set `autoscaling_config` for the range of workers and
    `ray_actor_options` for their CPUs and GPUs; only workers may scale to zero."""

    @model_validator(mode="before")
    @classmethod
    def _complete_scaling(cls, settings: object) -> Any:
        """Complete Serve's options. `device: cuda` implies the GPUs of a worker."""
        if not isinstance(settings, dict):
            return settings
        worker, given = settings.get("worker"), settings.get("worker_scaling", {})
        num_gpus = 0
        if isinstance(worker, Mapping) and worker.get("device") == "cuda":
            num_gpus = worker.get("tensor_parallel_size", 1)
        elif "worker_scaling" not in settings:
            return settings
        if not isinstance(given, dict):
            return settings
        scaling = with_defaults(given, _SCALING_DEFAULTS)
        if num_gpus and isinstance(actor := scaling.get("ray_actor_options"), dict):
            actor.setdefault("num_gpus", num_gpus)
        return settings | {"worker_scaling": scaling}

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
                f"worker.device is {device} but worker_scaling.ray_actor_options.num_gpus is {num_gpus:g}: "
                "cuda needs num_gpus above 0, and cpu needs 0"
            )
        size = self.worker.tensor_parallel_size if isinstance(self.worker, VllmSettings) else 1
        if device == "cuda" and size > 1 and num_gpus != size:
            raise ValueError(
                f"worker.tensor_parallel_size is {size} but worker_scaling.ray_actor_options.num_gpus is {num_gpus:g}: "
                f"set num_gpus to {size}, which reserves {size} GPUs of one machine for each worker"
            )
        return self

    @field_validator("chat_template")
    @classmethod
    def _absolute_template(cls, path: Path | None) -> Path | None:
        if path is None:
            return None
        path = expand_home(path).absolute()
        try:
            read_chat_template(path)
        except OSError as exc:
            raise ValueError(f"{path}: cannot be read: {exc.strerror}") from exc
        return path

    @cached_property
    def served_base_name(self) -> str:
        return self.base_model_name or self.base_model.rstrip("/").rpartition("/")[2]
