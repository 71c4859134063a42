"""Where a bank stores each module, and an adapter's values in the same order, so that few copies write them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from gpu_worker.bank.device_layout import ArrangedModules, Block, DeviceAdapter, DeviceModule

_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_Bank = tuple[str, str]  # ("a", first module of a group) or ("bt", module)
_LARGEST_GROWTH = 1.25  # by the zeros in the blocks of an adapter of unequal ranks


@dataclass(frozen=True, slots=True)
class _Run:
    """Banks of one store whose numbers are an arithmetic progression, and what each of them stores."""

    store: int
    numbers: range
    banks: tuple[_Bank, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Arrangement:
    """Where adapters with these modules and ranks store their values: in one tensor, the blocks one behind the other.

    Without runs there are no blocks, and the modules are one behind the other. `sizes`: values of each block;
    `own_size`: values of all modules.
    """

    layout: BankLayout
    ranks: Mapping[str, int]
    runs: tuple[_Run, ...]
    sizes: tuple[int, ...]
    own_size: int

    @property
    def num_values(self) -> int:
        return sum(self.sizes) if self.runs else self.own_size

    def allocate(self, dtype: torch.dtype, *, pin: bool = False) -> Tensor:
        """Return (`num_values`,) in host memory. It is 0 outside the places; the caller fills the places."""
        make = torch.empty if self.num_values == self.own_size else torch.zeros
        return make(self.num_values, dtype=dtype, pin_memory=pin)

    def places(self, flat: Tensor) -> dict[str, DeviceModule]:
        """Return each module's place."""
        if not self.runs:
            return self.layout.separate(self.ranks, flat)
        rows = dict[_Bank, Tensor]()
        for run, block in zip(self.runs, self._blocks(flat), strict=True):
            rows |= dict(zip(run.banks, block.values, strict=True))
        return {name: self.layout.within(rows, name, rank) for name, rank in self.ranks.items()}

    def adapter(self, digest: str, flat: Tensor) -> DeviceAdapter:
        """Return the adapter whose values are in `flat`."""
        return DeviceAdapter(digest, ArrangedModules(self.ranks, partial(self.places, flat)), self._blocks(flat))

    def _blocks(self, flat: Tensor) -> tuple[Block, ...]:
        if not self.runs:
            return ()
        num_rows = max(self.ranks.values())
        blocks = []
        for run, values in zip(self.runs, torch.split(flat, list(self.sizes)), strict=True):
            numbers = slice(run.numbers.start, run.numbers.stop, run.numbers.step)
            blocks.append(Block(run.store, numbers, values.view(-1, num_rows, self.layout.stores[run.store][1])))
        return tuple(blocks)


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
        self._runs = lru_cache(maxsize=64)(self._find_runs)  # the adapters of a pool have few sets of modules

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

    def arrangement(self, ranks: Mapping[str, int]) -> Arrangement:
        """Return the arrangement of adapters with these modules and ranks.

        Blocks have the rows of the largest rank, so there are none if ranks differ and zeros would take much memory.
        """
        num_rows, runs = max(ranks.values()), self._runs(frozenset(ranks))
        sizes = [len(run.numbers) * num_rows * self.stores[run.store][1] for run in runs]
        own_size = sum(rank * sum(self._shapes[name]) for name, rank in ranks.items())
        if min(ranks.values()) < num_rows and sum(sizes) > _LARGEST_GROWTH * own_size:
            return Arrangement(self, dict(ranks), (), (), own_size)
        return Arrangement(self, dict(ranks), runs, tuple(sizes), own_size)

    def arranged(self, adapter: DeviceAdapter, *, pin: bool = False) -> DeviceAdapter:
        """Return a copy of the adapter, which is in host memory, as its arrangement says."""
        arrangement = self.arrangement(adapter.ranks)
        flat = arrangement.allocate(next(iter(adapter.modules.values())).a.dtype, pin=pin)
        for name, place in arrangement.places(flat).items():
            place.a.copy_(adapter.modules[name].a)
            place.bt.copy_(adapter.modules[name].bt)
        return arrangement.adapter(adapter.weights_digest, flat)

    def within(self, rows: Mapping[_Bank, Tensor], name: str, rank: int) -> DeviceModule:
        """Return the module's place in the rows of its banks."""
        (names, place), (_, width) = self._group_of[name], self._shapes[name]
        a = rows["a", names[0]]
        return DeviceModule(a[:rank, place * width : (place + 1) * width], rows["bt", name][:rank])

    def separate(self, ranks: Mapping[str, int], flat: Tensor) -> dict[str, DeviceModule]:
        """Return places without zeros, one behind the other."""
        shapes = [(rank, width) for name, rank in ranks.items() for width in reversed(self._shapes[name])]
        parts = torch.split(flat, [rank * width for rank, width in shapes])
        views = iter([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
        return {name: DeviceModule(next(views), next(views)) for name in ranks}

    def _find_runs(self, names: frozenset[str]) -> tuple[_Run, ...]:
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
