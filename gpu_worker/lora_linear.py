"""Linear layers that add the adapters of each token's plan, and the bank those adapters live in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gpu_worker.fitting import FittedAdapter, FittedModule, fit
from gpu_worker.mapping import StepContext
from lora_store.adapter import AdapterWeights


class ModuleBank:
    """One module's adapters. Dims: C bank rows, P active rows, I in, O out.

    `a` (P, I) and `bt` (P, O) are views of the active prefix; scaling is folded into bt.
    """

    def __init__(self, a: Tensor, bt: Tensor) -> None:
        self._a, self._bt = a, bt  # (C, I), (C, O)
        self.set_active(0)

    def set_active(self, num_rows: int) -> None:
        self.a, self.bt = self._a[:num_rows], self._bt[:num_rows]

    def write(self, rows: slice | Tensor, module: FittedModule) -> None:
        self._a[rows] = module.a.to(self._a.device)
        self._bt[rows] = module.bt.to(self._bt.device)


class LoraBank:
    """All modules' banks, moved together, so that a rank row means the same adapter in every module.

    Modules of one width lie in one tensor (modules, C, width): moving a row takes a few operations, not two a module.
    `free_fill` is what free rows hold. Free rows are never read: filling them with NaN proves it.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], num_rows: int, *, free_fill: float = 0.0) -> None:
        self.num_rows = num_rows
        self._shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        self._free_fill = free_fill
        weight = next(iter(linears.values())).weight
        self._dtype, self._device = weight.dtype, weight.device
        self._stores: list[Tensor] = []
        a = self._allocate({name: shape[1] for name, shape in self._shapes.items()})
        bt = self._allocate({name: shape[0] for name, shape in self._shapes.items()})
        self.modules = {name: ModuleBank(a[name], bt[name]) for name in linears}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every module an adapter may target."""
        return dict(self._shapes)

    @property
    def num_bytes(self) -> int:
        return sum(store.nbytes for store in self._stores)

    def fit(self, weights: AdapterWeights) -> FittedAdapter:
        """The weights as `write` takes them. Raises: AdapterUnfit, naming every module that does not fit."""
        return fit(weights, self._shapes, self._dtype)

    def write(self, rows: Sequence[int], adapter: FittedAdapter) -> None:
        """Replace every value of `rows`: by the adapter's, by zeros past a module's rank and where it has no module."""
        self._fill(rows, 0.0)
        index_of = {rank: _index(rows[:rank]) for rank in {module.rank for module in adapter.modules.values()}}
        for name, module in adapter.modules.items():
            self.modules[name].write(index_of[module.rank], module)

    def swap(self, rows: Sequence[int], others: Sequence[int]) -> None:
        index, other_index = _index(rows), _index(others)
        for store in self._stores:
            held, others_held = store[:, index].clone(), store[:, other_index].clone()
            store[:, index], store[:, other_index] = others_held, held

    def free(self, rows: Sequence[int]) -> None:
        self._fill(rows, self._free_fill)

    def set_active(self, num_rows: int) -> None:
        for bank in self.modules.values():
            bank.set_active(num_rows)

    def _allocate(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """(C, width) for each module, filled; modules of one width share a store."""
        views: dict[str, Tensor] = {}
        for width in sorted(set(widths.values())):
            names = [name for name in widths if widths[name] == width]
            size = (len(names), self.num_rows, width)
            store = torch.full(size, self._free_fill, dtype=self._dtype, device=self._device)
            self._stores.append(store)
            views |= dict(zip(names, store, strict=True))
        return views

    def _fill(self, rows: Sequence[int], value: float) -> None:
        index = _index(rows)
        for store in self._stores:
            store[:, index] = value


def _index(rows: Sequence[int]) -> slice | Tensor:
    """A slice where the rows are adjacent: it writes several times as fast."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows)


class LoraLinear(nn.Module):
    """A base linear layer plus, for each token, what its plan makes of the adapters in the bank.

    y[n] = base(x[n]) + compose(x[n] @ bank.a.T) @ bank.bt, scaling already folded into bt; without a plan, the base.
    Dims: N tokens, I in, O out, P active rank rows. bank.a (P, I), bank.bt (P, O): views of the active prefix.
    Source: LoraRetriever (ACL Findings 2024), section 4.3, contracted at rank level.
    """

    def __init__(self, base: nn.Linear, bank: ModuleBank, step: StepContext) -> None:
        super().__init__()
        self.base, self._bank, self._step = base, bank, step

    def forward(self, x: Tensor) -> Tensor:  # (..., N, I) -> (..., N, O)
        y: Tensor = self.base(x)
        if not self._step.has_adapters:
            return y
        h = self._step.compose(x.flatten(0, -2) @ self._bank.a.T)  # (N, P)
        return torch.addmm(y.flatten(0, -2), h, self._bank.bt).view_as(y)
