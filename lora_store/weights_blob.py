"""The canonical bytes of an adapter's weights: equal weights and scaling give equal bytes, whatever their folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.errors import BlobCorrupted

_METADATA_KEY = "lora"  # a single one: safetensors writes several in no fixed order


def digest_of(data: bytes) -> str:
    """The name of a blob: sha256, lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def encode_weights(modules: Mapping[str, ModuleWeights]) -> tuple[str, bytes]:
    """(weights digest, safetensors bytes).

    Tensors are `<module>.lora_a` and `<module>.lora_b` in their own dtype; the metadata has every module's scaling.
    """
    tensors = {}
    for name, module in modules.items():
        tensors[f"{name}.lora_a"] = _own_memory(module.lora_a)
        tensors[f"{name}.lora_b"] = _own_memory(module.lora_b)
    scaling = {name: float(module.scaling) for name, module in modules.items()}
    data = save(tensors, metadata={_METADATA_KEY: json.dumps({"scaling": scaling}, sort_keys=True)})
    return digest_of(data), data


def decode_weights(digest: str, data: bytes | npt.NDArray[np.uint8]) -> AdapterWeights:
    """The weights that `encode_weights` made `data` from, modules in sorted order, in memory of their own.

    Raises: BlobCorrupted when `data` does not hash to `digest`.
    """
    data = data if isinstance(data, bytes) else data.tobytes()
    found = digest_of(data)
    if found != digest:
        raise BlobCorrupted(digest, found)
    header_len = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + header_len])["__metadata__"]
    tensors = load(data)
    modules = {
        name: ModuleWeights(tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], scaling)
        for name, scaling in sorted(json.loads(metadata[_METADATA_KEY])["scaling"].items())
    }
    return AdapterWeights(digest, modules)


def _own_memory(tensor: Tensor) -> Tensor:
    """A contiguous copy: safetensors refuses views and tensors that share storage."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
