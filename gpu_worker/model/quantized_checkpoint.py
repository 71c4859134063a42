"""Load checkpoints of the format compressed-tensors with integer weights of 8 or 4 bits, and keep the integers.

Source: https://github.com/vllm-project/compressed-tensors, formats int-quantized and pack-quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.checkpoint import load_tensors, read_tensors
from gpu_worker.model.embedding import keeping_tie
from gpu_worker.model.quantization import GROUP, SMALL_GROUP, QuantizedWeight, replace_layer, round_to_halves

METHOD = "compressed-tensors"
PACKED = "pack-quantized"  # several values in one int32
_FORMATS = (PACKED, "int-quantized", "naive-quantized")
_WORD_BITS = 32
_REMEDY = "use engine 'vllm', or dequantise the weights and save the result"
OFFSET = ".weight_offset"  # only in the folders that `gguf_model` writes
_SCALE, _VALUES, _WORDS, _SHAPE = ".weight_scale", ".weight", ".weight_packed", ".weight_shape"
_OTHERS = (".weight_zero_point", ".weight_g_idx", ".input_scale", ".weight_global_scale")


def check_format(quantization: Any, model_type: str) -> None:
    """Check the `quantization_config` of a model. Raises: BaseModelUnsupported, which names what is not supported."""
    if problem := _problem(_as_mapping(quantization)):
        raise BaseModelUnsupported(
            f"{model_type} has weights quantised by {problem}; the native engine reads {METHOD} with symmetric"
            f" integers of 8 or 4 bits, and GGUF files: {_REMEDY}"
        )


def load_quantized(source: str, config: Any, **options: Any) -> PreTrainedModel:
    """Load the model with layers of integer weights. `options`: of transformers' `from_pretrained`.

    Raises: BaseModelUnsupported if tensors are missing, do not fit or have a form that is not supported.
    """
    check_format(config.quantization_config, config.model_type)
    sizes = _find_group_sizes(_as_mapping(config.quantization_config))
    del config.quantization_config
    tensors = read_tensors(source)
    weights = dict(take_weights(tensors, sizes))
    if alone := sorted(key for key in tensors if key.endswith(_VALUES) and tensors[key].itemsize == 1):
        raise BaseModelUnsupported(
            f"the scales of {alone[0].removesuffix(_VALUES)} are missing. Copy the model's files again"
        )
    one = torch.zeros((), dtype=options["dtype"])  # stands for all numbers of a layer until it is replaced
    tensors |= {name + _VALUES: one.expand(weight.values.shape) for name, weight in weights.items()}
    model = load_tensors(source, config, tensors, **options)
    tensors.clear()  # so that the memory of a weight is free once its layer is replaced
    with keeping_tie(model):
        for name, weight in weights.items():
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                raise BaseModelUnsupported(
                    f"the weights of {name} are integers, but it is not a linear layer of {config.model_type}:"
                    f" {_REMEDY}"
                )
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
    """Return the values (O, I) int8 of words (O, W), whose lowest bits are the first value: a byte holds one or two."""
    found = words.contiguous().view(torch.uint8)
    if bits == 4:
        found = torch.stack([found & 0xF, found >> 4], dim=-1).flatten(1)
    return (found[:, :num_in] - (1 << (bits - 1))).view(torch.int8)


def _as_mapping(quantization: Any) -> Mapping[str, Any]:
    """Return a `quantization_config`, which transformers may have parsed, as a mapping."""
    found: Mapping[str, Any] = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
    return found


def _find_group_sizes(settings: Mapping[str, Any]) -> set[int]:
    """Return the numbers of inputs of an output that share a scale."""
    groups = (settings.get("config_groups") or {}).values()
    return {group["weights"]["group_size"] for group in groups if group["weights"]["strategy"] == "group"}


def _problem(found: Mapping[str, Any]) -> str | None:
    """Return what of a `quantization_config` is not supported, or None."""
    method = str(found.get("quant_method"))
    if method != METHOD:
        return method
    if found.get("kv_cache_scheme"):
        return f"{method} with a quantised KV cache"
    if (found.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return f"{method} with sparse weights"
    if found.get("transform_config"):
        return f"{method} with transformed inputs (transform_config)"
    for group in (found.get("config_groups") or {}).values():
        if not isinstance(group, dict):
            return f"{method} with config_groups by the name of a scheme"
        form = group.get("format") or found.get("format")
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        kind = f"{weights.get('type', 'int')} {weights.get('num_bits')} bits"
        if form not in _FORMATS or weights.get("type", "int") != "int" or weights.get("num_bits") not in (8, 4):
            return f"{method}, format {form} ({kind})"
        if not weights.get("symmetric", True) or weights.get("strategy") not in ("channel", "group", "tensor"):
            return f"{method} with asymmetric weights or strategy {weights.get('strategy')} ({kind})"
        size = weights.get("group_size")
        is_known = isinstance(size, int) and (size == SMALL_GROUP or (size >= GROUP and size % GROUP == 0))
        if weights["strategy"] == "group" and not is_known:
            return f"{method} with groups of {size}, which is neither {SMALL_GROUP} nor a multiple of {GROUP}"
        if inputs and (inputs.get("type", "int"), inputs.get("num_bits"), inputs.get("dynamic")) != ("int", 8, True):
            return f"{method} with inputs of {inputs.get('num_bits')} bits that are not rounded token by token"
        if group.get("output_activations"):
            return f"{method} with quantised outputs"
    return None


def take_weights(tensors: dict[str, Tensor], group_sizes: Collection[int]) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield each layer's name and integers, and remove its tensors."""
    for name in sorted(key.removesuffix(_SCALE) for key in tensors if key.endswith(_SCALE)):
        if unknown := [suffix for suffix in _OTHERS if name + suffix in tensors]:
            raise BaseModelUnsupported(f"{name}{unknown[0]} is of a format that is not supported: {_REMEDY}")
        scales = tensors.pop(name + _SCALE).float()
        if name + _WORDS in tensors:
            bits, values = _unpack(name, tensors.pop(name + _WORDS), tensors.pop(name + _SHAPE, None))
        elif (found := tensors.pop(name + _VALUES, None)) is not None and found.dtype == torch.int8:
            bits, values = 8, found
        else:
            raise BaseModelUnsupported(f"the integers of {name} are missing. Copy the model's files again")
        yield name, _weight(name, values, scales, tensors.pop(name + OFFSET, None), bits, group_sizes)


def _unpack(name: str, words: Tensor, shape: Tensor | None) -> tuple[int, Tensor]:
    """Return the bits of the words' values, which the numbers of words and of values tell, and the values (O, I)."""
    num_out, num_in = shape.tolist() if shape is not None and shape.shape == (2,) else (0, 0)
    fitting = [bits for bits in (8, 4) if words.shape == (num_out, -(-num_in * bits // _WORD_BITS))]
    if len(fitting) != 1 or words.dtype != torch.int32:
        raise BaseModelUnsupported(
            f"{name}{_WORDS} is not int32 words of {name}{_SHAPE} values of 8 or 4 bits. Copy the model's files again"
        )
    return fitting[0], unpack_words(words, fitting[0], num_in)


def _weight(
    name: str, values: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, group_sizes: Collection[int]
) -> QuantizedWeight:
    """Return the weight with one scale per output, or per output and group of GROUP or SMALL_GROUP inputs.

    `group_sizes`: those that the config names. The file's groups may be longer than GROUP. Scales of groups are rounded
    to 11 bits, and 4 bits in small groups become 8.
    """
    num_out, num_in = values.shape if values.ndim == 2 else (0, 0)
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    num_groups = -(-num_in // GROUP)
    sizes = [size for size in group_sizes if scales.shape[1:] == (-(-num_in // size),)]
    if scales.shape[1:] == (1,):
        sizes = [num_groups * GROUP]
    if len(sizes) != 1 or scales.shape[0] not in (1, num_out) or not num_in:
        raise BaseModelUnsupported(f"the scales of {name} do not fit its weights. Copy the model's files again")
    if bits == 8 and scales.shape[1] == 1:
        return QuantizedWeight(values, scales.expand(num_out, -1).contiguous(), bits, 0)
    group = SMALL_GROUP if sizes[0] == SMALL_GROUP else GROUP
    scales = scales.repeat_interleave(sizes[0] // group, dim=1)[:, : -(-num_in // group)]
    scales = round_to_halves(scales.expand(num_out, -1).contiguous())
    return QuantizedWeight(values, scales, 8 if group == SMALL_GROUP else bits, group, offsets)
