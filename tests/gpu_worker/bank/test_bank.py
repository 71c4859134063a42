"""The bank's rows, moved in all modules together, compared with a table of their expected contents."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.device_layout import to_device_layout
from gpu_worker.bank.layout_kernel import LayoutKernel
from gpu_worker.errors import AdapterUnfit
from lora_store.adapter import AdapterWeights, ModuleWeights

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
    """Check each module's values in rank order: zeros beyond its rank and where it is None."""
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
    ("ranks", "has_blocks"),
    [
        (dict.fromkeys(LINEARS, 3), True),
        ({"up": 3, "down": 1}, False),
        ({"up": 1, "gate": 2, "square": 3}, False),
        ({"up": 3, "gate": 3, "down": 2}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("converter", ["kernel", "torch", "elsewhere"])
def test_an_adapter_fills_its_rows_and_no_others(
    rows: list[int], ranks: dict[str, int], has_blocks: bool, converter: str, layout_kernel: LayoutKernel
) -> None:
    """The bank's own conversions arrange the values as its stores unless ranks differ much; others never do."""
    kernel = layout_kernel if converter == "kernel" else None
    bank = LoraBank(LINEARS, NUM_ROWS, free_fill=float("nan"), kernel=kernel)
    weights = weights_of(1, ranks)
    is_own = converter != "elsewhere"
    adapter = bank.to_device_layout(weights) if is_own else to_device_layout(weights, bank.shapes, torch.float32)
    assert bool(adapter.blocks) == (is_own and has_blocks) and adapter.max_rank == max(ranks.values())
    bank.write(rows, adapter)
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


@pytest.mark.parametrize("has_kernel", [False, True])
def test_an_adapter_of_unequal_ranks_needs_the_memory_of_its_own_ranks(
    has_kernel: bool, layout_kernel: LayoutKernel
) -> None:
    bank = LoraBank(LINEARS, 64, kernel=layout_kernel if has_kernel else None)
    ranks = {"up": 64, "gate": 2, "down": 2, "square": 2}
    adapter = bank.to_device_layout(weights_of(1, ranks))
    own_bytes = 4 * sum(ranks[name] * sum(shape) for name, shape in bank.shapes.items())
    tensors = [each for module in adapter.modules.values() for each in (module.a, module.bt)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    assert adapter.num_bytes == sum(storages.values()) == own_bytes


@pytest.mark.parametrize("has_kernel", [False, True])
def test_an_unfit_adapter_is_refused_by_either_conversion(has_kernel: bool, layout_kernel: LayoutKernel) -> None:
    bank = LoraBank(LINEARS, NUM_ROWS, kernel=layout_kernel if has_kernel else None)
    spoiled = weights_of(1, {"up": 2, "down": 1})
    spoiled.modules["down"].lora_a[0, 1] = float("nan")
    with pytest.raises(AdapterUnfit, match="down has non-finite values"):
        bank.to_device_layout(spoiled)
    with pytest.raises(AdapterUnfit, match="no module 'nowhere'"):
        bank.to_device_layout(AdapterWeights("d", {"nowhere": spoiled.modules["up"]}))


def test_the_bank_reports_its_size() -> None:
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


@pytest.mark.parametrize("free_fill", [0.0, float("nan")])
def test_an_empty_bank_gives_back_its_memory_unless_its_free_rows_have_a_value(free_fill: float) -> None:
    bank = LoraBank({"m": nn.Linear(8, 4)}, 8, free_fill=free_fill)
    [module] = bank.modules.values()
    for rows in (module.all_a, module.all_bt):
        assert rows.isnan().all() if free_fill else not rows.any()
        rows.fill_(3.0)
    bank.release()
    expected = 3.0 if free_fill else 0.0
    assert (module.all_a == expected).all() and (module.all_bt == expected).all()
