"""The settings of one worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

from annotated_types import BaseMetadata, Ge, Gt, Le

from gpu_worker.errors import WorkerConfigInvalid
from lora_store.location import DEFAULT_CACHE_DIR

_CPU_CHUNK = 192  # a step with such a chunk takes two to three decode steps: docs/benchmarks/index.md
_WIDEST_FUSION = 256  # rank rows of a fusion of the widest adapters that `admission.max_rank` allows by default
PACKAGED_MODEL = "gemma-3-270m"  # comes in a Python package
PACKAGED_ALIASES = ("google/gemma-3-270m", "unsloth/gemma-3-270m")  # names of the same model on the model hub
AtLeastOne = Annotated[int, Ge(1)]
ToolParser = Literal["auto", "hermes", "mistral", "mistral_args", "llama3_json"]
"""The form in which the base model writes tool calls; `auto`: as its chat template shows."""
Quantization = Literal["none", "int8", "int4"]


@dataclass(frozen=True)
class CommonSettings:
    """Settings of an engine of either kind, which its operator chooses. Raises: WorkerConfigInvalid for a bad value.

    The annotations hold the bounds: settings files are checked against them too.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the base model computes. Set `cuda` on machines with GPUs: each worker then reserves one GPU, or as many as
    `worker_scaling.ray_actor_options.num_gpus` says."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of weights and products. `auto` is bfloat16 where the device computes it. On other CPUs products are
    float32; the native engine's weights are then bfloat16 still. Set `float32` to compare answers across machines; they
    then take more time and memory."""
    num_threads: AtLeastOne | None = None
    """CPU threads of one worker. Unset: the CPUs that its process may use. Set it where several workers share a
    machine, or where a container does not limit CPUs; more threads than free cores slow every step down."""
    bank_rank_rows: AtLeastOne = 256
    """Rank rows of the adapter bank in the device's memory; an adapter of rank 16 takes 16. Raise it when more adapters
    are in use at once than fit, so that they are loaded again and again; each row costs memory of the device."""
    max_batch_size: AtLeastOne = 32
    """Answers that one step computes together. Raise it on a GPU for more tokens a second; each answer then comes more
    slowly, and the KV cache needs more memory."""
    max_model_len: AtLeastOne = 2048
    """Tokens of a prompt and its answer together. Raise it for long prompts, up to the context of the base model; the
    KV cache needs more memory."""
    kv_tokens: AtLeastOne | None = None
    """Tokens that the KV cache holds for all answers. Unset: max_batch_size × max_model_len, or what fits the device.
    Lower it to leave memory to others; answers then wait for room."""
    prefix_cache: bool = True
    """Keep computed blocks for later prompts of the same tenant and adapters. Turn it off to measure, or where no two
    prompts begin alike."""
    prefix_cache_shares_base: bool = False
    """Let tenants share the blocks of prompts without adapters. Turn it on where tenants trust each other: equal system
    prompts are computed once, and the time of an answer can show that another tenant sent the same prompt."""
    max_step_tokens: AtLeastOne = 1024
    """Prompt and decode tokens of one step. Raise it on a GPU to read prompts faster; each step then takes longer."""
    max_waiting: AtLeastOne = 2048
    """Requests in the queue of one worker. Above it the answer is 503. Raise it together with
    `worker_scaling.max_ongoing_requests`, which must leave room for them."""
    max_wait_s: Annotated[float, Gt(0)] = 90.0
    """The longest time in the queue; then the answer is 503. Lower it where clients have an alternative."""
    host_cache_bytes: Annotated[int, Ge(0)] = 1 << 30
    """Adapter weights kept in host memory, besides those in the bank. Raise it for a pool that is larger than the bank;
    adapters then return to the bank without the Store. It also limits what adapters in the bank have for fused experts,
    which is outside the bank's rows."""
    step_timeout_s: Annotated[float, Gt(0)] = 120
    """A longer step counts as stuck, and Serve replaces the worker. Raise it for a slow device or a large model whose
    first steps compile."""
    niceness: Annotated[int, Ge(0), Le(19)] = 5
    """The nice value of the engine's threads, so that HTTP handling goes first on shared cores. Set 0 where a worker
    has cores of its own."""

    @property
    def num_fusion_rows(self) -> int:
        """Return the rank rows that only fusions use. The native engine computes fusions from their adapters."""
        return 0

    @property
    def num_rank_rows(self) -> int:
        """Return all rank rows of the bank."""
        return self.bank_rank_rows + self.num_fusion_rows

    def __post_init__(self) -> None:
        for name, bound in _find_bounds(type(self)):
            _check(name, getattr(self, name), bound)
        if self.kv_tokens is not None and self.kv_tokens < self.max_model_len:
            raise WorkerConfigInvalid(
                f"kv_tokens must be at least max_model_len ({self.max_model_len}), got {self.kv_tokens}"
            )
        if self.device == "cuda" and self.dtype == "float32":
            raise WorkerConfigInvalid("dtype must be 'auto' or 'bfloat16' with device 'cuda', got 'float32'")
        if self.max_step_tokens < self.max_batch_size:
            raise WorkerConfigInvalid(
                f"max_step_tokens must be at least max_batch_size ({self.max_batch_size}), got {self.max_step_tokens}"
            )


@dataclass(frozen=True)
class NativeSettings(CommonSettings):
    """Settings of the native engine."""

    engine: Literal["native"] = "native"
    """The engine that comes with this package, for CPUs and single GPUs."""
    max_chunk_tokens: AtLeastOne | None = None
    """Prompt tokens in a step that also decodes. Unset: 192 on a CPU, `max_step_tokens` on a GPU. Lower it to keep the
    time between two tokens even while long prompts arrive; the first token of those then comes later."""
    quantization: Quantization = "none"
    """Round the base model's linear layers, output head and embedding as they are loaded: `int8` to 8 bits with one
    scale per output, `int4` to 4 bits in groups of 32 inputs with a scale and an offset each; each token's inputs are
    then rounded to 8 bits. Layers that the checkpoint or the GGUF file has as integers stay as they are; with either
    value those of the packaged model do. Set it on a CPU where few answers are computed at once, or where memory is
    short: tokens come faster. Answers change slightly, with `int4` more than with `int8`, and more in small models:
    compare them on your own prompts. Adapters stay bfloat16."""
    prompt_lookup_tokens: Annotated[int, Ge(0), Le(7)] = 0
    """Tokens that are guessed from a row's own text and checked in one step while few rows decode. Raise it for answers
    that repeat their prompt or themselves: they come faster, and stay the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization != "none" and (self.device != "cpu" or self.dtype == "float32"):
            raise WorkerConfigInvalid(
                f"quantization '{self.quantization}' needs device 'cpu' and dtype 'auto' or 'bfloat16', got"
                f" '{self.device}' and '{self.dtype}'; set quantization to 'none' or change those"
            )

    @property
    def chunk_tokens(self) -> int:
        """Return `max_chunk_tokens` or its default. It bounds the delay between two tokens of a running row."""
        if self.max_chunk_tokens is not None:
            return self.max_chunk_tokens
        return _CPU_CHUNK if self.device == "cpu" else self.max_step_tokens


@dataclass(frozen=True)
class VllmSettings(CommonSettings):
    """Settings of vLLM's engine."""

    engine: Literal["vllm"] = "vllm"
    """vLLM, which needs its own installation: docs/how-to/install.md. Choose it for GPUs, and for large
    base models or those quantised in other ways."""
    tensor_parallel_size: AtLeastOne = 1
    """Processes that share the base model, each on a GPU of its own. Raise it for a base model that does not fit one
    GPU; each worker then reserves this many GPUs of one machine."""
    enforce_eager: bool = False
    """Do not compile the base model. Turn it on while you try settings: the start takes seconds, and answers come
    slower."""
    fusion_rank_rows: AtLeastOne | None = None
    """More rank rows in the bank, for fusions, each of which takes the rank of its widest adapter. Unset: as many as
    `bank_rank_rows`, at most 256 or a quarter of `bank_rank_rows` if that is more. Raise it if many different fusions
    are in use at once."""
    model_check_max_parameters: Annotated[int, Ge(0)] = 2_000_000_000
    """Compare log probabilities with transformers' model on the CPU at the start, for base models of at most this many
    parameters. Lower it where host memory cannot hold the weights a second time; 0 never compares. Quantised weights
    are not compared. The native engine compares every model, once for the same files and versions."""

    @property
    def num_fusion_rows(self) -> int:
        """Return the rank rows that only fusions use."""
        return self.fusion_rank_rows or max(self.bank_rank_rows // 4, min(self.bank_rank_rows, _WIDEST_FUSION))


@dataclass(frozen=True)
class WorkerConfig(CommonSettings):
    """The configuration of one worker, which uses one device. Raises: WorkerConfigInvalid for a bad value."""

    base_model: str = PACKAGED_MODEL  # the packaged default, a Hugging Face id, a local folder, or a GGUF file
    max_new_tokens: AtLeastOne = 8192  # for a request without max_tokens, within the context
    generation_config: Literal["auto", "none"] = "auto"  # auto: the base model's own defaults for sampling
    sampling_defaults: tuple[tuple[str, float], ...] = ()  # the operator's, which override the base model's
    cache_dir: Path = DEFAULT_CACHE_DIR
    chat_template: str | None = None  # the operator's Jinja source, which overrides the base model's own
    tool_parser: ToolParser = "auto"
    device_share: Annotated[float, Gt(0), Le(1)] = 1.0  # of the GPU's memory, if several workers use one GPU
    load_threads: AtLeastOne = 2  # threads that decode and check weights; none waits for a fetch
    lora_products: Literal["auto", "torch"] = "auto"  # auto: the compiled CPU kernel where available


@dataclass(frozen=True)
class NativeWorkerConfig(NativeSettings, WorkerConfig):
    """The configuration of a worker with the native engine."""

    shares_cores: bool = True  # CPU only: use fewer threads while other processes keep the cores busy
    prefix_cache_share: Annotated[float, Gt(0), Le(1)] = 1.0  # of the KV cache, for blocks that no running row needs


@dataclass(frozen=True)
class VllmWorkerConfig(VllmSettings, WorkerConfig):
    """The configuration of a worker with vLLM's engine."""


def configure_worker(engine: Literal["native", "vllm"], **settings: Any) -> NativeWorkerConfig | VllmWorkerConfig:
    """Return the configuration of a worker with this engine. Raises: WorkerConfigInvalid for a bad value."""
    return NativeWorkerConfig(**settings) if engine == "native" else VllmWorkerConfig(**settings)


def _find_bounds(settings: type[CommonSettings]) -> Iterator[tuple[str, BaseMetadata]]:
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
