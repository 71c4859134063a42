"""Linear layers that add the adapters of each token's plan, and the bank those adapters live in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gpu_worker.errors import AdapterUnfit
from gpu_worker.mapping import StepContext
from lora_store.adapter import AdapterWeights, ModuleWeights


class ModuleBank:
    """One module's adapters. Dims: C bank rows, P active rows, I in, O out.

    `a` (P, I) and `bt` (P, O) are views of the active prefix; scaling is folded into bt.
    """

    def __init__(self, linear: nn.Linear, num_rows: int, free_fill: float) -> None:
        weight = linear.weight
        self._a = torch.full((num_rows, linear.in_features), free_fill, dtype=weight.dtype, device=weight.device)
        self._bt = torch.full((num_rows, linear.out_features), free_fill, dtype=weight.dtype, device=weight.device)
        self.set_active(0)

    def set_active(self, num_rows: int) -> None:
        self.a, self.bt = self._a[:num_rows], self._bt[:num_rows]

    def write(self, rows: Tensor, module: ModuleWeights | None) -> None:
        """Every value of `rows` is replaced: by the module's, and by zeros past its rank or where it is None."""
        self._a[rows] = 0
        self._bt[rows] = 0
        if module is not None:
            used = rows[: module.rank]
            self._a[used] = module.lora_a.to(self._a)
            self._bt[used] = self.folded(module)

    def folded(self, module: ModuleWeights) -> Tensor:
        """(R, O): lora_b transposed, scaling folded in, as the bank holds it."""
        return (module.lora_b.float() * module.scaling).T.to(self._bt)

    def swap(self, rows: Tensor, others: Tensor) -> None:
        for store in (self._a, self._bt):
            held = store[rows]
            store[rows] = store[others]
            store[others] = held

    def fill(self, rows: Tensor, value: float) -> None:
        self._a[rows] = value
        self._bt[rows] = value


class LoraBank:
    """All modules' banks, moved together, so that a rank row means the same adapter in every module.

    `free_fill` is what free rows hold. Free rows are never read: filling them with NaN proves it.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], num_rows: int, *, free_fill: float = 0.0) -> None:
        self.num_rows = num_rows
        self.modules = {name: ModuleBank(linear, num_rows, free_fill) for name, linear in linears.items()}
        self._shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        self._free_fill = free_fill

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every module an adapter may target."""
        return dict(self._shapes)

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for bank in self.modules.values() for t in (bank._a, bank._bt))

    def check(self, weights: AdapterWeights) -> None:
        """Raises: AdapterUnfit, naming every module that does not fit."""
        problems = [problem for name, module in weights.modules.items() if (problem := self._problem(name, module))]
        if not weights.modules:
            problems.append("the adapter has no modules")
        if problems:
            raise AdapterUnfit("; ".join(problems))

    def _problem(self, name: str, module: ModuleWeights) -> str | None:
        """Why this module must not enter the bank: its rows are read, times zero, by every row of a step."""
        if name not in self._shapes:
            return f"the base model has no module {name!r}"
        shape = (module.lora_b.shape[0], module.lora_a.shape[1])
        if shape != self._shapes[name]:
            return f"{name} is made for (out, in) {shape}, the base model has {self._shapes[name]}"
        if not 1 <= module.lora_a.shape[0] == module.lora_b.shape[1]:
            return f"{name} has ranks {module.lora_a.shape[0]} and {module.lora_b.shape[1]}"
        bank = self.modules[name]
        if not bool(module.lora_a.to(bank.a).isfinite().all() and bank.folded(module).isfinite().all()):
            return f"{name} is not finite in the base model's precision, its scaling included"
        return None

    def write(self, rows: Sequence[int], weights: AdapterWeights) -> None:
        index = torch.tensor(rows)
        for name, bank in self.modules.items():
            bank.write(index, weights.modules.get(name))

    def swap(self, rows: Sequence[int], others: Sequence[int]) -> None:
        index, other_index = torch.tensor(rows), torch.tensor(others)
        for bank in self.modules.values():
            bank.swap(index, other_index)

    def free(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows)
        for bank in self.modules.values():
            bank.fill(index, self._free_fill)

    def set_active(self, num_rows: int) -> None:
        for bank in self.modules.values():
            bank.set_active(num_rows)


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
