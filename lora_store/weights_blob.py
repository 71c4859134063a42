"""The canonical bytes of an adapter's weights. Equal weights and scalings give equal bytes, whatever their folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.errors import BlobCorrupted
from lora_store.safetensors_layout import PREFIX_BYTES, pieces_of, tensors_in

_METADATA_KEY = "lora"  # one key only: safetensors writes several in no fixed order


def digest_of(data: bytes | memoryview) -> str:
    """Return the name of a blob: its sha256 in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class WeightsBlob:
    """The canonical bytes of some modules, produced piece by piece and never all in memory."""

    modules: Mapping[str, ModuleWeights]

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes in order: a safetensors file with every module's scaling in its metadata.

        Its tensors are `<module>.lora_a` and `<module>.lora_b`, each in its own dtype.
        """
        tensors = {}
        for name, module in self.modules.items():
            tensors[f"{name}.lora_a"] = module.lora_a
            tensors[f"{name}.lora_b"] = module.lora_b
        scaling = {name: float(module.scaling) for name, module in self.modules.items()}
        return pieces_of(tensors, {_METADATA_KEY: json.dumps({"scaling": scaling}, sort_keys=True)})

    def num_bytes(self) -> int:
        """Return the number of bytes."""
        return sum(len(piece) for piece in self.pieces())

    def digest(self) -> str:
        """Return the weights' digest."""
        hashed = hashlib.sha256()
        for piece in self.pieces():
            hashed.update(piece)
        return hashed.hexdigest()


def encode_weights(modules: Mapping[str, ModuleWeights]) -> tuple[str, bytes]:
    """Return (weights digest, canonical bytes)."""
    data = b"".join(WeightsBlob(modules).pieces())
    return digest_of(data), data


def decode_weights(digest: str, data: bytes | npt.NDArray[np.uint8]) -> AdapterWeights:
    """Return the weights that `encode_weights` encoded, modules sorted, copied to new memory.

    Raises: BlobCorrupted if `data` does not hash to `digest`.
    """
    view = memoryview(data) if isinstance(data, bytes) else data.data
    found = digest_of(view)
    if found != digest:
        raise BlobCorrupted(digest, found)
    start = PREFIX_BYTES + int.from_bytes(view[:PREFIX_BYTES], "little")
    entries = json.loads(bytes(view[PREFIX_BYTES:start]))
    metadata = entries.pop("__metadata__")
    own = np.empty(len(view) - start, np.uint8)
    own.data[:] = view[start:]
    tensors = {name: stored.tensor() for name, stored in tensors_in(entries, own).items()}
    modules = {
        name: ModuleWeights(tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], scaling)
        for name, scaling in sorted(json.loads(metadata[_METADATA_KEY])["scaling"].items())
    }
    return AdapterWeights(digest, modules)
