from __future__ import annotations

import gguf
import pytest
import torch

from gpu_worker.model.gguf_blocks import KINDS, read_integers
from tests.gpu_worker.model.gguf_tensors import random_tensor


@pytest.mark.parametrize("kind", KINDS)
def test_the_integers_of_a_tensor_stand_for_what_the_package_gguf_reads(kind: str) -> None:
    data = random_tensor(kind, (6, 512), seed=1)
    found = read_integers(kind, data)
    expected = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    most = 1 << (found.bits - 1)
    assert int(found.values.min()) >= -most and int(found.values.max()) < most
    assert len(found.values.unique()) > (200 if kind == "Q8_0" else 12)
    if kind.endswith("K"):  # their scales have more than 11 bits
        sizes = found.scales.abs() * most + (0 if found.offsets is None else found.offsets.abs())
        assert ((found.dequantized() - expected).abs() <= sizes.repeat_interleave(found.group, dim=1) * 2**-11).all()
        assert not torch.equal(found.dequantized(), expected)
    else:
        assert torch.equal(found.dequantized(), expected)
