"""The canonical bytes of an adapter's weights. Equal weights and scalings give equal bytes, whatever their folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.errors import BlobCorrupted
from lora_store.safetensors_layout import ALIGNMENT, PREFIX_BYTES, StoredModule, StoredTensor, make_pieces, tensors_in

if TYPE_CHECKING:
    import torch

Buffer = npt.NDArray[np.uint8]
_METADATA_KEY = "lora"  # one key only: safetensors writes several in no fixed order


def hash_blob(data: bytes | memoryview) -> str:
    """Return the name of a blob: its sha256 in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class WeightsBlob:
    """The canonical bytes of some modules, produced piece by piece and never all in memory."""

    modules: Mapping[str, ModuleWeights | StoredModule]

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes in order: a safetensors file with every module's scaling in its metadata.

        Its tensors are `<module>.lora_a` and `<module>.lora_b`, each in its own dtype.
        """
        tensors: dict[str, torch.Tensor | StoredTensor] = {}
        for name, module in self.modules.items():
            tensors[f"{name}.lora_a"] = module.lora_a
            tensors[f"{name}.lora_b"] = module.lora_b
        scaling = {name: float(module.scaling) for name, module in self.modules.items()}
        return make_pieces(tensors, {_METADATA_KEY: json.dumps({"scaling": scaling}, sort_keys=True)})

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
    return hash_blob(data), data


def decode_weights(digest: str, data: bytes | Buffer) -> AdapterWeights:
    """Return the weights that `encode_weights` encoded, modules sorted, copied to new memory.

    Raises: BlobCorrupted if `data` does not hash to `digest`.
    """
    buffer = np.frombuffer(data, np.uint8)
    check_digest(digest, [buffer])
    return weights_in(digest, buffer.copy())


def check_digest(digest: str, parts: Iterable[Buffer]) -> None:
    """Hash the parts of a blob. Raises: BlobCorrupted if together they do not hash to `digest`."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.data)
    if (found := hashed.hexdigest()) != digest:
        raise BlobCorrupted(digest, found)


def weights_in(digest: str, data: Buffer) -> AdapterWeights:
    """Return the weights of verified canonical bytes, modules sorted, as views of `data`. Do not write to them."""
    import torch  # imported here, since it takes seconds

    start = PREFIX_BYTES + int.from_bytes(data[:PREFIX_BYTES].tobytes(), "little")
    layout = _read_layout(data[PREFIX_BYTES:start].tobytes(), len(data) - start)
    values = torch.from_numpy(np.asarray(_Writable(data[start:])))
    if values.data_ptr() % ALIGNMENT:
        values = values.clone()
    return AdapterWeights(digest, StoredModules(layout, values))


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Where a matrix is: `offset` bytes behind the header."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, values: torch.Tensor) -> torch.Tensor:
        """Return the matrix. Dims: values (N,) uint8, the bytes behind the header."""
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        return values[self.offset : self.offset + num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class StoredPair:
    """Where one module's LoRA pair is. Dims: R rank, I in, O out. `lora_a` (R, I), `lora_b` (O, R)."""

    lora_a: StoredMatrix
    lora_b: StoredMatrix
    scaling: float


@dataclass(frozen=True, eq=False)
class BlobLayout:
    """The content of a header. Blobs with equal headers share one, so results can be cached by it."""

    pairs: Mapping[str, StoredPair]

    @cached_property
    def dtypes(self) -> frozenset[torch.dtype]:
        """The dtypes of all matrices."""
        return frozenset(matrix.dtype for pair in self.pairs.values() for matrix in (pair.lora_a, pair.lora_b))


class StoredModules(Mapping[str, ModuleWeights]):
    """The modules of a blob. The views of its bytes are created on access: a bank needs only their addresses.

    `data`: the bytes behind the header, (N,) uint8.
    """

    def __init__(self, layout: BlobLayout, data: torch.Tensor) -> None:
        self.layout, self.data = layout, data
        self._made: dict[str, ModuleWeights] = {}

    def __getitem__(self, name: str) -> ModuleWeights:
        if name not in self._made:
            pair = self.layout.pairs[name]
            a, b = pair.lora_a.view(self.data), pair.lora_b.view(self.data)
            self._made[name] = ModuleWeights(a, b, pair.scaling)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.pairs)

    def __len__(self) -> int:
        return len(self.layout.pairs)


@lru_cache(maxsize=64)
def _read_layout(header: bytes, num_bytes: int) -> BlobLayout:
    """Parse a header. The adapters of a pool have few different ones. `num_bytes`: of all tensors."""
    entries = json.loads(header)
    scalings = json.loads(entries.pop("__metadata__")[_METADATA_KEY])["scaling"]
    matrices, offset = {}, 0
    for name, tensor in tensors_in(entries, np.broadcast_to(np.uint8(0), num_bytes)).items():
        matrices[name] = StoredMatrix(offset, tensor.torch_dtype, tensor.shape)
        offset += len(tensor.data)
    return BlobLayout(
        {
            name: StoredPair(matrices[f"{name}.lora_a"], matrices[f"{name}.lora_b"], scaling)
            for name, scaling in sorted(scalings.items())
        }
    )


class _Writable:
    """An array of the same memory that counts as writable, since torch warns about others. It keeps the memory."""

    def __init__(self, data: Buffer) -> None:
        self._data = data

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._data.__array_interface__ | {"data": (self._data.ctypes.data, False)}
