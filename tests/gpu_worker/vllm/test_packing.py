"""An adapter packed for another process equals itself when it is unpacked."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.bank.device_layout import to_device_layout
from gpu_worker.vllm.packing import packed, unpacked
from tests.tiny import random_adapter

SHAPES = {"q_proj": (6, 5), "k_proj": (3, 5), "down_proj": (5, 7), "experts.down_proj": (5, 3, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_and_shape_survives(dtype: torch.dtype) -> None:
    weights = random_adapter(SHAPES, 1, rank_of=lambda name: {"q_proj": 1, "k_proj": 4}.get(name, 2))
    adapter = to_device_layout(weights, SHAPES, dtype)
    kind, digest, dtype_name, modules, values = packed(adapter)
    assert (kind, len(values)) == ("put", adapter.num_bytes)
    found = unpacked(digest, dtype_name, [tuple(module) for module in modules], values)
    assert (found.weights_digest, found.max_rank) == (weights.weights_digest, 4)
    assert found.modules.keys() == adapter.modules.keys() and list(found.experts) == ["experts.down_proj"]
    for kind, expected in ((found.modules, adapter.modules), (found.experts, adapter.experts)):
        for name, module in expected.items():
            assert torch.equal(kind[name].a, module.a)
            assert torch.equal(kind[name].bt, module.bt)
    on_device = unpacked(digest, dtype_name, modules, values, device=torch.device("meta"))
    assert {tensor.device.type for module in on_device.modules.values() for tensor in (module.a, module.bt)} == {"meta"}
    assert on_device.experts["experts.down_proj"].a.device.type == "cpu"
