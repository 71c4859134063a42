from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lora_store import BlobCorrupted, decode_weights, encode_weights
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


def test_modules_may_share_memory(make_weights: MakeWeights) -> None:
    module = next(iter(make_weights().values()))
    digest, data = encode_weights({"one": module, "two": module})
    assert torch.equal(decode_weights(digest, data).modules["two"].lora_a, module.lora_a)


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


@pytest.mark.parametrize("position", [0, 20, -1])
def test_a_flipped_byte_is_noticed(make_weights: MakeWeights, position: int) -> None:
    digest, data = encode_weights(make_weights())
    broken = bytearray(data)
    broken[position] ^= 1
    with pytest.raises(BlobCorrupted) as caught:
        decode_weights(digest, bytes(broken))
    assert caught.value.digest == digest
