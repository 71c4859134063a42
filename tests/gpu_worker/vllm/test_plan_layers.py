"""Layers of vLLM are found under the names of adapters, and the parts of several processes add up. Needs vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import WeightsMapper

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.device_layout import DeviceAdapter, DeviceModule
from gpu_worker.bank.residency import Residency
from gpu_worker.model.mapping import composition
from gpu_worker.vllm import plan_layers
from gpu_worker.vllm.plan_layers import PlanLinear, Share, _locals, _modules_by_path, _slice_paths, _widths, _wrapped
from lora_store.adapter import AdapterRef
from lora_store.plan import Plan, PlannedAdapter

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
    widths = [_widths(one, [None] * len(names)) or [] for one in layers]
    parts = zip(layers, widths, strict=True)
    return [{name: share for name, _, share in _locals("p", one, names, of_one)} for one, of_one in parts]


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


@pytest.mark.parametrize(
    ("local_outs", "outputs", "expected"),
    [
        ([4, 4, 8], [None, 4, 8], [4, 4, 8]),
        ([4, 4, 8, 8], [16, 8], [16, 8]),
        ([4, 4, 8], [16], [16]),
        ([4, 4, 8], [15], None),
        ([4, 4, 8], [6, 10], None),
        ([4, 4, 8], [None], None),
    ],
)
def test_a_module_may_cover_several_slices_of_a_layer(
    local_outs: list[int], outputs: list[int | None], expected: list[int] | None
) -> None:
    one = layer(0, NUM_IN, local_outs)
    one.tp_size = 1
    assert _widths(one, outputs) == expected
    one.tp_size = 2
    assert _widths(one, outputs) == (expected if len(outputs) == len(local_outs) else None)


def test_an_output_of_another_dtype_than_the_bank_gets_its_adapters() -> None:
    """Routers may compute in float32 where the model is bfloat16."""
    banks = LoraBank({"gate": nn.Linear(NUM_IN, 4, bias=False, dtype=torch.bfloat16)}, RANK)
    residency, adapter = Residency(banks), DeviceAdapter("d", {"gate": module(4)})
    residency.try_pin(["d"], {"d": adapter})
    residency.settle()
    plan = Plan("selection", (PlannedAdapter(AdapterRef("-", "-", "d"), "d", 0.5),))
    step = composition([plan], [NUM_TOKENS], residency, torch.bfloat16, None, torch.device("cpu"))
    assert step is not None
    x, y = torch.randn(NUM_TOKENS + 1, NUM_IN).bfloat16(), torch.ones(NUM_TOKENS + 1, 4)
    PlanLinear(0, [(banks.modules["gate"], 4)]).add(y, x, step, NUM_TOKENS)
    expected = 1 + 0.5 * product(x[:NUM_TOKENS].float(), adapter.modules["gate"])
    torch.testing.assert_close(y[:NUM_TOKENS], expected, atol=0.1, rtol=0.02)
    assert y.dtype == torch.float32 and torch.equal(y[NUM_TOKENS], torch.ones(4))


def named_modules(*paths: str) -> nn.Module:
    """Return a model that has modules of these paths."""
    model = nn.Module()
    for path in paths:
        parent = model
        for part in path.split("."):
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
    return model


def test_modules_are_found_under_the_paths_that_vllm_gives_them() -> None:
    """Names that vLLM stacks or does not load stay as they are."""
    model: Any = named_modules(
        "model.layers.0",
        "model.layers.3",
        "model.layers.5.block_sparse_moe",
        "language_model.layers.0",
        "model.layers.6.block_sparse_moe.gate",
        "model.layers.7.router",
        "model.layers.8.mlp.gate",
    )
    model.hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"gpt_neox.": "model.", "model.layers.3.": None, "whole.language_model.": "language_model."},
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q")},
    )
    modules = {
        "gpt_neox.layers.0.q_proj": "gpt_neox.layers.0.q_proj",
        "model.layers.3.dense": "model.layers.3.dense",
        "model.layers.0.o_proj": "whole.language_model.layers.0.o_proj",
        "model.layers.5.mlp.gate": "model.layers.5.mlp.gate",
        "model.layers.6.block_sparse_moe.router": "model.layers.6.block_sparse_moe.router",
        "model.layers.7.router": "model.layers.7.router",
        "model.layers.8.mlp.router.gate": "model.layers.8.mlp.router.gate",
    }
    assert _modules_by_path(model, modules) == {
        "model.layers.0.q_proj": "gpt_neox.layers.0.q_proj",
        "model.layers.3.dense": "model.layers.3.dense",
        "language_model.layers.0.o_proj": "model.layers.0.o_proj",
        "model.layers.5.block_sparse_moe.gate": "model.layers.5.mlp.gate",
        "model.layers.6.block_sparse_moe.gate": "model.layers.6.block_sparse_moe.router",
        "model.layers.7.router": "model.layers.7.router",
        "model.layers.8.mlp.gate": "model.layers.8.mlp.router.gate",
    }


@pytest.mark.parametrize("place", ["language_model.model.layers.0", "model.layers.0"])
def test_a_path_that_vllm_does_not_know_is_looked_for_by_the_name_of_a_text_model(place: str) -> None:
    modules = {"model.layers.0.o_proj": "thinker.model.layers.0.o_proj"}
    assert _modules_by_path(named_modules(place), modules) == {f"{place}.o_proj": "model.layers.0.o_proj"}


def test_a_layer_that_several_modules_hold_is_replaced_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention calls its layers under another path than the one that names them."""
    model: Any = named_modules("attention.inner")
    model.attention.o_proj = model.attention.inner.o_proj = nn.Linear(NUM_IN, NUM_IN)
    model.embedding_modules, model.config = {}, None
    wrapper = nn.Module()
    wrapper.tp_size, wrapper.lora_b_stacked = 1, [torch.empty(1, 1, NUM_IN, RANK)]  # type: ignore[assignment]
    monkeypatch.setattr(plan_layers, "from_layer", lambda *_: wrapper)
    monkeypatch.setattr(plan_layers, "process_packed_modules_mapping", lambda _: {})
    monkeypatch.setattr(plan_layers, "get_supported_lora_modules", lambda _: ["o_proj"])
    monkeypatch.setattr(plan_layers, "is_supported_lora_module", lambda *_: True)
    modules = {"attention.o_proj": "attention.o_proj"}
    [found] = _wrapped(model, None, torch.device("cpu"), modules, {"attention.o_proj": NUM_IN})
    assert found[1] is model.attention.o_proj is model.attention.inner.o_proj is wrapper
