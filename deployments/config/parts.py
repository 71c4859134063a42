"""The settings of a worker and of retrieval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, Field

from gpu_worker.config import (
    EngineSettings,
)
from retriever_svc.calibration import Abstain
from retriever_svc.encoder import EncoderDtype
from retriever_svc.encoder_files import DEFAULT_MODEL as DEFAULT_ENCODER
from retriever_svc.route import Weighting


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class WorkerSettings(EngineSettings):
    """Settings of one worker replica: those of its engine, of the engine's thread and of the streams."""

    stream_interval_ms: Annotated[float, Ge(0)] = 25
    step_timeout_s: Annotated[float, Gt(0)] = 120  # a longer step counts as stuck: Serve replaces the replica
    # nice value of the engine thread, so that HTTP handling gets priority on shared cores
    niceness: Annotated[int, Ge(0), Le(19)] = 5


class SamplingDefaults(Settings):
    """Sampling parameters for requests that leave them unset, in place of the base model's own."""

    temperature: float | None = Field(default=None, ge=0, le=2)  # 0 always picks the most likely token
    top_p: float | None = Field(default=None, gt=0, le=1)  # 1: all tokens
    top_k: int | None = Field(default=None, ge=0, lt=2**31)  # 0: all tokens
    min_p: float | None = Field(default=None, ge=0, le=1)  # least probability, relative to the most likely token
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)  # 1: none

    @property
    def given(self) -> dict[str, float]:
        """The parameters that are set, by name."""
        return self.model_dump(exclude_none=True)


class RetrievalSettings(Settings):
    """Defaults for `model: auto`. The `lora` object of a request overrides them."""

    encoder: str = DEFAULT_ENCODER
    encoder_threads: int | None = Field(default=None, ge=1)
    encoder_dtype: EncoderDtype = "auto"  # auto: OpenVINO, in bfloat16 where the processor has it; float32: torch
    strategy: Literal["selection", "mixture", "fusion"] = "mixture"
    k: int = Field(default=3, ge=1, le=16)
    weights: Weighting = "evidence"  # companions of another function get at most a third of the best adapter's weight
    softmax_temperature: float = Field(default=0.05, gt=0)
    projection: Literal["auto", "none"] = "auto"  # auto: the packaged one, if there is one for the encoder
    abstain: Abstain = "balanced"
    # Least cosine of every adapter. None: each adapter has a threshold of its own.
    min_score: float | None = Field(default=None, ge=-1, le=1)
    fallback: Literal["base", "error"] = "base"
    batch_size: int = Field(default=32, ge=1)  # texts; at most about 2,048 tokens together
    batch_wait_s: float = Field(default=0.0, ge=0)  # texts that arrive during a batch form the next one anyway
    max_waiting: int = Field(
        default=4096, ge=256
    )  # texts in the queue of one replica's encoder, shared fairly by tenants
    poll_interval_s: float = Field(default=3.0, gt=0)  # how late a replica sees a commit that it was not notified of
