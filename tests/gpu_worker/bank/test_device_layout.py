"""Adapter weights in the bank's layout, compared with the formula applied module by module."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.bank.device_layout import to_device_layout
from gpu_worker.errors import AdapterUnfit
from lora_store.adapter import AdapterWeights, ModuleWeights

SHAPES = {"x": (6, 4), "y": (6, 4), "z": (3, 8)}  # (out, in)


def module(name: str, rank: int, *, scaling: float = 0.5, dtype: torch.dtype = torch.float32) -> ModuleWeights:
    num_out, num_in = SHAPES[name]
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator)
    return ModuleWeights(a.to(dtype), b.to(dtype), scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_module_is_cast_transposed_and_scaled_as_alone(dtype: torch.dtype) -> None:
    """Modules of one shape have different scalings, ranks and dtypes."""
    mixes = [
        {"x": module("x", 2), "y": module("y", 2, scaling=3.0), "z": module("z", 1)},
        {"x": module("x", 2), "y": module("y", 5)},
        {"x": module("x", 2, dtype=torch.float16), "y": module("y", 2, dtype=torch.bfloat16), "z": module("z", 2)},
        {"z": module("z", 7)},
    ]
    for modules in mixes:
        adapter = to_device_layout(AdapterWeights("d", modules), SHAPES, dtype)
        assert adapter.weights_digest == "d" and adapter.modules.keys() == modules.keys()
        assert adapter.max_rank == max(m.rank for m in modules.values())
        for name, given in modules.items():
            found = adapter.modules[name]
            torch.testing.assert_close(found.a, given.lora_a.to(dtype), atol=0, rtol=0)
            torch.testing.assert_close(found.bt, (given.lora_b.float() * given.scaling).T.to(dtype), atol=0, rtol=0)
            assert found.rank == given.rank
        elements = sum(m.lora_a.numel() + m.lora_b.numel() for m in modules.values())
        assert adapter.num_bytes == elements * dtype.itemsize


def spoiled(name: str, **changes: float) -> ModuleWeights:
    """Set one value of lora_a or lora_b, or the scaling."""
    good = module(name, 2)
    a, b = good.lora_a.clone(), good.lora_b.clone()
    a[1, 2], b[2, 1] = changes.get("a", 1.0), changes.get("b", 1.0)
    return ModuleWeights(a, b, changes.get("scaling", 1.0))


@pytest.mark.parametrize(
    "changes",
    [{"a": float("nan")}, {"a": float("-inf")}, {"b": float("nan")}, {"b": float("inf")}, {"b": 1e38, "scaling": 1e3}],
    ids=str,
)
def test_only_a_module_that_is_not_finite_once_scaled_is_refused_by_name(changes: dict[str, float]) -> None:
    weights = AdapterWeights("d", {"x": module("x", 2), "y": spoiled("y", **changes), "z": module("z", 2)})
    with pytest.raises(AdapterUnfit, match="y has non-finite values") as caught:
        to_device_layout(weights, SHAPES, torch.float32)
    assert "x is" not in str(caught.value) and "z is" not in str(caught.value)
    largest = AdapterWeights("d", {"x": spoiled("x", a=3e38, b=-3e38)})
    assert to_device_layout(largest, SHAPES, torch.bfloat16).modules["x"].a.isfinite().all()


def test_every_problem_is_named_at_once() -> None:
    modules = {"x": module("z", 2), "y": module("y", 2), "nowhere": module("x", 2)}
    with pytest.raises(AdapterUnfit) as caught:
        to_device_layout(AdapterWeights("d", modules), SHAPES, torch.float32)
    said = str(caught.value)
    assert "x has shape (out, in) (3, 8), the base model has (6, 4)" in said and "no module 'nowhere'" in said
    assert "y" not in said.replace("nowhere", "").split()


@pytest.mark.parametrize(
    ("pair", "problem"),
    [
        ((torch.ones(2, 4), torch.ones(7, 2)), "x "),
        ((torch.ones(2, 4), torch.ones(6, 3)), "x "),
        ((torch.ones(0, 4), torch.ones(6, 0)), "x "),
        (None, "module"),
    ],
    ids=["output size", "unequal ranks", "rank zero", "no modules"],
)
def test_a_module_that_no_product_can_use_is_refused_by_name(
    pair: tuple[torch.Tensor, torch.Tensor] | None, problem: str
) -> None:
    modules = {} if pair is None else {"x": ModuleWeights(*pair, 1.0)}
    with pytest.raises(AdapterUnfit, match=problem):
        to_device_layout(AdapterWeights("d", modules), SHAPES, torch.float32)


def test_experts_are_converted_one_by_one_and_may_be_all_that_an_adapter_has() -> None:
    shapes = SHAPES | {"experts.down_proj": (6, 4, 3)}
    a, b = torch.randn(3, 2, 4), torch.randn(3, 6, 2)
    experts = {"experts.down_proj": ModuleWeights(a, b, 0.5)}
    only = to_device_layout(AdapterWeights("d", experts), shapes, torch.bfloat16)
    assert (dict(only.modules), only.max_rank) == ({}, 1)
    both = to_device_layout(AdapterWeights("d", {"x": module("x", 2), **experts}), shapes, torch.bfloat16)
    assert (list(both.modules), both.max_rank) == (["x"], 2)
    for adapter in (only, both):
        found = adapter.experts["experts.down_proj"]
        assert torch.equal(found.a, a.bfloat16()) and torch.equal(found.bt, (b * 0.5).mT.bfloat16())
    with pytest.raises(AdapterUnfit, match="the adapter has no modules"):
        to_device_layout(AdapterWeights("d", {}), shapes, torch.float32)
