"""The settings of one worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args, get_type_hints

from annotated_types import BaseMetadata, Ge, Gt, Le

from gpu_worker.errors import WorkerConfigInvalid
from lora_store.location import DEFAULT_CACHE_DIR

_CPU_CHUNK = 192  # a step with such a chunk takes two to three decode steps: docs/benchmarks/index.md
_WIDEST_FUSION = 256  # rank rows of a fusion of the widest adapters that `admission.max_rank` allows by default
_ONLY_NATIVE = {"max_chunk_tokens", "prompt_lookup_tokens", "prefix_cache_share", "shares_cores"}
_ONLY_VLLM = {"tensor_parallel_size", "enforce_eager", "fusion_rank_rows", "model_check_max_parameters"}
PACKAGED_MODEL = "gemma-3-270m"  # comes in a Python package
PACKAGED_ALIASES = ("google/gemma-3-270m", "unsloth/gemma-3-270m")  # names of the same model on the model hub
AtLeastOne = Annotated[int, Ge(1)]
ToolParser = Literal["auto", "hermes", "mistral", "mistral_args", "llama3_json"]
"""The form in which the base model writes tool calls; `auto`: as its chat template shows."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of an engine that its operator chooses. Raises: WorkerConfigInvalid for a bad value.

    The annotations hold the bounds: settings files are checked against them too.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # in a settings file, which pydantic reads

    engine: Literal["native", "vllm"] = "native"  # vllm needs its own installation: docs/how-to/install.md
    device: Literal["cpu", "cuda"] = "cpu"  # cuda implies one GPU a worker, or worker_scaling.num_gpus
    tensor_parallel_size: AtLeastOne = 1  # processes that share the base model; vllm only, each on a GPU of its own
    enforce_eager: bool = False  # vllm only: do not compile the base model; starts within seconds, answers slower
    # vllm only: at start, compare log probabilities with transformers' model on the CPU if the base model has at most
    # this many parameters, whose weights then take host memory a second time; 0: never. Quantised weights are not
    # compared. The native engine compares always.
    model_check_max_parameters: Annotated[int, Ge(0)] = 2_000_000_000
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    num_threads: AtLeastOne | None = None  # unset: the CPUs the worker's process may use
    shares_cores: bool = True  # CPU only: use fewer threads while other processes keep the cores busy
    lora_products: Literal["auto", "torch"] = "auto"  # auto: the compiled CPU kernel where available
    bank_rank_rows: AtLeastOne = 256  # rank rows of the adapter bank: an adapter of rank 16 takes 16
    # vllm only: more rank rows, for fusions, each of which takes the rank of its widest adapter; unset: as many as
    # bank_rank_rows has, but at most 256, or a quarter of bank_rank_rows if that is more. The native engine computes
    # fusions from their adapters.
    fusion_rank_rows: AtLeastOne | None = None
    max_batch_size: AtLeastOne = 32  # rows that one step computes together
    max_model_len: AtLeastOne = 2048  # prompt plus new tokens of one row
    kv_tokens: AtLeastOne | None = None  # of all rows; unset: max_batch_size × max_model_len, or what fits the device
    prefix_cache: bool = True  # keep computed blocks for later prompts of the same tenant and adapters
    prefix_cache_share: Annotated[float, Gt(0), Le(1)] = 1.0  # of the KV cache, for blocks that no running row needs
    prefix_cache_shares_base: bool = False  # tenants share the blocks of prompts without adapters, and so their timing
    max_step_tokens: AtLeastOne = 1024  # prompt and decode tokens in one forward pass
    max_chunk_tokens: AtLeastOne | None = None  # prompt tokens in a step that also decodes; unset: 192 on CPU
    # Tokens that are guessed from a row's own text and computed in one step while few rows decode; 0: none. Answers
    # are the same with and without. It pays for answers that repeat their prompt or themselves.
    prompt_lookup_tokens: Annotated[int, Ge(0), Le(7)] = 0
    max_waiting: AtLeastOne = 2048  # queued requests; above it the answer is 503
    max_wait_s: Annotated[float, Gt(0)] = 90.0  # longest time in the queue, then the answer is 503
    host_cache_bytes: Annotated[int, Ge(0)] = 1 << 30  # adapter weights kept in host memory

    @property
    def chunk_tokens(self) -> int:
        """Return `max_chunk_tokens` or its default. It bounds the delay between two tokens of a running row."""
        if self.max_chunk_tokens is not None:
            return self.max_chunk_tokens
        return _CPU_CHUNK if self.device == "cpu" else self.max_step_tokens

    @property
    def num_fusion_rows(self) -> int:
        """Return the rank rows that only fusions use."""
        if self.engine == "native":
            return 0
        return self.fusion_rank_rows or max(self.bank_rank_rows // 4, min(self.bank_rank_rows, _WIDEST_FUSION))

    @property
    def num_rank_rows(self) -> int:
        """Return all rank rows of the bank."""
        return self.bank_rank_rows + self.num_fusion_rows

    def __post_init__(self) -> None:
        for name, bound in _bounds_of(type(self)):
            _check(name, getattr(self, name), bound)
        if self.kv_tokens is not None and self.kv_tokens < self.max_model_len:
            raise WorkerConfigInvalid(
                f"kv_tokens must be at least max_model_len ({self.max_model_len}), got {self.kv_tokens}"
            )
        if self.device == "cuda" and self.dtype == "float32":
            raise WorkerConfigInvalid("dtype must be 'auto' or 'bfloat16' with device 'cuda', got 'float32'")
        self._refuse_settings_of_the_other_engine()
        if self.max_step_tokens < self.max_batch_size:
            raise WorkerConfigInvalid(
                f"max_step_tokens must be at least max_batch_size ({self.max_batch_size}), got {self.max_step_tokens}"
            )

    def _refuse_settings_of_the_other_engine(self) -> None:
        names, other = (_ONLY_NATIVE, "native") if self.engine == "vllm" else (_ONLY_VLLM, "vllm")
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in names and value != each.default:
                raise WorkerConfigInvalid(
                    f"{each.name} is a setting of the engine '{other}', got {value} with engine '{self.engine}'; leave"
                    f" it unset, or use engine '{other}'"
                )


@dataclass(frozen=True, slots=True)
class WorkerConfig(EngineSettings):
    """The settings of one worker, which uses one device. Raises: WorkerConfigInvalid for a bad value."""

    base_model: str = PACKAGED_MODEL  # the packaged default, a Hugging Face id, or a local folder
    max_new_tokens: AtLeastOne = 8192  # of an answer whose request names no max_tokens, within the context
    generation_config: Literal["auto", "none"] = "auto"  # auto: the base model's own defaults for sampling
    sampling_defaults: tuple[tuple[str, float], ...] = ()  # the operator's, by name, in place of the base model's
    cache_dir: Path = DEFAULT_CACHE_DIR
    chat_template: str | None = None  # the operator's Jinja source, in place of the base model's own
    tool_parser: ToolParser = "auto"
    device_share: Annotated[float, Gt(0), Le(1)] = 1.0  # of the GPU's memory, if several workers use one GPU
    load_threads: AtLeastOne = 2  # threads that decode and check weights; none waits for a fetch


def _bounds_of(settings: type[EngineSettings]) -> Iterator[tuple[str, BaseMetadata]]:
    """Return the bounds in the annotations, with the names of their fields."""
    hints = get_type_hints(settings, include_extras=True)
    return ((name, bound) for name, hint in hints.items() for bound in _bounds_in(hint))


def _bounds_in(hint: object) -> Iterator[BaseMetadata]:
    for part in (*getattr(hint, "__metadata__", ()), *get_args(hint)):
        if isinstance(part, BaseMetadata):
            yield part
        elif not isinstance(hint, type) and hasattr(part, "__metadata__"):
            yield from _bounds_in(part)


def _check(name: str, value: float | None, bound: BaseMetadata) -> None:
    """Raise WorkerConfigInvalid unless the value is within the bound. NaN never is."""
    match bound:
        case _ if value is None:
            return
        case Ge(ge=least) if not value >= least:  # type: ignore[operator]
            raise WorkerConfigInvalid(f"{name} must be at least {least}, got {value}")
        case Gt(gt=floor) if not value > floor:  # type: ignore[operator]
            raise WorkerConfigInvalid(f"{name} must be above {floor}, got {value}")
        case Le(le=most) if not value <= most:  # type: ignore[operator]
            raise WorkerConfigInvalid(f"{name} must be at most {most}, got {value}")
