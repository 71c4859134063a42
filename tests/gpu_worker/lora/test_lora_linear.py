"""The bank's rows, moved in all modules together, compared with a table of what each row should hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpu_worker.attention.kv_regions import KvRegions
from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.residency import Residency
from gpu_worker.lora.dense_mapping import DenseMapping
from gpu_worker.lora.grouped_mapping import GroupedMapping
from gpu_worker.lora.lora_kernel import LoraKernel
from gpu_worker.lora.lora_linear import LoraLinear
from gpu_worker.lora.mapping import composition
from gpu_worker.step.attention_plan import Segment
from gpu_worker.step.step_context import StepContext
from lora_store.adapter import AdapterRef, AdapterWeights, ModuleWeights
from lora_store.plan import Plan, PlannedAdapter
from tests.gpu_worker.engine_driver import kv_shape

NUM_ROWS = 8
LINEARS = {"up": nn.Linear(3, 5), "gate": nn.Linear(3, 5), "down": nn.Linear(5, 3), "square": nn.Linear(3, 3)}


def weights_of(seed: int, ranks: dict[str, int]) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, rank in ranks.items():
        linear = LINEARS[name]
        a = torch.randn(rank, linear.in_features, generator=generator)
        b = torch.randn(linear.out_features, rank, generator=generator)
        modules[name] = ModuleWeights(a, b, 2.0)
    return AdapterWeights(str(seed), modules)


def assert_holds(bank: LoraBank, rows: list[int], weights: AdapterWeights) -> None:
    """Each module's values in rank order, zeros past its rank and where it is None."""
    bank.set_active(NUM_ROWS)
    for name, module_bank in bank.modules.items():
        a = torch.zeros(len(rows), LINEARS[name].in_features)
        bt = torch.zeros(len(rows), LINEARS[name].out_features)
        if name in weights.modules:
            module = weights.modules[name]
            a[: module.rank], bt[: module.rank] = module.lora_a, module.lora_b.T * module.scaling
        torch.testing.assert_close(module_bank.a[rows], a)
        torch.testing.assert_close(module_bank.bt[rows], bt)


def assert_free(bank: LoraBank, rows: list[int]) -> None:
    bank.set_active(NUM_ROWS)
    for module_bank in bank.modules.values():
        assert bool(module_bank.a[rows].isnan().all() and module_bank.bt[rows].isnan().all())


@pytest.mark.parametrize("rows", [[2, 3, 4], [4, 2, 7], [7, 6, 5], [0, 2, 3]], ids=str)
@pytest.mark.parametrize(
    "ranks", [dict.fromkeys(LINEARS, 3), {"up": 3, "down": 1}, {"up": 1, "gate": 2, "square": 3}], ids=str
)
def test_an_adapter_fills_its_rows_and_no_others(rows: list[int], ranks: dict[str, int]) -> None:
    bank = LoraBank(LINEARS, NUM_ROWS, free_fill=float("nan"))
    weights = weights_of(1, ranks)
    bank.write(rows, bank.to_device_layout(weights))
    assert_holds(bank, rows, weights)
    others = [row for row in range(NUM_ROWS) if row not in rows]
    assert_free(bank, others)
    bank.free(rows)
    assert_free(bank, list(range(NUM_ROWS)))


@pytest.mark.parametrize(("rows", "others"), [([0, 1], [4, 5]), ([1, 0], [4, 5]), ([0, 1], [7, 3])], ids=str)
def test_swapped_rows_change_places_in_every_module(rows: list[int], others: list[int]) -> None:
    bank = LoraBank(LINEARS, NUM_ROWS, free_fill=float("nan"))
    first, second = weights_of(1, dict.fromkeys(LINEARS, 2)), weights_of(2, {"up": 2, "down": 1})
    bank.write(rows, bank.to_device_layout(first))
    bank.write(others, bank.to_device_layout(second))
    bank.swap(rows, others)
    assert_holds(bank, others, first)
    assert_holds(bank, rows, second)
    assert_free(bank, [row for row in range(NUM_ROWS) if row not in rows + others])


def test_the_bank_says_what_it_takes() -> None:
    bank = LoraBank(LINEARS, NUM_ROWS)
    assert bank.shapes == {"up": (5, 3), "gate": (5, 3), "down": (3, 5), "square": (3, 3)}
    assert bank.num_bytes == NUM_ROWS * 4 * sum(num_out + num_in for num_out, num_in in bank.shapes.values())


def test_modules_of_one_parent_that_read_one_input_share_a_product() -> None:
    names = ["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "b.q_proj", "a.gate_proj", "a.up_proj", "a.down_proj"]
    bank = LoraBank({name: nn.Linear(4, 4) for name in names}, NUM_ROWS)
    inputs = [bank.modules[name].inputs for name in names]
    assert [inputs.index(each) for each in inputs] == [0, 0, 0, 3, 4, 5, 5, 7]
    assert [bank.modules[name].index for name in names] == [0, 1, 2, 0, 0, 0, 1, 0]


def test_a_module_is_used_while_an_active_adapter_has_it() -> None:
    bank = LoraBank(LINEARS, NUM_ROWS)
    bank.write([0, 1], bank.to_device_layout(weights_of(1, {"up": 2, "down": 1})))
    bank.write([2], bank.to_device_layout(weights_of(2, {"gate": 1})))

    def used(num_active: int) -> set[str]:
        bank.set_active(num_active)
        return {name for name, module in bank.modules.items() if module.is_used}

    assert [used(0), used(2), used(3)] == [set(), {"up", "down"}, {"up", "down", "gate"}]
    bank.swap([2], [0])
    assert used(1) == {"gate"}
    bank.free([0])
    assert used(1) == set()


@pytest.mark.parametrize("same_input", [True, False])
@pytest.mark.parametrize("is_grouped", [True, False])
def test_modules_that_share_a_product_get_their_own_part_of_it(
    same_input: bool, is_grouped: bool, lora_kernel: LoraKernel
) -> None:
    linears = {"x.gate_proj": nn.Linear(3, 5), "x.up_proj": nn.Linear(3, 4)}
    bank = LoraBank(linears, 4, free_fill=float("nan"))
    weights = AdapterWeights(
        "1",
        {name: ModuleWeights(torch.randn(2, 3), torch.randn(w.out_features, 2), 0.5) for name, w in linears.items()},
    )
    residency = Residency(bank)
    assert residency.try_pin(["1"], {"1": bank.to_device_layout(weights)})
    residency.settle()
    step = StepContext()
    plan = Plan("selection", (PlannedAdapter(AdapterRef("t", "n", "1"), "1", 1.0),))
    kernel = lora_kernel if is_grouped else None
    lora = composition([plan], [2], residency, torch.float32, kernel, torch.device("cpu"))
    assert isinstance(lora, GroupedMapping if is_grouped else DenseMapping)
    step.fill(lora, KvRegions(kv_shape()).attention([Segment(0, 0, 2, 0)]))
    inputs = [torch.randn(1, 2, 3)] * 2 if same_input else [torch.randn(1, 2, 3) for _ in range(2)]
    with torch.inference_mode():
        for x, (name, linear) in zip(inputs, linears.items(), strict=True):
            module = weights.modules[name]
            expected = linear(x) + x @ module.lora_a.T @ module.lora_b.T * module.scaling
            torch.testing.assert_close(LoraLinear(linear, bank.modules[name], step)(x), expected)
