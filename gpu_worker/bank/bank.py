"""Adapter weights on the device, stored as rows of one bank per module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gpu_worker.bank.device_layout import DeviceAdapter, DeviceModule, to_device_layout
from lora_store.adapter import AdapterWeights

_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class InputBank:
    """The A matrices of M modules that read the same input. Dims: C bank rows, P active rows, I in.

    `a` (P · M, I) is a view of the active prefix of `all_a` (C · M, I). Its row p · M + m is rank row p of module m.
    """

    def __init__(self, a: Tensor, num_modules: int) -> None:
        self.num_modules = num_modules
        self._by_row = a.view(len(a), num_modules, -1)  # (C, M, I)
        self.all_a = a.view(len(a) * num_modules, -1)
        self.set_active(0)

    def set_active(self, num_rows: int) -> None:
        self.a = self.all_a[: num_rows * self.num_modules]

    def write(self, rows: slice | Tensor, index: int, a: Tensor) -> None:
        self._by_row[rows, index] = a.to(self._by_row.device, non_blocking=True)


class ModuleBank:
    """The bank of one module: its index within its InputBank, and its B matrices. Dims: P active rows, O out.

    `bt` (P, O) is a view of the active prefix of `all_bt` (C, O) and includes the scaling. `is_used`: an active adapter
    has this module.
    """

    def __init__(self, inputs: InputBank, index: int, bt: Tensor) -> None:
        self.inputs, self.index = inputs, index
        self.all_bt = bt
        self.set_active(0, is_used=False)

    @property
    def a(self) -> Tensor:
        """Return (P, I), a view."""
        return self.inputs.a[self.index :: self.inputs.num_modules]

    def set_active(self, num_rows: int, *, is_used: bool) -> None:
        self.bt, self.is_used = self.all_bt[:num_rows], is_used

    def write(self, rows: slice | Tensor, module: DeviceModule) -> None:
        self.inputs.write(rows, self.index, module.a)
        self.all_bt[rows] = module.bt.to(self.all_bt.device, non_blocking=True)


class LoraBank:
    """The banks of all modules. A rank row belongs to the same adapter in every module, so rows move together.

    Banks of the same width share one tensor (banks, C, width): moving a row takes a few operations instead of two per
    module. `free_fill`: the value of free rows. They are never read; tests fill them with NaN to prove it.
    `device`: by default the layers' device.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        num_rows: int,
        *,
        free_fill: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        self.num_rows = num_rows
        self._shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        self._free_fill = free_fill
        weight = next(iter(linears.values())).weight
        self._dtype, self._device = weight.dtype, device or weight.device
        self._stores: list[Tensor] = []
        groups = _sharing_inputs(self._shapes)
        a = self._allocate({names[0]: len(names) * self._shapes[names[0]][1] for names in groups})
        bt = self._allocate({name: shape[0] for name, shape in self._shapes.items()})
        self._inputs = [InputBank(a[names[0]], len(names)) for names in groups]
        self.modules = {
            name: ModuleBank(inputs, index, bt[name])
            for names, inputs in zip(groups, self._inputs, strict=True)
            for index, name in enumerate(names)
        }
        self._has_module = torch.zeros(
            len(self.modules), num_rows, dtype=torch.bool
        )  # True where an adapter has the module
        self._place = {name: place for place, name in enumerate(self.modules)}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of every module an adapter may target."""
        return dict(self._shapes)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def num_bytes(self) -> int:
        return sum(store.nbytes for store in self._stores)

    def to_device_layout(self, weights: AdapterWeights) -> DeviceAdapter:
        """Convert the weights for `write`. Raises: AdapterUnfit, which names every unsuitable module."""
        return to_device_layout(weights, self._shapes, self._dtype, pin=self._device.type == "cuda")

    def write(self, rows: Sequence[int], adapter: DeviceAdapter) -> None:
        """Overwrite `rows` with the adapter, and with zeros beyond a module's rank and for modules that it lacks."""
        self._fill(rows, 0.0)
        places: defaultdict[int, list[int]] = defaultdict(list)
        index_of = {rank: _index(rows[:rank]) for rank in {module.rank for module in adapter.modules.values()}}
        for name, module in adapter.modules.items():
            self.modules[name].write(index_of[module.rank], module)
            places[module.rank].append(self._place[name])
        for rank, of_rank in places.items():
            self._has_module[torch.tensor(of_rank)[:, None], torch.tensor(rows[:rank])] = True

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

    def _allocate(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Return a filled (C, width) view for each name. Views of the same width share a store."""
        views: dict[str, Tensor] = {}
        for width in sorted(set(widths.values())):
            names = [name for name in widths if widths[name] == width]
            size = (len(names), self.num_rows, width)
            store = torch.full(size, self._free_fill, dtype=self._dtype, device=self._device)
            self._stores.append(store)
            views |= dict(zip(names, store, strict=True))
        return views

    def _fill(self, rows: Sequence[int], value: float) -> None:
        for run, _ in _runs(rows, rows):
            for store in self._stores:
                store[:, run] = value
            self._has_module[:, run] = False


def _sharing_inputs(shapes: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Group the modules that read the same input. `shapes`: (out, in) per module."""
    groups: defaultdict[object, list[str]] = defaultdict(list)
    for name, (_, width) in shapes.items():
        parent, _, leaf = name.rpartition(".")
        kind = next((kind for kind, leaves in enumerate(_SHARED_INPUTS) if leaf in leaves), leaf)
        groups[parent, kind, width].append(name)
    return list(groups.values())


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
