"""Adapter weights on the device, stored as rows of one bank per module."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from gpu_worker.bank.bank_layout import Arrangement, BankLayout
from gpu_worker.bank.device_layout import (
    DeviceAdapter,
    Pair,
    check_finite,
    check_shapes,
    expert_modules,
    split_experts,
    to_device_layout,
)
from gpu_worker.bank.device_memory import release_pages, zeros_on_huge_pages
from gpu_worker.bank.layout_kernel import LayoutKernel
from lora_store.adapter import AdapterWeights, Shapes
from lora_store.weights_blob import BlobLayout, StoredModules


class _InputPlace(ctypes.Structure):
    _fields_ = (("width", c_int64), ("a", c_void_p), ("num_modules", c_int64))


class _ModulePlace(ctypes.Structure):
    _fields_ = (("module", c_int64), ("bt", c_void_p), ("num_out", c_int64), ("is_used", c_int32))


class InputBank:
    """The A matrices of M modules that read the same input. Dims: C bank rows, P active rows, I in.

    `a` (P · M, I) is a view of the active prefix of `all_a` (C · M, I). Its row p · M + m is rank row p of module m.
    `address`: of a struct InputPlace of `grouped_lora.cpp`.
    """

    def __init__(self, a: Tensor, num_modules: int) -> None:
        self.num_modules = num_modules
        self.all_a = a.view(len(a) * num_modules, -1)
        self._place = _InputPlace(self.all_a.shape[1], self.all_a.data_ptr(), num_modules)
        self.address = ctypes.addressof(self._place)
        self.set_active(0)

    def set_active(self, num_rows: int) -> None:
        self.a = self.all_a[: num_rows * self.num_modules]


class ModuleBank:
    """The bank of one module: its index within its InputBank, and its B matrices. Dims: P active rows, O out.

    `bt` (P, O) is a view of the active prefix of `all_bt` (C, O) and includes the scaling. `is_used`: an active adapter
    has this module. `address`: of a struct ModulePlace of `grouped_lora.cpp`.
    """

    def __init__(self, inputs: InputBank, index: int, bt: Tensor) -> None:
        self.inputs, self.index = inputs, index
        self.all_bt = bt
        self._place = _ModulePlace(index, bt.data_ptr(), bt.shape[1])
        self.address = ctypes.addressof(self._place)
        self.set_active(0, is_used=False)

    @property
    def all_a(self) -> Tensor:
        """Return (C, I), a view."""
        return self.inputs.all_a[self.index :: self.inputs.num_modules]

    @property
    def a(self) -> Tensor:
        """Return (P, I), a view."""
        return self.inputs.a[self.index :: self.inputs.num_modules]

    def set_active(self, num_rows: int, *, is_used: bool) -> None:
        self.bt, self.is_used = self.all_bt[:num_rows], is_used
        self._place.is_used = is_used


class LoraBank:
    """The banks of all modules. A rank row belongs to the same adapter in every module, so rows move together.

    Banks of the same width share one tensor (banks, C, width): moving a row, or writing an adapter that has blocks,
    takes a few operations instead of two per module.
    `free_fill`: the value of free rows. They are never read; tests fill them with NaN to prove it.
    `device`: by default the layers' device. `kernel`: converts weights on the CPU; without it torch does.
    `experts`: the shapes of fused experts. Their weights are no rows: see `Residency.experts`.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        num_rows: int,
        *,
        experts: Shapes | None = None,
        free_fill: float = 0.0,
        device: torch.device | None = None,
        kernel: LayoutKernel | None = None,
    ) -> None:
        self.num_rows, self._kernel = num_rows, kernel
        self._shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        self._experts = dict(experts or {})
        self._free_fill = free_fill
        weight = next(iter(linears.values())).weight
        self._dtype, self._device = weight.dtype, device or weight.device
        self._layout = BankLayout(self._shapes)
        self._of_blob = lru_cache(maxsize=64)(self._of_layout)  # the adapters of a pool have few different layouts
        sizes = [(num_banks, num_rows, width) for num_banks, width in self._layout.stores]
        self._stores = [_filled(size, free_fill, self._dtype, self._device) for size in sizes]
        groups = self._layout.groups
        self._inputs = [InputBank(self._layout.a_of(self._stores, names), len(names)) for names in groups]
        self.modules = {
            name: ModuleBank(inputs, index, self._layout.bt_of(self._stores, name))
            for names, inputs in zip(groups, self._inputs, strict=True)
            for index, name in enumerate(names)
        }
        self._has_module = torch.zeros(
            len(self.modules), num_rows, dtype=torch.bool
        )  # True where an adapter has the module
        self._place = {name: place for place, name in enumerate(self.modules)}

    def release(self) -> None:
        """Give Linux the memory of this bank, which holds no adapter, until adapters are written."""
        if self._device.type == "cpu" and not self._free_fill:
            for store in self._stores:
                release_pages(store)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return (out, in) of every module an adapter may target, of fused experts (out, in, experts)."""
        return {**self._shapes, **self._experts}

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def num_bytes(self) -> int:
        return sum(store.nbytes for store in self._stores)

    def to_device_layout(self, weights: AdapterWeights) -> DeviceAdapter:
        """Convert the weights for `write`. Raises: AdapterUnfit, which names every unsuitable module."""
        modules, experts = split_experts(weights.modules)
        converted = expert_modules(experts, self._experts, self._dtype)
        if converted and not modules:
            return DeviceAdapter(weights.weights_digest, {}, experts=converted)
        adapter = self._arranged(AdapterWeights(weights.weights_digest, modules))
        return replace(adapter, experts=converted) if converted else adapter

    def _arranged(self, weights: AdapterWeights) -> DeviceAdapter:
        pin = self._device.type == "cuda"
        if self._kernel is None or not self._kernel.serves(self._dtype):
            return self._layout.arranged(to_device_layout(weights, self._shapes, self._dtype), pin=pin)
        modules = weights.modules
        arrangement = self._of_blob(modules.layout) if isinstance(modules, StoredModules) else self._of(modules)
        flat = arrangement.allocate(self._dtype, pin=pin)
        check_finite(self._kernel(modules, arrangement, flat))
        return arrangement.adapter(weights.weights_digest, flat)

    def write(self, rows: Sequence[int], adapter: DeviceAdapter) -> None:
        """Overwrite `rows` with the adapter, and with zeros beyond a module's rank and for modules that it lacks."""
        if self._layout.covers(adapter.blocks):
            self._set_unused(rows)
        else:
            self._fill(rows, 0.0)
        for block in adapter.blocks:
            values = block.values.to(self._device, non_blocking=True)
            for run, part in _runs(rows, range(len(rows))):
                self._stores[block.store][block.banks, run] = values[:, part]
        if not adapter.blocks:
            self._write_modules(rows, adapter)
        places: defaultdict[int, list[int]] = defaultdict(list)
        for name, of_module in adapter.ranks.items():
            places[of_module].append(self._place[name])
        for rank, of_rank in places.items():
            self._has_module[torch.tensor(of_rank)[:, None], torch.tensor(rows[:rank])] = True

    def _of_layout(self, layout: BlobLayout) -> Arrangement:
        return self._of(layout.pairs)

    def _of(self, modules: Mapping[str, Pair]) -> Arrangement:
        """Return the arrangement of an adapter with these modules. Raises: AdapterUnfit."""
        check_shapes(modules, self._shapes)
        return self._layout.arrangement({name: module.lora_a.shape[0] for name, module in modules.items()})

    def move(self, rows: Sequence[int], to: Sequence[int]) -> None:
        """Move `rows` to `to`. The source rows keep stale values and must be overwritten before the next read."""
        for source, target in _runs(rows, to):
            for store in (*self._stores, self._has_module):
                store[:, target] = store[:, source]

    def swap(self, rows: Sequence[int], others: Sequence[int]) -> None:
        """Exchange the contents of `rows` and `others`."""
        for run, other in _runs(rows, others):
            for store in (*self._stores, self._has_module):
                held = store[:, run].clone()
                store[:, run] = store[:, other]
                store[:, other] = held

    def free(self, rows: Sequence[int]) -> None:
        """Fill `rows` with the value of free rows."""
        self._fill(rows, self._free_fill)

    def set_active(self, num_rows: int) -> None:
        """Let the next steps read the first `num_rows` rows."""
        used = self._has_module[:, :num_rows].any(dim=1).tolist()
        for inputs in self._inputs:
            inputs.set_active(num_rows)
        for bank, is_used in zip(self.modules.values(), used, strict=True):
            bank.set_active(num_rows, is_used=is_used)

    def _fill(self, rows: Sequence[int], value: float) -> None:
        for run, _ in _runs(rows, rows):
            for store in self._stores:
                store[:, run] = value
        self._set_unused(rows)

    def _write_modules(self, rows: Sequence[int], adapter: DeviceAdapter) -> None:
        """Copy the modules one after the other, so that the device needs no second copy of all."""
        index_of = {rank: _index(rows[:rank]) for rank in set(adapter.ranks.values())}
        for name, module in adapter.modules.items():
            index, bank = index_of[module.rank], self.modules[name]
            bank.all_a[index] = module.a.to(self._device, non_blocking=True)
            bank.all_bt[index] = module.bt.to(self._device, non_blocking=True)

    def _set_unused(self, rows: Sequence[int]) -> None:
        for run, _ in _runs(rows, rows):
            self._has_module[:, run] = False


def _filled(size: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.full(size, value, dtype=dtype, device=device)
    zeros = zeros_on_huge_pages(*size, dtype=dtype)
    return zeros.fill_(value) if value else zeros


def _runs(rows: Sequence[int], others: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield paired slices of `rows` and `others`. Slices are several times as fast as index tensors."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end] == rows[end - 1] + 1 and others[end] == others[end - 1] + 1:
            continue
        yield slice(rows[start], rows[end - 1] + 1), slice(others[start], others[end - 1] + 1)
        start = end


def _index(rows: Sequence[int]) -> slice | Tensor:
    """Return a slice for adjacent rows, which is several times as fast as an index tensor."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows)
