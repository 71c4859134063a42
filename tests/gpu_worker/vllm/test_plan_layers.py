"""Layers of vLLM are found under the names of adapters, and the parts of several processes add up. Needs vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from gpu_worker.bank.device_layout import DeviceModule
from gpu_worker.vllm.plan_layers import Share, _locals, _modules_by_path, _slice_paths

RANK, NUM_IN, NUM_TOKENS, SIZE = 3, 8, 5, 2


def layer(rank: int, local_in: int, local_outs: list[int], output_ids: tuple[int, ...] = (), **base: Any) -> Any:
    """Return what `_locals` reads of a layer of vLLM, with this process's shapes."""
    return SimpleNamespace(
        tp_rank=rank,
        tp_size=SIZE,
        base_layer=SimpleNamespace(input_size=NUM_IN, **base),
        lora_a_stacked=[torch.empty(1, 1, RANK, local_in) for _ in local_outs],
        lora_b_stacked=[torch.empty(1, 1, out, RANK) for out in local_outs],
        output_ids=output_ids,
    )


def shares(names: list[str], *layers: Any) -> list[dict[str, Share]]:
    """Return the shares of each process, by module."""
    return [{name: share for name, _, share in _locals("p", one, names)} for one in layers]


def module(num_out: int) -> DeviceModule:
    return DeviceModule(torch.randn(RANK, NUM_IN), torch.randn(RANK, num_out))


def product(x: Tensor, part: DeviceModule) -> Tensor:
    return x @ part.a.T @ part.bt


def test_columns_of_a_layer_divided_by_outputs_follow_each_other() -> None:
    whole, x = module(12), torch.randn(NUM_TOKENS, NUM_IN)
    parts = shares(["up_proj"], *[layer(rank, NUM_IN, [6], output_size=12) for rank in range(SIZE)])
    found = torch.cat([product(x, part["up_proj"].of(whole)) for part in parts], dim=1)
    torch.testing.assert_close(found, product(x, whole))


def test_outputs_of_a_layer_divided_by_inputs_add_up() -> None:
    whole, x = module(10), torch.randn(NUM_TOKENS, NUM_IN)
    parts = shares(["down_proj"], *[layer(rank, NUM_IN // SIZE, [10], output_size=10) for rank in range(SIZE)])
    halves = x.split(NUM_IN // SIZE, dim=1)
    found = sum(product(half, part["down_proj"].of(whole)) for half, part in zip(halves, parts, strict=True))
    torch.testing.assert_close(found, product(x, whole))


def test_processes_that_share_a_head_of_keys_have_the_same_columns() -> None:
    """Four heads of queries and one of keys, each of four values: each process has two and the one."""
    queries, keys, x = module(16), module(4), torch.randn(NUM_TOKENS, NUM_IN)
    sizes = {"output_size": 24, "output_sizes": [16, 4, 4]}
    layers = [layer(rank, NUM_IN, [8, 4, 4], (rank, 0, 0), **sizes) for rank in range(SIZE)]
    parts = shares(["q_proj", "k_proj", "v_proj"], *layers)
    found = torch.cat([product(x, part["q_proj"].of(queries)) for part in parts], dim=1)
    torch.testing.assert_close(found, product(x, queries))
    for part in parts:
        torch.testing.assert_close(product(x, part["k_proj"].of(keys)), product(x, keys))


def test_a_layer_whose_parts_are_one_module_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"p has several parts .* use tensor_parallel_size 1"):
        shares(["gate_up_proj"], layer(0, NUM_IN, [12], output_size=24, output_sizes=[12, 12]))


def test_a_layer_is_divided_as_adapters_name_its_parts() -> None:
    packed = {"gate_up_proj": ["gate_proj", "up_proj"]}
    assert _slice_paths("m.gate_up_proj", packed, {"m.gate_proj": "a.gate_proj"}) == ["m.gate_proj", "m.up_proj"]
    assert _slice_paths("m.gate_up_proj", packed, {"m.gate_up_proj": "a.gate_up_proj"}) == ["m.gate_up_proj"]
    assert _slice_paths("m.down_proj", packed, {"m.down_proj": "a.down_proj"}) == ["m.down_proj"]


def test_modules_are_found_under_the_paths_that_vllm_gives_them() -> None:
    """Names that vLLM stacks or does not load stay as they are."""
    mapper = WeightsMapper(
        orig_to_new_prefix={
            "gpt_neox.": "model.",
            "model.layers.3.": None,
            "model.language_model.": "language_model.",
        },
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q")},
    )
    model = SimpleNamespace(hf_to_vllm_mapper=mapper)
    modules = {
        "gpt_neox.layers.0.q_proj": "gpt_neox.layers.0.q_proj",
        "model.layers.3.dense": "model.layers.3.dense",
        "model.layers.0.o_proj": "model.language_model.layers.0.o_proj",
    }
    assert _modules_by_path(model, modules) == {
        "model.layers.0.q_proj": "gpt_neox.layers.0.q_proj",
        "model.layers.3.dense": "model.layers.3.dense",
        "language_model.layers.0.o_proj": "model.layers.0.o_proj",
    }
    assert _modules_by_path(SimpleNamespace(), modules) == {path: name for name, path in modules.items()}
