"""Where a bank stores each module, and an adapter's values in the same order, so that few copies write them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gpu_worker.bank.device_layout import Block, DeviceAdapter, DeviceModule

_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_Bank = tuple[str, str]  # ("a", first module of a group) or ("bt", module)
_LARGEST_GROWTH = 1.25  # of an adapter of unequal ranks by the zeros of its blocks


@dataclass(frozen=True, slots=True)
class _Run:
    """Banks of one store whose numbers are an arithmetic progression, and what each of them stores."""

    store: int
    numbers: range
    banks: tuple[_Bank, ...]


class BankLayout:
    """The places of all modules of a bank.

    Modules that read the same input share a bank for their A: its rows are those of the modules, one behind the other.
    Banks of the same width are in one store, a tensor (banks, rows, width). `groups`: modules with the same input;
    `stores`: (number of banks, width). `shapes`: (out, in) of each module.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.groups = _sharing_inputs(shapes)
        self._shapes = dict(shapes)
        self._group_of = {name: (names, place) for names in self.groups for place, name in enumerate(names)}
        widths: dict[_Bank, int] = {("a", names[0]): len(names) * shapes[names[0]][1] for names in self.groups}
        widths |= {("bt", name): num_out for name, (num_out, _) in shapes.items()}
        self._place: dict[_Bank, tuple[int, int]] = {}
        self.stores: list[tuple[int, int]] = []
        for store, width in enumerate(sorted(set(widths.values()))):
            banks = [bank for bank in widths if widths[bank] == width]
            self._place |= {bank: (store, number) for number, bank in enumerate(banks)}
            self.stores.append((len(banks), width))
        self._runs = lru_cache(maxsize=64)(self._runs_of)  # the adapters of a pool have few sets of modules

    def a_of(self, stores: Sequence[Tensor], group: Sequence[str]) -> Tensor:
        """Return the rows (C, M · I) of the A matrices of the group's M modules. `stores`: each (banks, C, width)."""
        store, number = self._place["a", group[0]]
        return stores[store][number]

    def bt_of(self, stores: Sequence[Tensor], name: str) -> Tensor:
        """Return the rows (C, O) of the module's B matrix."""
        store, number = self._place["bt", name]
        return stores[store][number]

    def covers(self, blocks: Sequence[Block]) -> bool:
        """Return whether the blocks have values for every bank."""
        return sum(len(block.values) for block in blocks) == sum(num_banks for num_banks, _ in self.stores)

    def allocate(
        self, ranks: Mapping[str, int], dtype: torch.dtype, *, pin: bool = False
    ) -> tuple[tuple[Block, ...], dict[str, DeviceModule]]:
        """Return blocks in host memory for an adapter with these modules and ranks, and each module's place in them.

        All blocks are parts of one tensor. It is 0 outside the places; the caller fills the places. Blocks have the
        rows of the largest rank, so there are none if ranks differ and the zeros would take much memory.
        """
        num_rows, runs = max(ranks.values()), self._runs(frozenset(ranks))
        widths = [self.stores[run.store][1] for run in runs]
        sizes = [len(run.numbers) * num_rows * width for run, width in zip(runs, widths, strict=True)]
        own_size = sum(rank * sum(self._shapes[name]) for name, rank in ranks.items())
        if min(ranks.values()) < num_rows and sum(sizes) > _LARGEST_GROWTH * own_size:
            return (), self._separate(ranks, torch.empty(own_size, dtype=dtype, pin_memory=pin))
        make = torch.empty if sum(sizes) == own_size else torch.zeros
        flat = make(sum(sizes), dtype=dtype, pin_memory=pin)
        blocks, rows = [], dict[_Bank, Tensor]()
        for run, width, values in zip(runs, widths, torch.split(flat, sizes), strict=True):
            block = Block(run.store, _slice(run.numbers), values.view(-1, num_rows, width))
            blocks.append(block)
            rows |= dict(zip(run.banks, block.values, strict=True))
        return tuple(blocks), {name: self._within(rows, name, rank) for name, rank in ranks.items()}

    def arranged(self, adapter: DeviceAdapter, *, pin: bool = False) -> DeviceAdapter:
        """Return a copy of the adapter, which is in host memory, in the places of `allocate`."""
        any_a = next(iter(adapter.modules.values())).a
        ranks = {name: module.rank for name, module in adapter.modules.items()}
        blocks, places = self.allocate(ranks, any_a.dtype, pin=pin)
        for name, module in adapter.modules.items():
            places[name].a.copy_(module.a)
            places[name].bt.copy_(module.bt)
        return replace(adapter, modules=places, blocks=blocks)

    def _within(self, rows: Mapping[_Bank, Tensor], name: str, rank: int) -> DeviceModule:
        (names, place), (_, width) = self._group_of[name], self._shapes[name]
        a = rows["a", names[0]]
        return DeviceModule(a[:rank, place * width : (place + 1) * width], rows["bt", name][:rank])

    def _separate(self, ranks: Mapping[str, int], flat: Tensor) -> dict[str, DeviceModule]:
        """Return places without zeros, one behind the other."""
        shapes = [(rank, width) for name, rank in ranks.items() for width in reversed(self._shapes[name])]
        parts = torch.split(flat, [rank * width for rank, width in shapes])
        views = iter([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
        return {name: DeviceModule(next(views), next(views)) for name in ranks}

    def _runs_of(self, names: frozenset[str]) -> tuple[_Run, ...]:
        banks = {("a", self._group_of[name][0][0]) for name in names} | {("bt", name) for name in names}
        by_store: defaultdict[int, dict[int, _Bank]] = defaultdict(dict)
        for bank in banks:
            store, number = self._place[bank]
            by_store[store][number] = bank
        return tuple(
            _Run(store, numbers, tuple(of_store[number] for number in numbers))
            for store, of_store in sorted(by_store.items())
            for numbers in _progressions(sorted(of_store))
        )


def _sharing_inputs(shapes: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Group the modules that read the same input. `shapes`: (out, in) per module."""
    groups: defaultdict[object, list[str]] = defaultdict(list)
    for name, (_, width) in shapes.items():
        parent, _, leaf = name.rpartition(".")
        kind = next((kind for kind, leaves in enumerate(_SHARED_INPUTS) if leaf in leaves), leaf)
        groups[parent, kind, width].append(name)
    return list(groups.values())


def _progressions(numbers: Sequence[int]) -> Iterator[range]:
    """Split ascending numbers into arithmetic progressions, each as long as possible."""
    start = 0
    while start < len(numbers):
        step = numbers[start + 1] - numbers[start] if start + 1 < len(numbers) else 1
        end = start + 1
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        yield range(numbers[start], numbers[end - 1] + 1, step)
        start = end


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop, numbers.step)
