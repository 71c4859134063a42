"""The settings of one base model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from deployments.config.parts import SamplingDefaults, Settings, expand_home
from deployments.json_types import JsonMapping
from deployments.scaling.settings import ServeOptions, default_options, with_defaults
from gpu_worker.config import PACKAGED_MODEL, NativeSettings, ToolParser, VllmSettings
from gpu_worker.front.request.model_files import read_chat_template

_NAME = r"^[A-Za-z0-9._-]{1,64}$"
_SCALING_DEFAULTS = default_options(target_ongoing_requests=48, max_ongoing_requests=2112, num_cpus=1)


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
