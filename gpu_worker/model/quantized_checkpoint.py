"""Load checkpoints of the format compressed-tensors with integer weights of 8 or 4 bits, and keep the integers.

Source: https://github.com/vllm-project/compressed-tensors, formats int-quantized and pack-quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.checkpoint import load_tensors, weight_files
from gpu_worker.model.quantization import GROUP, MOST_INPUTS, QuantizedWeight, replace_layer

METHOD = "compressed-tensors"
PACKED = "pack-quantized"  # several values in one int32
_FORMATS = (PACKED, "int-quantized", "naive-quantized")
_WORD_BITS = 32
_REMEDY = "use engine 'vllm', or dequantise the weights and save the result"
_SCALE, _VALUES, _WORDS, _SHAPE = ".weight_scale", ".weight", ".weight_packed", ".weight_shape"
_OTHERS = (".weight_zero_point", ".weight_g_idx", ".input_scale", ".weight_global_scale")


def check_format(quantization: Any, model_type: str) -> None:
    """Check the `quantization_config` of a model. Raises: BaseModelUnsupported, which names what is not supported."""
    found: Mapping[str, Any] = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if problem := _problem(found):
        raise BaseModelUnsupported(
            f"{model_type} has weights quantised by {problem}; the native engine reads {METHOD} with symmetric"
            f" integers of 8 or 4 bits, and GGUF files of Q8_0 and Q4_0: {_REMEDY}"
        )


def load_quantized(source: str, config: Any, **options: Any) -> PreTrainedModel:
    """Load the model with layers of integer weights. `options`: of transformers' `from_pretrained`.

    Raises: BaseModelUnsupported if tensors are missing, do not fit or have a form that is not supported.
    """
    check_format(config.quantization_config, config.model_type)
    del config.quantization_config
    tensors: dict[str, Tensor] = {}
    for file in weight_files(source):
        tensors |= load_file(file)
    weights = dict(_take_weights(tensors))
    dequantized = {name + _VALUES: weight.dequantized(options["dtype"]) for name, weight in weights.items()}
    model = load_tensors(source, config, tensors | dequantized, **options)
    for name, weight in weights.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise BaseModelUnsupported(
                f"the weights of {name} are integers, but it is not a linear layer of {config.model_type}: {_REMEDY}"
            )
        if linear.in_features <= MOST_INPUTS:
            replace_layer(model, name, weight)
    return model


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Return values (O, I) int8 as words (O, W) int32, the first value in the lowest bits."""
    per_word = _WORD_BITS // bits
    padded = nn.functional.pad(values.int() + (1 << (bits - 1)), (0, -values.shape[1] % per_word))
    words = torch.zeros(len(values), padded.shape[1] // per_word, dtype=torch.int32)
    for place in range(per_word):
        words |= padded[:, place::per_word] << (bits * place)
    return words


def unpack_words(words: Tensor, bits: int, num_in: int) -> Tensor:
    """Return the values (O, I) int8 of words (O, W)."""
    per_word = _WORD_BITS // bits
    values = torch.empty(len(words), words.shape[1] * per_word, dtype=torch.int8)
    for place in range(per_word):
        values[:, place::per_word] = ((words >> (bits * place)) & ((1 << bits) - 1)) - (1 << (bits - 1))
    return values[:, :num_in].contiguous()


def _problem(found: Mapping[str, Any]) -> str | None:
    """Return what of a `quantization_config` is not supported, or None."""
    method = str(found.get("quant_method"))
    if method != METHOD:
        return method
    if found.get("kv_cache_scheme"):
        return f"{method} with a quantised KV cache"
    if (found.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return f"{method} with sparse weights"
    for group in (found.get("config_groups") or {}).values():
        form = group.get("format") or found.get("format")
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        kind = f"{weights.get('type', 'int')} {weights.get('num_bits')} bits"
        if form not in _FORMATS or weights.get("type", "int") != "int" or weights.get("num_bits") not in (8, 4):
            return f"{method}, format {form} ({kind})"
        if not weights.get("symmetric", True) or weights.get("strategy") not in ("channel", "group", "tensor"):
            return f"{method} with asymmetric weights or strategy {weights.get('strategy')} ({kind})"
        if weights["strategy"] == "group" and (weights.get("group_size") or 0) % GROUP:
            return f"{method} with groups of {weights.get('group_size')}, which is not a multiple of {GROUP}"
        if inputs and (inputs.get("type", "int"), inputs.get("num_bits"), inputs.get("dynamic")) != ("int", 8, True):
            return f"{method} with inputs of {inputs.get('num_bits')} bits that are not rounded token by token"
        if group.get("output_activations"):
            return f"{method} with quantised outputs"
    return None


def _take_weights(tensors: dict[str, Tensor]) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield each layer's name and integers, and remove its tensors."""
    for name in sorted(key.removesuffix(_SCALE) for key in tensors if key.endswith(_SCALE)):
        if unknown := [suffix for suffix in _OTHERS if name + suffix in tensors]:
            raise BaseModelUnsupported(f"{name}{unknown[0]} is of a format that is not supported: {_REMEDY}")
        scales = tensors.pop(name + _SCALE).float()
        if name + _WORDS in tensors:
            words = tensors.pop(name + _WORDS)
            num_in = int(tensors.pop(name + _SHAPE)[1])
            bits = _WORD_BITS // -(-num_in // words.shape[1])
            values = unpack_words(words, bits, num_in)
        elif (found := tensors.pop(name + _VALUES, None)) is not None and found.dtype == torch.int8:
            bits, values = 8, found
        else:
            raise BaseModelUnsupported(f"the integers of {name} are missing. Copy the model's files again")
        yield name, _weight(name, values, scales, bits)


def _weight(name: str, values: Tensor, scales: Tensor, bits: int) -> QuantizedWeight:
    """Return the weight with one scale per output, or per output and group of GROUP inputs."""
    num_out, num_in = values.shape
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    num_groups = -(-num_in // GROUP)
    if scales.shape[1] > 1 or bits == 4:
        repeats = -(-num_groups // scales.shape[1])  # the file's groups may be longer
        scales = scales.repeat_interleave(repeats, dim=1)[:, :num_groups]
    if scales.shape[0] not in (1, num_out) or scales.shape[1] not in (1, num_groups):
        raise BaseModelUnsupported(f"the scales of {name} do not fit its weights. Copy the model's files again")
    has_groups = bits == 4 or scales.shape[1] > 1
    return QuantizedWeight(values, scales.expand(num_out, -1).contiguous(), bits, has_groups)
