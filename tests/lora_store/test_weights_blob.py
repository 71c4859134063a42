from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lora_store import BlobCorrupted, check_digest, decode_weights, weights_in
from lora_store.weights_blob import StoredModules, encode_weights
from tests.lora_store.builders import MakeWeights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("as_buffer", [bytes, lambda data: np.frombuffer(data, np.uint8)], ids=["bytes", "numpy"])
def test_decoded_weights_are_the_encoded_ones_in_their_own_dtype(
    make_weights: MakeWeights, dtype: torch.dtype, as_buffer: Callable[[bytes], Any]
) -> None:
    modules = make_weights(dtype=dtype)
    digest, data = encode_weights(modules)
    decoded = decode_weights(digest, as_buffer(data))
    assert decoded.weights_digest == digest
    assert list(decoded.modules) == sorted(modules)
    for name, module in modules.items():
        assert decoded.modules[name].scaling == module.scaling
        assert decoded.modules[name].lora_a.dtype == dtype
        assert torch.equal(decoded.modules[name].lora_a, module.lora_a)
        assert torch.equal(decoded.modules[name].lora_b, module.lora_b)


def test_equal_weights_give_equal_bytes_whatever_their_order_or_memory_layout(make_weights: MakeWeights) -> None:
    modules = make_weights()
    backwards = {
        name: replace(modules[name], lora_a=modules[name].lora_a.T.contiguous().T) for name in reversed(modules)
    }
    assert not all(module.lora_a.is_contiguous() for module in backwards.values())
    assert encode_weights(backwards) == encode_weights(modules)
    module = next(iter(modules.values()))
    shared = decode_weights(*encode_weights({"one": module, "two": module}))
    assert torch.equal(shared.modules["two"].lora_a, module.lora_a)


@pytest.mark.parametrize("part", ["lora_a", "lora_b", "scaling", "dtype", "name"])
def test_any_difference_in_any_module_changes_the_digest(make_weights: MakeWeights, part: str) -> None:
    digest, _ = encode_weights(make_weights())
    for name in make_weights():
        changed = make_weights()
        module = changed[name]
        if part == "scaling":
            changed[name] = replace(module, scaling=module.scaling * (1 + 2**-50))
        elif part == "dtype":
            changed[name] = replace(module, lora_a=module.lora_a.double())
        elif part == "name":
            changed[name + "x"] = changed.pop(name)
        else:
            getattr(module, part)[-1, -1] += 2**-10
        assert encode_weights(changed)[0] != digest


@pytest.mark.parametrize("offset", [0, 1])
def test_weights_may_be_views_of_a_read_only_buffer_that_they_keep(make_weights: MakeWeights, offset: int) -> None:
    """At an odd address the tensors are copies. Without the buffer's own name, its memory would be reused."""
    modules = make_weights()
    digest, data = encode_weights(modules)
    buffer = np.frombuffer(bytes(offset) + data, np.uint8)[offset:]
    address, size = buffer.ctypes.data, len(buffer)
    assert not buffer.flags.writeable
    found = weights_in(digest, buffer)
    pointers = [module.lora_b.data_ptr() for module in found.modules.values()]
    assert all(address <= pointer < address + size for pointer in pointers) == (offset == 0)
    del buffer
    spoilers = [np.full(size + offset, 255, np.uint8) for _ in range(20)]
    assert len(spoilers) == 20
    for name, module in modules.items():
        assert torch.equal(found.modules[name].lora_b, module.lora_b)


def test_the_parts_of_a_blob_are_hashed_together(make_weights: MakeWeights) -> None:
    digest, data = encode_weights(make_weights())
    buffer = np.frombuffer(data, np.uint8)
    check_digest(digest, [buffer[:7], buffer[7:7], buffer[7:]])
    with pytest.raises(BlobCorrupted) as caught:
        check_digest(digest, [buffer[7:], buffer[:7]])
    assert caught.value.digest == digest != caught.value.found


@pytest.mark.parametrize("position", [0, 20, -1])
def test_a_flipped_byte_is_noticed(make_weights: MakeWeights, position: int) -> None:
    digest, data = encode_weights(make_weights())
    broken = bytearray(data)
    broken[position] ^= 1
    with pytest.raises(BlobCorrupted) as caught:
        decode_weights(digest, bytes(broken))
    assert caught.value.digest == digest


def test_blobs_with_equal_headers_share_one_layout_of_their_own_tensors(make_weights: MakeWeights) -> None:
    first, second = (decode_weights(*encode_weights(make_weights(seed=seed))) for seed in (1, 2))
    other = decode_weights(*encode_weights(make_weights(seed=1, dtype=torch.float16)))
    assert isinstance(first.modules, StoredModules) and isinstance(second.modules, StoredModules)
    assert isinstance(other.modules, StoredModules)
    assert first.modules.layout is second.modules.layout is not other.modules.layout
    assert (first.modules.layout.dtypes, other.modules.layout.dtypes) == ({torch.float32}, {torch.float16})
    for weights in (first, second):
        assert isinstance(weights.modules, StoredModules)
        start = weights.modules.data.data_ptr()
        for name, pair in weights.modules.layout.pairs.items():
            module = weights.modules[name]
            assert (module.lora_a.data_ptr(), module.lora_b.data_ptr()) == (
                start + pair.lora_a.offset,
                start + pair.lora_b.offset,
            )
