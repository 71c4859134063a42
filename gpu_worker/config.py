"""How one worker is set up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpu_worker.errors import WorkerConfigInvalid

_CPU_CHUNK = 192  # a step that reads them takes two to three times as long as one that decodes: benchmarks/README.md
DEFAULT_CACHE_DIR = Path.home() / ".cache" / "loraretriever"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker = one device. Raises: WorkerConfigInvalid, so that a bad value stops start-up."""

    base_model: str = "gemma-3-270m"  # the packaged default, a Hugging Face id, or a local folder
    cache_dir: Path = DEFAULT_CACHE_DIR
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int | None = None  # None: as torch has them; `with_threads` counts those this process may use
    lora_products: Literal["auto", "torch"] = "auto"  # auto: by the compiled kernel where there is one
    bank_rank_rows: int = 256  # rank rows of adapters held on the device at once
    max_batch_size: int = 32  # rows generating at once
    max_model_len: int = 2048  # prompt plus new tokens of one row
    kv_tokens: int | None = (
        None  # of all rows together; None: every row at its longest, or what the device has room for
    )
    max_step_tokens: int = 1024  # prompt and decode tokens in one forward pass
    max_chunk_tokens: int | None = None  # of prompts, where rows decode in it; None: 192 on the CPU, else no bound
    max_waiting: int = 2048  # requests queued before the engine refuses
    max_wait_s: float = 90.0  # a request that has not started by then is refused; a load that hangs says so before
    host_cache_bytes: int = 1 << 30  # adapter weights kept in host memory
    device_share: float = 1.0  # of the GPU's memory, where several workers are placed on one
    load_threads: int = 2  # they decode and check; no thread waits for a fetch

    @property
    def chunk_tokens(self) -> int:
        """`max_chunk_tokens`, or its default: what a running row waits for at most between two of its tokens."""
        if self.max_chunk_tokens is not None:
            return self.max_chunk_tokens
        return _CPU_CHUNK if self.device == "cpu" else self.max_step_tokens

    def __post_init__(self) -> None:
        for field in ("bank_rank_rows", "max_batch_size", "max_model_len", "max_waiting", "load_threads"):
            if getattr(self, field) < 1:
                raise WorkerConfigInvalid(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.kv_tokens is not None and self.kv_tokens < self.max_model_len:
            raise WorkerConfigInvalid(
                f"kv_tokens ({self.kv_tokens}) must hold one row of max_model_len ({self.max_model_len})"
            )
        if self.max_chunk_tokens is not None and self.max_chunk_tokens < 1:
            raise WorkerConfigInvalid(f"max_chunk_tokens must be at least 1, got {self.max_chunk_tokens}")
        if not 0 < self.device_share <= 1:
            raise WorkerConfigInvalid(f"device_share must be above 0 and at most 1, got {self.device_share}")
        if self.device == "cuda" and self.dtype == "float32":
            raise WorkerConfigInvalid("dtype float32 is not served on cuda, whose attention takes bfloat16")
        if not self.max_wait_s > 0:
            raise WorkerConfigInvalid(f"max_wait_s must be above 0, got {self.max_wait_s}")
        if self.max_step_tokens < self.max_batch_size:
            raise WorkerConfigInvalid(
                f"max_step_tokens ({self.max_step_tokens}) must be at least max_batch_size ({self.max_batch_size})"
            )
