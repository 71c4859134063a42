"""The Triton products, compiled for a GPU, and by the interpreter against a loop over tokens. Needs Triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_worker.bank.residency import Residency
from gpu_worker.vllm import tiled_plans
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.slow_lora import CPU, WIDTHS, assert_adds_as_the_loop, pool_of, random_plans, settled
from tests.soak import Scale
from tests.tiny import plan_of


@pytest.fixture(scope="module")
def tiled() -> Iterator[ModuleType]:
    """Load the kernels for Triton's interpreter, which computes bfloat16 wrongly, so they run in float32."""
    spec = importlib.util.spec_from_file_location("interpreted_tiled_plans", tiled_plans.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
        patch.setattr(module, "_MOST_PARTS", 2)  # the interpreter takes a millisecond for each part of each tile
        yield module


# Compute capabilities of A100, RTX 3090, L4, H100, B200 and RTX 5090.
GPUS = (80, 86, 89, 90, 100, 120)
# Every GPU comes once before any comes again, first with the part number that compiles fast, but for the H100.
KINDS = [
    (gpu, ("bf16", "fp16")[(place + turn) % 2], (1, 8)[(turn // 2 + (gpu == 90)) % 2])
    for turn in range(4)
    for place, gpu in enumerate(GPUS)
]
SHARED_BYTES = {"_shrink": 8 << 10, "_expand": 36 << 10}  # of a block; every GPU has 48 KiB without being asked


def test_the_kernels_compile_for_every_gpu_and_use_its_matrix_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: Scale
) -> None:
    """Triton compiles for a GPU without having one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    most = dict.fromkeys(SHARED_BYTES, 0)
    for gpu, dtype, parts in KINDS[: scale.pick("kinds of kernels", small=len(GPUS), full=len(KINDS))]:
        for name in SHARED_BYTES:
            compiled = compiled_for(name, gpu, dtype, parts)
            assert compiled.asm["cubin"] and "mma" in compiled.asm["ptx"], (name, gpu, dtype, parts)
            most[name] = max(most[name], compiled.metadata.shared)
    assert all(0 < most[name] <= bound for name, bound in SHARED_BYTES.items()), most
    for name, num_bytes in most.items():
        scale.record(f"shared bytes of {name}", num_bytes)


def compiled_for(name: str, gpu: int, dtype: str, parts: int) -> Any:
    """Compile a kernel for the compute capability, and for weights of this dtype."""
    kernel = getattr(tiled_plans, name)
    types = dict.fromkeys(("x", "a", "bt", "y"), f"*{dtype}") | dict.fromkeys(("h", "plan_weights"), "*fp32")
    types |= dict.fromkeys(("tiles", "plan_rows", "plan_sizes", "plan_ranks", "plan_fusions"), "*i32")
    sizes = {
        "PARTS": parts,
        "TILE": tiled_plans._TILE,
        "RANKS": tiled_plans._RANKS,
        "INPUTS": tiled_plans._INPUTS,
        "OUTPUTS": tiled_plans._OUTPUTS,
    }
    constants = {(each.num,): sizes[each.name] for each in kernel.params if each.is_constexpr}
    signature = {each.name: "constexpr" if each.is_constexpr else types.get(each.name, "i32") for each in kernel.params}
    return triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", gpu, 32))


def filled(
    tiled: ModuleType,
    plans: Sequence[Plan],
    counts: Sequence[int],
    residency: Residency,
    rows: int,
    most_plans: int = 9,
) -> Any:
    found = tiled.TiledPlans(most_tokens=sum(counts), most_plans=most_plans, num_rows=rows, device=CPU)
    found.fill(plans, counts, residency)
    return found


@pytest.mark.parametrize("num_in", [1, 300], ids=lambda width: f"in{width}")
def test_the_products_equal_a_loop_over_tokens(num_in: int, tiled: ModuleType) -> None:
    """Plans of several rank blocks, rows of several tiles, and modules that adapters lack."""
    pool = pool_of([4, 1, 7, 8, 3, 18], num_in, WIDTHS)
    bank, residency = settled(pool, num_in, WIDTHS, torch.float32)
    plans, counts = random_plans(pool, 6), [1, 18, 1, 3, 1, 2]
    assert_adds_as_the_loop(filled(tiled, plans, counts, residency, bank.num_rows), bank, pool, plans, counts)


def test_large_steps_do_not_divide_the_input_and_give_the_same(
    tiled: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of([4, 3], 300, WIDTHS)
    bank, residency = settled(pool, 300, WIDTHS, torch.float32)
    plans = [plan_of("fusion", (pool[0], 0.5), (pool[1], 2.0)), BASE_PLAN]
    monkeypatch.setattr(tiled, "_ENOUGH_PROGRAMS", 1)
    assert_adds_as_the_loop(filled(tiled, plans, [20, 2], residency, bank.num_rows), bank, pool, plans, [20, 2])


def test_an_adapter_that_is_not_finite_changes_only_its_own_rows(tiled: ModuleType) -> None:
    pool = pool_of([3, 2], 16, {"m": 16})
    bank, residency = settled(pool, 16, {"m": 16}, torch.float32)
    module, spoilt = bank.modules["m"], residency.rows("0")
    assert 0 in spoilt, "places without a rank row are masked, and would read row 0"
    module.all_bt[spoilt] = module.inputs.all_a[spoilt] = float("nan")
    plans = [plan_of("selection", (pool[1], 1.0)), BASE_PLAN, plan_of("fusion", (pool[0], 1.0))]
    y = torch.zeros(3, 16)
    filled(tiled, plans, [1, 1, 1], residency, bank.num_rows).add(torch.ones(3, 16), [(y, module)])
    assert y.isfinite().all(dim=1).tolist() == [True, True, False]
    assert y[0].any() and not y[1].any()


class Captured:
    """Keeps the launches of a kernel in place of running them, as the capture of a CUDA graph does."""

    def __init__(self, kernel: Any, graph: list[Callable[[], None]]) -> None:
        self._kernel, self._graph = kernel, graph

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, **sizes: int) -> None:
            self._graph.append(lambda: self._kernel[grid](*arguments, **sizes))

        return launch


def test_launches_that_were_captured_without_plans_compute_those_of_later_steps(
    tiled: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of([4, 1, 9, 8], 40, WIDTHS)
    bank, residency = settled(pool, 40, WIDTHS, torch.float32)
    x, modules = torch.randn(24, 40), bank.modules.values()
    outputs = [torch.zeros(24, len(module.bt[0])) for module in modules]
    replayed = filled(tiled, [BASE_PLAN], [24], residency, bank.num_rows, most_plans=6)
    graph: list[Callable[[], None]] = []
    with monkeypatch.context() as patch:
        patch.setattr(tiled, "is_capturing", lambda device: True)
        for name in ("_shrink", "_expand"):
            patch.setattr(tiled, name, Captured(getattr(tiled, name), graph))
        for output, module in zip(outputs, modules, strict=True):
            replayed.add(x, [(output, module)])
    assert len(graph) == 1 + len(outputs), "modules that read the same input share a launch"
    for seed, counts in enumerate(([1, 17, 2], [1, 1, 1, 1])):
        plans = random_plans(pool, 9)[4 * seed : 4 * seed + len(counts)]
        replayed.fill(plans, counts, residency)
        expected = [torch.zeros_like(output) for output in outputs]
        direct = filled(tiled, plans, counts, residency, bank.num_rows)
        num_tokens, part = sum(counts), x[: sum(counts)]
        for output, module in zip(expected, modules, strict=True):
            direct.add(part, [(output[:num_tokens], module)])
        for output in outputs:
            output.zero_()
        for launch in graph:
            launch()
        for found, known in zip(outputs, expected, strict=True):
            assert known.any()
            torch.testing.assert_close(found, known)
