"""The order of a bank's stores, and blocks with an adapter's values in that order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

import pytest
import torch

from gpu_worker.bank.bank_layout import BankLayout
from gpu_worker.bank.device_layout import ArrangedModules, DeviceAdapter, DeviceModule

LEAVES = {"q_proj": (16, 6), "k_proj": (4, 6), "v_proj": (4, 6), "o_proj": (6, 16), "gate_proj": (12, 6),
          "up_proj": (12, 6), "down_proj": (6, 12)}  # fmt: skip
SHAPES = {f"layers.{layer}.{leaf}": shape for layer in range(4) for leaf, shape in LEAVES.items()}
ALL = dict.fromkeys(SHAPES, 3)


def only(*leaves: str, rank: int = 3) -> dict[str, int]:
    return {name: rank for name in SHAPES if name.rpartition(".")[2] in leaves}


def random_ranks(lowest: int, share: float) -> dict[str, int]:
    draw = random.Random(3)
    return {name: draw.randint(lowest, 8) for name in SHAPES if draw.random() < share}


def adapter_of(ranks: Mapping[str, int]) -> DeviceAdapter:
    numbers = itertools.count(1)

    def next_values(*shape: int) -> torch.Tensor:
        return torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape) + 1000 * next(numbers)

    shapes = {name: SHAPES[name] for name in ranks}
    modules = {n: DeviceModule(next_values(ranks[n], i), next_values(ranks[n], o)) for n, (o, i) in shapes.items()}
    return DeviceAdapter("d", modules)


def test_modules_with_one_input_share_a_bank_and_banks_of_one_width_a_store() -> None:
    layout = BankLayout(SHAPES)
    assert [[name.rpartition(".")[2] for name in names] for names in layout.groups[:4]] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    widths: dict[int, int] = {}
    for names in layout.groups:
        width = sum(SHAPES[name][1] for name in names)
        widths[width] = widths.get(width, 0) + 1
    for num_out, _ in SHAPES.values():
        widths[num_out] = widths.get(num_out, 0) + 1
    assert layout.stores == [(widths[width], width) for width in sorted(widths)]


@pytest.mark.parametrize(
    "ranks",
    [ALL, only("q_proj", "v_proj"), only("v_proj"), only("down_proj", "k_proj"), random_ranks(7, 0.95)],
    ids=len,
)
def test_blocks_have_the_values_of_the_stores_row_by_row(ranks: dict[str, int]) -> None:
    """Write the blocks over empty stores. Every module's rows must be where the bank reads them, all others 0."""
    layout, adapter, num_rows = BankLayout(SHAPES), adapter_of(ranks), max(ranks.values())
    arranged = layout.arranged(adapter)
    stores = [torch.zeros(num_banks, num_rows, width) for num_banks, width in layout.stores]
    assert arranged.blocks
    for block in arranged.blocks:
        stores[block.store][block.banks] = block.values
    sum_of_modules = 0.0
    for names in layout.groups:
        by_module = layout.a_of(stores, names).view(num_rows, len(names), -1)
        for place, name in enumerate(names):
            for found, part in ((by_module[:, place], "a"), (layout.bt_of(stores, name), "bt")):
                expected = torch.zeros_like(found)
                if name in ranks:
                    expected[: ranks[name]] = getattr(adapter.modules[name], part)
                    assert torch.equal(getattr(arranged.modules[name], part), getattr(adapter.modules[name], part))
                assert torch.equal(found, expected), f"{part} of {name}"
                sum_of_modules += float(expected.double().sum())
    assert sum(float(store.double().sum()) for store in stores) == sum_of_modules
    assert arranged.num_bytes == sum(block.values.nbytes for block in arranged.blocks)


def test_an_adapter_of_all_modules_needs_one_block_for_each_store_and_no_spare_memory() -> None:
    layout = BankLayout(SHAPES)
    arranged = layout.arranged(adapter_of(ALL))
    assert len(arranged.blocks) == len(layout.stores) and layout.covers(arranged.blocks)
    assert arranged.num_bytes == adapter_of(ALL).num_bytes


@pytest.mark.parametrize("lowest", range(1, 9))
def test_zeros_take_at_most_a_quarter_of_an_adapter_of_unequal_ranks(lowest: int) -> None:
    """Between blocks of mostly equal ranks and tensors without a zero there is no third form."""
    layout, adapter = BankLayout(SHAPES), adapter_of(random_ranks(lowest, 1.0))
    arranged = layout.arranged(adapter)
    padded = sum(num_banks * width for num_banks, width in layout.stores) * 8 * 4
    assert arranged.num_bytes == (padded if padded <= 1.25 * adapter.num_bytes else adapter.num_bytes)
    assert bool(arranged.blocks) == (padded <= 1.25 * adapter.num_bytes) == (lowest > 4)
    for name, module in adapter.modules.items():
        assert torch.equal(arranged.modules[name].a, module.a) and torch.equal(arranged.modules[name].bt, module.bt)


def test_an_adapter_of_few_modules_does_not_store_the_others() -> None:
    """v_proj's A is in a bank with those of q_proj and k_proj; nothing else is stored."""
    layout = BankLayout(SHAPES)
    arrangement = layout.arrangement(only("v_proj"))
    blocks = arrangement.adapter("d", arrangement.allocate(torch.float32)).blocks
    assert not layout.covers(blocks)
    assert sum(block.values.numel() for block in blocks) == 4 * 3 * (3 * 6 + 4)


def test_ranks_and_sizes_are_known_without_the_tensors_of_the_modules() -> None:
    arrangement = BankLayout(SHAPES).arrangement(ALL)
    adapter = arrangement.adapter("d", arrangement.allocate(torch.float32))
    assert isinstance(adapter.modules, ArrangedModules)
    assert (adapter.ranks, adapter.max_rank, len(adapter.modules)) == (ALL, 3, len(SHAPES))
    assert adapter.num_bytes == 4 * arrangement.num_values == 4 * arrangement.own_size
    assert "_made" not in vars(adapter.modules)
    assert {name: module.rank for name, module in adapter.modules.items()} == ALL
