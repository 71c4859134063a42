"""Start vLLM with the worker's settings."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from vllm import AsyncEngineArgs
from vllm import logger as vllm_logger
from vllm.config import (
    CompilationConfig,
    CompilationMode,
    CUDAGraphMode,
    LoggingConfig,
    ModelConfig,
    StructuredOutputsConfig,
    VllmConfig,
)
from vllm.model_executor.models import supports_lora
from vllm.usage.usage_lib import UsageContext

from gpu_worker.bank.device_memory import free_bytes
from gpu_worker.config import VllmWorkerConfig
from gpu_worker.errors import BaseModelUnsupported, GpuWorkerError, WarmUpFailed, WorkerConfigInvalid
from gpu_worker.front.preprocess import special_ids
from gpu_worker.model.base_model import config_setting
from gpu_worker.model.eager_check import RANK
from gpu_worker.model.experts import most_expert_bytes
from gpu_worker.vllm.front_model import FrontModel
from gpu_worker.vllm.language_model import find_arguments
from gpu_worker.vllm.processes import ErrorFile, read_errors
from gpu_worker.vllm.settings import FRONT_PID, PluginSettings
from lora_store.adapter import Shapes

logger = logging.getLogger(__name__)

_WORKER_CLASS = "gpu_worker.vllm.worker.PlanWorker"
_SCHEDULER = "gpu_worker.vllm.grammars.make_scheduler"
_CPU_BLOCK = 128  # tokens of a KV block, vLLM's default on the CPU
_CPU_LATENT = 576  # values of a token that latent attention keeps, in vLLM's code for the CPU
_ROTATES_BY_HEAD = {"lfm2", "lfm2_moe"}  # beside latent attention
_SPARE = 0.1  # share of the host's free memory for vLLM's processes and what a step computes
_GPU_SHARE = 0.9  # share of the GPU's memory, as vLLM's default
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}  # that vLLM's class for any model of transformers computes


def build_config(config: VllmWorkerConfig, model: FrontModel, *, free_fill: float, is_compiled: bool) -> VllmConfig:
    """Return vLLM's configuration of the engine. Raises: BaseModelUnsupported, WorkerConfigInvalid."""
    set_environment(config)
    args = _engine_args(config, model, free_fill, is_compiled)
    try:
        vllm_config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
        _check_class(vllm_config.model_config, model.model_type, config.device)
        if vllm_config.cache_config.kv_cache_memory_bytes is not None:
            vllm_config.cache_config.kv_cache_memory_bytes = _cache_bytes(config, model, vllm_config)
    except WorkerConfigInvalid:
        raise
    # Of pydantic, of a state that the processes cannot share evenly, and of a format that needs another package.
    except (ValueError, AssertionError, ImportError) as exc:
        raise BaseModelUnsupported(f"vLLM refuses {model.model_type}: {_reason(exc)}") from exc
    set_compilation(vllm_config.compilation_config, config, is_compiled=is_compiled)
    text_config = vllm_config.model_config.hf_text_config
    if config.device == "cpu" and (model.has_latents or text_config.model_type in _ROTATES_BY_HEAD):
        # vLLM's operation takes the second last dimension of its input for the tokens: it would rotate some heads only.
        vllm_config.compilation_config.custom_ops.append("-rotary_embedding")
    return vllm_config


def _check_class(model_config: ModelConfig, model_type: str, device: str) -> None:
    """Raise BaseModelUnsupported unless the class that vLLM would serve the model with takes it and adapters."""
    found, _ = model_config.registry.resolve_model_cls(model_config.architectures, model_config)
    name = found.__name__
    kinds = set(config_setting(model_config.hf_text_config, "layer_types") or ()) - _ATTENTION_LAYERS
    if kinds and model_config.using_transformers_backend():
        raise BaseModelUnsupported(
            f"{model_type} has layers of other kinds ({', '.join(sorted(kinds))}), for which vLLM has no class"
        )
    if device == "cpu" and model_config.use_mla and model_config.using_transformers_backend():
        raise BaseModelUnsupported(
            f"{model_type} needs a GPU with the vLLM engine: vLLM has no class of its own for its latent attention,"
            " and the one for any model of transformers was not compared on the CPU"
        )
    if device == "cpu" and model_config.use_mla and model_config.get_head_size() != _CPU_LATENT:
        raise BaseModelUnsupported(
            f"{model_type} needs a GPU with the vLLM engine: vLLM's CPU code for latent attention has kv_lora_rank +"
            f" qk_rope_head_dim = {_CPU_LATENT} only, and the model has {model_config.get_head_size()}"
        )
    if not supports_lora(found):
        raise BaseModelUnsupported(
            f"{model_type} cannot have adapters with the vLLM engine: vLLM's class {name} supports no LoRA"
        )


def _reason(error: Exception) -> str:
    """Return what the error says, without the inputs that pydantic lists, and the names that vLLM lists."""
    list_errors: Callable[[], list[dict[str, str]]] | None = getattr(error, "errors", None)  # pydantic's have it
    text = str(error)
    if list_errors is not None:
        text = "; ".join(each["msg"].removeprefix("Value error, ") for each in list_errors())
    return re.split(" Supported architectures:| Must be one of ", text)[0]


@contextmanager
def errors_of_children(vllm_config: VllmConfig) -> Iterator[None]:
    """Raise WarmUpFailed with the errors of vLLM's processes if one ends within the block, which starts them."""
    with TemporaryDirectory(prefix="loraretriever-") as folder:
        errors = Path(folder) / "errors"
        log_in_children(vllm_config, errors)
        try:
            yield
        except GpuWorkerError:
            raise
        except Exception as exc:
            reasons = "; then ".join(read_errors(errors)) or f"{type(exc).__name__}: {exc}"
            raise WarmUpFailed(f"vLLM did not start: {reasons}") from exc


def log_in_children(vllm_config: VllmConfig, errors: Path) -> None:
    """Let vLLM's processes print what they do and write their errors to the file, and leave this one as it is.

    vLLM would set up this process too, which closes all its log files: it skips a process that it has set up already.
    """
    logging_config = deepcopy(vllm_logger.DEFAULT_LOGGING_CONFIG)
    logging_config["handlers"]["errors"] = {"class": f"{ErrorFile.__module__}.ErrorFile", "path": str(errors)}
    logging_config["loggers"]["vllm"]["handlers"].append("errors")
    file = errors.with_suffix(".json")
    file.write_text(json.dumps(logging_config))
    vllm_config.logging_config = LoggingConfig(configure_logging=True, pylogging_config_file=str(file))
    vllm_logger._last_configured_logging_config = vllm_config.logging_config


def set_compilation(compilation: CompilationConfig, config: VllmWorkerConfig, *, is_compiled: bool) -> None:
    """Change what vLLM compiles and captures to what the products of the plans allow."""
    if config.device == "cuda" and config.lora_products == "torch":
        compilation.cudagraph_mode = CUDAGraphMode.NONE  # a captured graph would replay one step's plans
    if config.device == "cpu" and is_compiled:
        # vLLM's CPU platform turns compilation off for every engine with LoRA. The plans are one opaque operation.
        compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE


def _engine_args(config: VllmWorkerConfig, model: FrontModel, free_fill: float, is_compiled: bool) -> AsyncEngineArgs:
    plugin = PluginSettings(
        num_rank_rows=config.num_rank_rows,
        cache_dir=str(config.cache_dir),
        modules=model.paths,
        outputs={name: model.shapes[name][0] for name in model.paths},
        end_ids=sorted(model.eos_token_ids),
        special_ids=special_ids(model, config.tool_parser),
        experts=_served_experts(config, model, is_compiled),
        expert_bytes=sum(expert_bytes(config, model)),
        use_kernel=config.lora_products == "auto",
        free_fill=free_fill,
    )
    memory: dict[str, Any] = {}
    if config.device == "cpu" or config.kv_tokens is not None:
        memory["kv_cache_memory_bytes"] = kv_bytes(config, model)
    if config.device == "cuda":  # vLLM requires as much free memory even if it is given the cache's bytes
        memory["gpu_memory_utilization"] = _GPU_SHARE * config.device_share
    classes: dict[str, Any] = {"language_model_only": model.is_multimodal, "load_format": "hf"}
    classes |= find_arguments(model.source, model.model_type)
    return AsyncEngineArgs(
        model=model.source,
        # The files that were checked. By default vLLM prefers params.json and consolidated*.safetensors beside them.
        config_format="hf",
        ignore_patterns=["original/**/*", "consolidated*"],  # these are not downloaded
        tokenizer_mode="hf",  # the front end's; vLLM would prefer Mistral's own, which has no structured output
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=find_max_len(config, model),
        max_num_seqs=config.max_batch_size,
        max_num_batched_tokens=config.max_step_tokens,
        enable_lora=True,
        max_loras=config.max_batch_size,  # plans of a step: as many as rows
        max_lora_rank=1,  # vLLM's own buffers stay unused
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend="mp" if config.tensor_parallel_size > 1 else None,  # Ray would be the default
        structured_outputs_config=StructuredOutputsConfig(
            backend="guidance"
        ),  # the library that the native engine uses
        worker_cls=_WORKER_CLASS,
        scheduler_cls=_SCHEDULER,
        additional_config=plugin.as_additional_config(),
        enable_prefix_caching=config.prefix_cache,
        # The other one for the CPU needs a processor with AMX and bfloat16, and is compared nowhere.
        attention_backend="CPU_MLA" if config.device == "cpu" and model.has_latents else None,
        enforce_eager=not is_compiled,
        disable_log_stats=True,
        seed=secrets.randbits(32),  # of rows without a seed, which would be drawn alike by every worker
        **memory,
        **classes,
    )


def _served_experts(config: VllmWorkerConfig, model: FrontModel, is_compiled: bool) -> Shapes:
    """Return the shapes of fused experts: none, with a warning, if graphs would replay one step's products of them."""
    experts = {name: shape for name, shape in model.shapes.items() if name not in model.paths}
    if not experts or config.device == "cpu" or not is_compiled or config.lora_products == "torch":
        return experts
    logger.warning("adapters on experts are refused, because CUDA graphs cannot replay them: set worker.enforce_eager")
    return {}


def expert_bytes(config: VllmWorkerConfig, model: FrontModel) -> tuple[int, int]:
    """Return the most bytes that adapters in the bank may have for experts, and that fusions may have for them."""
    most = partial(most_expert_bytes, model.shapes, model.dtype, limit=config.host_cache_bytes)
    return most(num_rows=config.bank_rank_rows, least_rows=RANK), most(num_rows=config.num_fusion_rows)


def find_max_len(config: VllmWorkerConfig, model: FrontModel) -> int:
    """Return the longest row: prompt plus new tokens."""
    return min(config.max_model_len, model.max_position)


def _cache_bytes(config: VllmWorkerConfig, model: FrontModel, vllm_config: VllmConfig) -> int:
    """Return the bytes of the cache in one process, of keys and of the states of layers with linear attention."""
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    limited = partial(kv_bytes, config, most_bytes=_most_cache_bytes(config, model))
    token_bytes = model_config.get_head_size() * model_config.dtype.itemsize  # of a head in a layer
    if model_config.use_mla:  # each process keeps the one latent from which all heads are computed
        token_bytes = count_latent_bytes(model_config)
        num_layers = model_config.get_num_layers(parallel)
        return limited(replace(model, num_kv_heads=1, kv_token_bytes=num_layers * token_bytes))
    if not model_config.is_hybrid:
        return limited(model)
    found, _ = model_config.registry.resolve_model_cls(model_config.architectures, model_config)
    shapes = found.get_mamba_state_shape_from_config(vllm_config)
    dtypes = found.get_mamba_state_dtype_from_config(vllm_config)
    state_bytes: int = sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
    # vLLM's workers will give a block as many tokens as have the keys of a layer's state.
    block: int = vllm_config.cache_config.block_size
    keys_bytes = 2 * model_config.get_num_kv_heads(parallel) * block * token_bytes  # and of the values
    block *= max(math.ceil(state_bytes / keys_bytes), 1)
    return limited(model, block, num_more=2) + block * model.kv_token_bytes


def count_latent_bytes(model_config: ModelConfig) -> int:
    """Return the bytes of a token that latent attention keeps in a layer, with those by which an indexer selects it."""
    text_config = model_config.hf_text_config
    size: int = model_config.get_head_size()
    if model_config.using_transformers_backend():  # for which vLLM's head size is another one
        size = text_config.kv_lora_rank + (config_setting(text_config, "qk_rope_head_dim") or 0)
    index_size: int = config_setting(text_config, "index_head_dim") or 0
    latent_bytes: int = size * model_config.dtype.itemsize
    return latent_bytes + index_size + index_size // 128 * 4  # bytes, with a scale for each 128


def _most_cache_bytes(config: VllmWorkerConfig, model: FrontModel) -> int | None:
    """Return the host's free bytes for the caches of all processes; None on a GPU, and with `kv_tokens`."""
    if config.device != "cpu" or config.kv_tokens is not None:
        return None
    weights = model.num_parameters * model.dtype.itemsize // (4 if model.is_quantized else 1)  # at least 4 bits
    row_bytes = sum(shape[0] + shape[1] for shape in model.shapes.values() if len(shape) == 2) * model.dtype.itemsize
    spare = (1 - _SPARE) * free_bytes(torch.device("cpu"))
    return int(spare) - weights - config.num_rank_rows * row_bytes - sum(expert_bytes(config, model))


def kv_bytes(
    config: VllmWorkerConfig,
    model: FrontModel,
    block: int = _CPU_BLOCK,
    num_more: int = 1,
    most_bytes: int | None = None,
) -> int:
    """Return the bytes of the KV cache in one process. By default every row may reach its longest length.

    `block`: tokens of a block. `num_more`: blocks that a row has beyond those that its tokens fill. `most_bytes`: of
    all processes together.
    Processes divide the heads of keys among them. Where there are more processes than heads, several have the same one.
    Raises: WorkerConfigInvalid if `most_bytes` are too few for one row.
    """
    longest = (math.ceil(find_max_len(config, model) / block) + num_more) * block
    tokens = max(config.kv_tokens or config.max_batch_size * longest, longest)
    num_heads = max(model.num_kv_heads // config.tensor_parallel_size, 1)
    token_bytes = model.kv_token_bytes * num_heads // model.num_kv_heads
    if most_bytes is None:
        return tokens * token_bytes
    most_tokens = most_bytes // (config.tensor_parallel_size * token_bytes)
    if most_tokens < longest:
        raise WorkerConfigInvalid(
            f"the KV cache has room for {max(most_tokens, 0)} tokens beside the weights and the adapter bank, and one"
            f" answer may need {longest}; lower max_model_len or bank_rank_rows, or set kv_tokens to overrule this"
        )
    return min(tokens, most_tokens) * token_bytes


def sockets_folder() -> TemporaryDirectory[str]:
    """Make a folder for the sockets of vLLM's processes, as vLLM removes none of them; and tell vLLM where it is."""
    folder = TemporaryDirectory(
        prefix="vllm-", ignore_cleanup_errors=True
    )  # short, as a socket's path has at most 107 bytes
    os.environ["VLLM_RPC_BASE_PATH"] = folder.name
    return folder


def set_environment(config: VllmWorkerConfig) -> None:
    """Set what vLLM reads from the environment only, before it starts its processes."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the other runner has no `load_lora_model`
    os.environ["VLLM_LORA_ENABLE_DUAL_STREAM"] = "0"  # the other stream would call the layers in another way
    os.environ[FRONT_PID] = f"{os.getpid()}"
    if config.device == "cuda":  # FlashInfer's sampler is compiled at its first use, which needs nvcc
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    else:
        os.environ.update(thread_variables(config, sorted(os.sched_getaffinity(0))))


def thread_variables(config: VllmWorkerConfig, cpus: Sequence[int]) -> dict[str, str]:
    """Return the variables that give vLLM's processes their threads on these CPUs.

    An engine that may use all of them gets one thread bound to each; vLLM would leave one CPU free. A smaller one is
    not bound, because another engine of this machine would be bound to the same CPUs.
    """
    num_threads, size = config.num_threads or len(cpus), config.tensor_parallel_size
    if size <= len(cpus) <= num_threads:
        parts = [",".join(map(str, cpus[rank::size])) for rank in range(size)]
        return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(parts)}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(num_threads // size, 1))}
