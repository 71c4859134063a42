"""The base model as the front end sees it: its tokenizer, its limits and its shapes, without its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from gpu_worker.config import VllmWorkerConfig
from gpu_worker.errors import BaseModelUnsupported, WorkerConfigInvalid
from gpu_worker.model.base_model import (
    check_is_text_only,
    config_setting,
    load_config,
    load_tokenizer,
    model_source,
    resolve_dtype,
    sampling_defaults,
)
from gpu_worker.model.inject import target_linears

logger = logging.getLogger(__name__)

_NEEDED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings")
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
    kv_token_bytes: int  # of all heads
    shapes: Mapping[str, tuple[int, int]]  # (out, in) of every module an adapter may target
    num_parameters: int
    is_quantized: bool
    window: int | None = None  # of some layers, which see only this many last tokens
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)  # for what a request leaves unset

    @property
    def backend_tokenizer(self) -> Tokenizer:
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        return backend


def load_front_model(config: VllmWorkerConfig) -> FrontModel:
    """Read the model's configuration and tokenizer. Raises: BaseModelUnsupported, WorkerConfigInvalid."""
    source = model_source(config)
    hf_config = load_config(source)
    _check_config(hf_config)
    _check_dtype(config, hf_config)
    tokenizer = load_tokenizer(config)
    dtype = resolve_dtype(config.dtype, config.device)
    model = _model_without_weights(hf_config, dtype)
    linears = target_linears(model, model.get_output_embeddings())
    heads = config_setting(hf_config, "num_key_value_heads") or hf_config.num_attention_heads
    _check_size(config.tensor_parallel_size, hf_config, heads, linears)
    head_dim = config_setting(hf_config, "head_dim") or hf_config.hidden_size // hf_config.num_attention_heads
    return FrontModel(
        source=source,
        model_type=hf_config.model_type,
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(source, hf_config, tokenizer),
        vocab_size=hf_config.vocab_size,
        num_embeddings=model.get_input_embeddings().weight.shape[0],
        max_position=hf_config.max_position_embeddings,
        dtype=dtype,
        num_kv_heads=heads,
        kv_token_bytes=hf_config.num_hidden_layers * 2 * heads * head_dim * dtype.itemsize,
        shapes={name: (linear.out_features, linear.in_features) for name, linear in linears.items()},
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        is_quantized=config_setting(hf_config, "quantization_config") is not None,
        window=config_setting(hf_config, "sliding_window"),
        sampling_defaults=sampling_defaults(config),
    )


def _check_config(hf_config: Any) -> None:
    """Raise BaseModelUnsupported for a model that this engine cannot describe to prompts and adapters."""
    check_is_text_only(hf_config)
    problems = []
    if config_setting(hf_config, "is_encoder_decoder"):
        problems.append("an encoder-decoder architecture")
    else:
        problems += [
            f"a config without {name}" for name in _NEEDED if not isinstance(config_setting(hf_config, name), int)
        ]
    if problems:
        raise BaseModelUnsupported(
            f"{hf_config.model_type} has {', '.join(problems)}, which the vLLM engine does not support"
        )


def _model_without_weights(hf_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return transformers' model without memory for its weights. Raises: BaseModelUnsupported."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    except Exception as exc:
        reason = str(exc).partition("\n")[0]
        raise BaseModelUnsupported(
            f"{hf_config.model_type} has no language model that transformers can build ({reason})"
        ) from exc
    if any("experts" in name.split(".") for name, _ in model.named_modules()):
        raise BaseModelUnsupported(f"{hf_config.model_type} has experts; the vLLM engine has no adapters for them")
    return model


def narrowed(model: FrontModel, ends: Sequence[Mapping[str, Sequence[int]]]) -> FrontModel:
    """Return the model with those of its modules that the workers' banks hold with the same (out, in).

    `ends`: of each worker, the ends (out, in) of its share of each module.
    Raises: BaseModelUnsupported if no module is left.
    """
    held: dict[str, tuple[int, int]] = {}
    for name in set(ends[0]).intersection(*ends[1:]):
        held[name] = max(of_worker[name][0] for of_worker in ends), max(of_worker[name][1] for of_worker in ends)
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
    return replace(model, shapes=shapes)


def _check_dtype(config: VllmWorkerConfig, hf_config: Any) -> None:
    """Refuse float32 over quantized weights: where a processor has AMX, vLLM's products of integers refuse it."""
    if config.dtype == "float32" and getattr(hf_config, "quantization_config", None) is not None:
        raise WorkerConfigInvalid("dtype must be 'auto' or 'bfloat16' with a quantized base model, got 'float32'")


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


def _eos_token_ids(source: str, hf_config: Any, tokenizer: Any) -> frozenset[int]:
    try:
        declared = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # the model has no such file
        declared = hf_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
