"""The base model as the front end sees it: its tokenizer, its limits and its shapes, without its weights."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from gpu_worker.config import VllmWorkerConfig
from gpu_worker.errors import BaseModelUnsupported, WorkerConfigInvalid
from gpu_worker.model.base_model import (
    config_setting,
    find_end_ids,
    first_line,
    load_config,
    load_tokenizer,
    model_source,
    resolve_dtype,
    sampling_defaults,
)
from gpu_worker.model.checkpoint import auto_class, find_quantised
from gpu_worker.model.inject import Adaptable
from lora_store.adapter import Shapes

logger = logging.getLogger(__name__)

_NEEDED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings")
# What vLLM 0.32 lacks on the CPU, and families that its classes do not read, by transformers' name.
_NOT_ON_CPU = {
    "jamba": "layers of Mamba 1",
    "laguna": "its choice of experts",
    "longcat_flash": "its choice of experts",
    "olmo_hybrid": "its linear attention",
    **dict.fromkeys(("deepseek_v32", "glm5_next", "glm_moe_dsa", "hy_v4"), "its choice of tokens to attend to"),
    **dict.fromkeys(("inkling_mm_model", "qwen4_exp"), "its attention"),
    "unlimited_ocr": "its window of generated tokens",
}
_UNREAD = {
    "jetmoe": "its attention has more heads of keys than config.json says",
    "voxtral_realtime": "its class needs sound for every token",
    "sarvam_mla": "its class asks for a head size that transformers changes",
}
# transformers does not read these, and always does what they say.
_CHOICE_OF_EXPERTS = {"deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}}
_BFLOAT16_ON_CPU = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
_FAILS_WITHOUT_IMAGES = {"llama4"}  # in transformers 5.24; its text part does not
_SEVERAL_PARTS = {"qkv_proj", "gate_up_proj", "query_key_value"}  # names of layers that hold several


@dataclass(frozen=True, slots=True)
class FrontModel:
    """The properties of the base model that prompts, adapters and the memory plan depend on."""

    source: str  # what vLLM loads
    model_type: str  # transformers' name of the family
    tokenizer: Any
    eos_token_ids: frozenset[int]
    vocab_size: int
    num_embeddings: int
    max_position: int
    dtype: torch.dtype
    num_kv_heads: int
    kv_token_bytes: int  # for all heads
    shapes: Shapes  # of every module an adapter may target
    paths: Mapping[str, str]  # the names in transformers' model of those that are no fused experts
    is_multimodal: bool  # vLLM serves its language model only
    num_parameters: int
    is_quantized: bool
    has_latents: bool = False  # from which keys and values are computed
    window: int | None = None  # some layers see only this many last tokens
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)  # for what a request leaves unset

    @property
    def backend_tokenizer(self) -> Tokenizer:
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        return backend


def load_front_model(config: VllmWorkerConfig) -> FrontModel:
    """Read the model's configuration and tokenizer. Raises: BaseModelUnsupported, WorkerConfigInvalid."""
    source = model_source(config)
    hf_config = load_config(source)
    text_config = _read_text_config(source, hf_config)
    _check_config(hf_config, text_config)
    _check_dtype(config, hf_config)
    _check_code(config, hf_config.model_type)
    _check_code(config, text_config.model_type)
    tokenizer = load_tokenizer(config, source)
    dtype = resolve_dtype(config.dtype, config.device)
    model = _model_without_weights(hf_config, dtype)
    if config.device == "cpu" and any(not getattr(module, "has_gate", True) for module in model.modules()):
        raise BaseModelUnsupported(
            f"{hf_config.model_type} needs a GPU with the vLLM engine: vLLM has no CPU code for experts without a gate"
        )
    modules, paths = language_modules(model)
    linears = {name: linear for name, linear in modules.linears.items() if name not in modules.routers}
    heads = config_setting(text_config, "num_key_value_heads") or text_config.num_attention_heads
    _check_size(config.tensor_parallel_size, text_config, heads, linears)
    head_dim = _head_dim(text_config)
    declared = _declared_end_ids(source, (hf_config, text_config))
    return FrontModel(
        source=source,
        model_type=hf_config.model_type,
        tokenizer=tokenizer,
        eos_token_ids=find_end_ids(declared, tokenizer, text_config.vocab_size),
        vocab_size=text_config.vocab_size,
        num_embeddings=min(text_config.vocab_size, language_part(model).get_input_embeddings().weight.shape[0]),
        max_position=text_config.max_position_embeddings,
        dtype=dtype,
        num_kv_heads=heads,
        kv_token_bytes=text_config.num_hidden_layers * 2 * heads * head_dim * dtype.itemsize,
        shapes=modules.shapes,
        paths=paths,
        is_multimodal=text_config is not hf_config,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        is_quantized=bool(find_quantised(hf_config)),
        has_latents=config_setting(text_config, "kv_lora_rank") is not None,
        window=config_setting(text_config, "sliding_window") or None,
        sampling_defaults=sampling_defaults(config, source),
    )


def _read_text_config(source: str, hf_config: Any) -> Any:
    """Return the settings of the language model, which own families make only now. Raises: BaseModelUnsupported."""
    try:
        return hf_config.get_text_config()
    except Exception as exc:
        raise BaseModelUnsupported(f"the configuration of {source} cannot be read ({first_line(exc)})") from exc


def _check_config(hf_config: Any, text_config: Any) -> None:
    """Raise BaseModelUnsupported for a model that this engine cannot describe to prompts and adapters."""
    problems = []
    if config_setting(hf_config, "is_encoder_decoder") or config_setting(text_config, "is_encoder_decoder"):
        problems.append("an encoder-decoder architecture")
    else:
        found = {name: config_setting(text_config, name) for name in _NEEDED}
        problems += [f"a config without {name}" for name, value in found.items() if not isinstance(value, int)]
        problems += [f"{name} {value}" for name, value in found.items() if isinstance(value, int) and value < 1]
    if problems:
        raise BaseModelUnsupported(
            f"{hf_config.model_type} has {', '.join(problems)}, which the vLLM engine does not support"
        )
    for name, value in _CHOICE_OF_EXPERTS.get(text_config.model_type, {}).items():
        if config_setting(text_config, name) != value:
            raise BaseModelUnsupported(
                f"{text_config.model_type} needs {name} {value!r} in config.json with the vLLM engine, because vLLM"
                f" chooses experts in another way without it; got {config_setting(text_config, name)!r}"
            )


def _head_dim(text_config: Any) -> int:
    """Return the number of values of a head, the largest of all layers."""
    settings = text_config.to_dict()
    layers = (settings.get("per_layer_config") or {}).values()
    sizes: list[int] = [size for each in (settings, *layers) if (size := each.get("head_dim"))]
    return max(sizes, default=text_config.hidden_size // text_config.num_attention_heads)


def language_part(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of the model that computes text: the model itself, unless it needs images or holds several.

    Raises: BaseModelUnsupported if no part computes text.
    """
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or part.config.model_type in _FAILS_WITHOUT_IMAGES:
            continue
        images = inspect.signature(type(part).forward).parameters.get("pixel_values")
        if images is not None and images.default is inspect.Parameter.empty:
            continue
        if part.get_output_embeddings() is not None:
            return part
    raise BaseModelUnsupported(f"{model.config.model_type} has no part that computes text")


def language_modules(model: PreTrainedModel) -> tuple[Adaptable, dict[str, str]]:
    """Return what adapters of the language model may target, and the paths of its linear layers, by their names there.

    In a multimodal model these are the language model's modules only. Their names are those of a text-only model.
    """
    if model.config.get_text_config() is model.config:
        found = Adaptable.of(model)
        return found, {name: name for name in found.linears}
    part = language_part(model)
    decoder = part.get_decoder()
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    own = [part for part in prefix.split(".") if part in ("model", "decoder", "transformer")] or ["model"]
    found, name = Adaptable.of(decoder, part.get_output_embeddings()), ".".join(own)
    return found.within(name), {f"{name}.{path}": f"{prefix}.{path}" for path in found.linears}


def _model_without_weights(hf_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return transformers' model without memory for its weights. Raises: BaseModelUnsupported."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(hf_config).from_config(hf_config, dtype=dtype, trust_remote_code=False)
    except Exception as exc:
        raise BaseModelUnsupported(
            f"{hf_config.model_type} has no language model that transformers can build ({first_line(exc)})"
        ) from exc
    return model


def narrowed(model: FrontModel, ends: Sequence[Mapping[str, Sequence[int]]]) -> FrontModel:
    """Return the model with those of its modules that the workers hold with the same shapes.

    `ends`: of each worker, the ends of its share of each module.
    Raises: BaseModelUnsupported if no module is left.
    """
    held: dict[str, tuple[int, ...]] = {}
    for name in set(ends[0]).intersection(*ends[1:]):
        held[name] = tuple(map(max, zip(*[of_worker[name] for of_worker in ends], strict=True)))
    shapes = {name: shape for name, shape in model.shapes.items() if held.get(name) == shape}
    missing = [name for name in model.shapes if name not in shapes]
    if not shapes:
        raise BaseModelUnsupported(
            f"{model.model_type} cannot have adapters with the vLLM engine: vLLM's layers have other shapes than"
            f" transformers', for example {missing[0]}"
        )
    if missing:
        logger.warning(
            "adapters of %d of the base model's %d modules are refused, because vLLM computes them otherwise: %s%s",
            len(missing),
            len(model.shapes),
            ", ".join(missing[:3]),
            ", ..." if len(missing) > 3 else "",
        )
    return keep_modules(model, shapes)


def keep_modules(model: FrontModel, names: Collection[str]) -> FrontModel:
    """Return the model with these of its modules only."""
    return replace(
        model,
        shapes={name: shape for name, shape in model.shapes.items() if name in names},
        paths={name: path for name, path in model.paths.items() if name in names},
    )


def _check_dtype(config: VllmWorkerConfig, hf_config: Any) -> None:
    """Refuse float32 over quantized weights: where a processor has AMX, vLLM's products of integers refuse it."""
    if config.dtype == "float32" and find_quantised(hf_config):
        raise WorkerConfigInvalid("dtype must be 'auto' or 'bfloat16' with a quantized base model, got 'float32'")


def _check_code(config: VllmWorkerConfig, model_type: str) -> None:
    """Raise BaseModelUnsupported for a family that vLLM would fail to start after its processes have begun."""
    if model_type in _UNREAD:
        raise BaseModelUnsupported(f"vLLM 0.32 cannot load {model_type}: {_UNREAD[model_type]}")
    if config.device == "cpu" and model_type in _NOT_ON_CPU:
        raise BaseModelUnsupported(
            f"{model_type} needs a GPU with the vLLM engine: vLLM has no CPU code for {_NOT_ON_CPU[model_type]}"
        )
    is_float32 = resolve_dtype(config.dtype, config.device) == torch.float32
    if config.device == "cpu" and is_float32 and model_type in _BFLOAT16_ON_CPU:
        raise BaseModelUnsupported(
            f"{model_type} has linear attention, which vLLM computes on the CPU in bfloat16 only: set worker.dtype to"
            f" 'bfloat16', got '{config.dtype}'"
        )


def _check_size(size: int, hf_config: Any, num_kv_heads: int, linears: Mapping[str, nn.Linear]) -> None:
    """Raise WorkerConfigInvalid if so many processes cannot share the model, BaseModelUnsupported if no two can."""
    if size == 1:
        return
    found = {name.rpartition(".")[2] for name in linears} & _SEVERAL_PARTS
    if found:
        raise BaseModelUnsupported(
            f"{hf_config.model_type} has {' and '.join(sorted(found))}, several parts that one adapter module covers,"
            " which vLLM divides unevenly; use tensor_parallel_size 1"
        )
    counts = [(hf_config.num_attention_heads, "attention heads")]
    counts += [(width, "hidden values of an MLP") for width in _mlp_widths(linears, hf_config.hidden_size)]
    if size % num_kv_heads:  # otherwise several processes have the same head
        counts.append((num_kv_heads, "key heads"))
    if uneven := [f"{count} {what}" for count, what in counts if count % size]:
        raise WorkerConfigInvalid(
            f"tensor_parallel_size must divide the base model's {' and '.join(uneven)}, got {size}"
        )


def _mlp_widths(linears: Mapping[str, nn.Linear], hidden_size: int) -> list[int]:
    """Return the different numbers of hidden values of the MLPs, for which configurations have several names."""
    downs = [linear for name, linear in linears.items() if "att" not in name and linear.out_features == hidden_size]
    return sorted({linear.in_features for linear in downs})


def _declared_end_ids(source: str, configs: Sequence[Any]) -> Any:
    """Return the one or several ids that the model's files declare, or None."""
    try:
        return GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # the model has no such file
        return next((found for each in configs if (found := config_setting(each, "eos_token_id")) is not None), None)
