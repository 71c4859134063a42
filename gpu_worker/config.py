"""The settings of one worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpu_worker.errors import WorkerConfigInvalid

_CPU_CHUNK = 192  # a step with such a chunk takes two to three decode steps: benchmarks/README.md
DEFAULT_CACHE_DIR = Path.home() / ".cache" / "loraretriever"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The settings of one worker, which uses one device. Raises: WorkerConfigInvalid for a bad value."""

    base_model: str = "gemma-3-270m"  # the packaged default, a Hugging Face id, or a local folder
    cache_dir: Path = DEFAULT_CACHE_DIR
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int | None = None  # None: torch's default; `with_threads` sets the usable CPUs
    lora_products: Literal["auto", "torch"] = "auto"  # auto: the compiled kernel if it is available
    bank_rank_rows: int = 256  # adapter rank rows resident on the device
    max_batch_size: int = 32  # rows that generate concurrently
    max_model_len: int = 2048  # prompt plus new tokens of one row
    kv_tokens: int | None = None  # of all rows together; None: the longest rows, or what fits into the memory
    max_step_tokens: int = 1024  # prompt and decode tokens in one forward pass
    max_chunk_tokens: int | None = (
        None  # prompt tokens per step while rows decode; None: 192 on the CPU, unbounded on a GPU
    )
    max_waiting: int = 2048  # queued requests; more are refused
    max_wait_s: float = 90.0  # longest time in the queue; loads time out earlier
    host_cache_bytes: int = 1 << 30  # adapter weights kept in host memory
    device_share: float = 1.0  # share of the GPU's memory, if several workers use one GPU
    load_threads: int = 2  # threads that decode and check weights; none waits for a fetch

    @property
    def chunk_tokens(self) -> int:
        """Return `max_chunk_tokens` or its default. It bounds the delay between two tokens of a running row."""
        if self.max_chunk_tokens is not None:
            return self.max_chunk_tokens
        return _CPU_CHUNK if self.device == "cpu" else self.max_step_tokens

    def __post_init__(self) -> None:
        for field in ("bank_rank_rows", "max_batch_size", "max_model_len", "max_waiting", "load_threads"):
            if getattr(self, field) < 1:
                raise WorkerConfigInvalid(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.kv_tokens is not None and self.kv_tokens < self.max_model_len:
            raise WorkerConfigInvalid(
                f"kv_tokens must be at least max_model_len ({self.max_model_len}), got {self.kv_tokens}"
            )
        if self.max_chunk_tokens is not None and self.max_chunk_tokens < 1:
            raise WorkerConfigInvalid(f"max_chunk_tokens must be at least 1, got {self.max_chunk_tokens}")
        if not 0 < self.device_share <= 1:
            raise WorkerConfigInvalid(f"device_share must be above 0 and at most 1, got {self.device_share}")
        if self.device == "cuda" and self.dtype == "float32":
            raise WorkerConfigInvalid("dtype must be 'auto' or 'bfloat16' with device 'cuda', got 'float32'")
        if not self.max_wait_s > 0:
            raise WorkerConfigInvalid(f"max_wait_s must be above 0, got {self.max_wait_s}")
        if self.max_step_tokens < self.max_batch_size:
            raise WorkerConfigInvalid(
                f"max_step_tokens must be at least max_batch_size ({self.max_batch_size}), got {self.max_step_tokens}"
            )
