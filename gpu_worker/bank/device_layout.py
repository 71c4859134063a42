"""Convert an adapter's weights to the bank's layout: check them, fold in the scaling, cast to the bank's dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from gpu_worker.errors import AdapterUnfit
from lora_store.adapter import AdapterWeights, ModuleWeights, Shapes
from lora_store.weights_blob import BlobLayout, StoredModules, StoredPair

Pair = ModuleWeights | StoredPair


@dataclass(frozen=True, slots=True)
class DeviceModule:
    """One module. Dims: R rank, I in, O out. `a` (R, I); `bt` (R, O) is lora_b transposed and scaled.

    Of E fused experts: `a` (E, R, I), `bt` (E, R, O).
    """

    a: Tensor
    bt: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def num_bytes(self) -> int:
        return self.a.nbytes + self.bt.nbytes


@dataclass(frozen=True, slots=True)
class Block:
    """The values of N banks of one store of a BankLayout. Dims: R rows, W width. `values` (N, R, W)."""

    store: int
    banks: slice
    values: Tensor


class ArrangedModules(Mapping[str, DeviceModule]):
    """The modules of an adapter in blocks. Their tensors are created on first access: a bank copies the blocks.

    `make` returns all modules.
    """

    def __init__(self, ranks: Mapping[str, int], make: Callable[[], Mapping[str, DeviceModule]]) -> None:
        self.ranks, self._make = ranks, make

    @cached_property
    def _made(self) -> Mapping[str, DeviceModule]:
        return self._make()

    def __getitem__(self, name: str) -> DeviceModule:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, slots=True)
class DeviceAdapter:
    """A checked adapter, ready to be copied into the bank. Loading threads make it; the engine's thread copies it.

    `blocks`: if a BankLayout has arranged the modules in them, which are then views of these blocks.
    `experts`: the modules that are fused experts, which take no rows of the bank and are never copied.
    """

    weights_digest: str
    modules: Mapping[str, DeviceModule]
    blocks: tuple[Block, ...] = ()
    experts: Mapping[str, DeviceModule] = field(default_factory=dict)

    @property
    def ranks(self) -> Mapping[str, int]:
        """Return the rank of each module."""
        if isinstance(self.modules, ArrangedModules):
            return self.modules.ranks
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def max_rank(self) -> int:
        """Return the number of bank rows the adapter needs: the rank of its widest module, 1 if it has experts only."""
        return max(self.ranks.values(), default=1)

    @property
    def num_bytes(self) -> int:
        if self.blocks:
            return sum(block.values.nbytes for block in self.blocks) + self.expert_bytes
        return sum(module.num_bytes for module in self.modules.values()) + self.expert_bytes

    @property
    def expert_bytes(self) -> int:
        return sum(module.num_bytes for module in self.experts.values())


def to_device_layout(weights: AdapterWeights, shapes: Shapes, dtype: torch.dtype) -> DeviceAdapter:
    """Convert the weights for a base model whose modules have these (out, in) shapes.

    Raises: AdapterUnfit, which names every unsuitable module.
    """
    linears, of_experts = split_experts(weights.modules)
    experts = expert_modules(of_experts, shapes, dtype)
    if linears or not experts:
        check_shapes(linears, shapes)
    modules: dict[str, DeviceModule] = {}
    spoiled: list[str] = []
    for names in _alike(linears):
        a, bt = _folded([linears[name] for name in names], dtype)
        # Every row of a step multiplies all active bank rows, some by zero: one non-finite value would spoil them all.
        spoiled += _non_finite(names, a, bt)
        modules |= {name: DeviceModule(a[m], bt[m]) for m, name in enumerate(names)}
    check_finite(spoiled)
    return DeviceAdapter(weights.weights_digest, modules, experts=experts)


def split_experts(
    modules: Mapping[str, ModuleWeights],
) -> tuple[Mapping[str, ModuleWeights], dict[str, ModuleWeights]]:
    """Return the modules that are linear layers, and those that are fused experts."""
    pairs: Mapping[str, Pair] = modules.layout.pairs if isinstance(modules, StoredModules) else modules
    names = [name for name, pair in pairs.items() if len(pair.lora_a.shape) > 2]
    if not names:
        return modules, {}
    experts = {name: modules[name] for name in names}
    if isinstance(modules, StoredModules):
        return StoredModules(_without_experts(modules.layout), modules.data), experts
    return {name: module for name, module in modules.items() if name not in experts}, experts


@lru_cache(maxsize=64)
def _without_experts(layout: BlobLayout) -> BlobLayout:
    return BlobLayout({name: pair for name, pair in layout.pairs.items() if len(pair.lora_a.shape) == 2})


def expert_modules(modules: Mapping[str, ModuleWeights], shapes: Shapes, dtype: torch.dtype) -> dict[str, DeviceModule]:
    """Convert the modules that are fused experts. Raises: AdapterUnfit, which names every unsuitable module."""
    if not modules:
        return {}
    check_shapes(modules, shapes)
    found = {
        name: DeviceModule(
            module.lora_a.to(dtype, copy=True), (module.lora_b.float() * module.scaling).mT.to(dtype).contiguous()
        )
        for name, module in modules.items()
    }
    check_finite([name for name, each in found.items() if not all(one.isfinite().all() for one in (each.a, each.bt))])
    return found


def check_shapes(modules: Mapping[str, Pair], shapes: Shapes) -> None:
    """Raise AdapterUnfit if a module does not have the (out, in) of the base model's, or if there is none."""
    problems = [text for name, module in modules.items() if (text := _shape_problem(name, module, shapes))]
    if not modules:
        problems.append("the adapter has no modules")
    if problems:
        raise AdapterUnfit("; ".join(problems))


def check_finite(spoiled: Sequence[str]) -> None:
    """Raise AdapterUnfit if modules are `spoiled` by non-finite values."""
    if spoiled:
        reason = "has non-finite values in the base model's precision after scaling"
        raise AdapterUnfit("; ".join(f"{name} {reason}" for name in spoiled))


def _alike(modules: Mapping[str, ModuleWeights]) -> Iterable[list[str]]:
    """Group the modules by shape and dtype. Batched work avoids a thousand small operations, which delay the engine."""
    names: defaultdict[object, list[str]] = defaultdict(list)
    for name, module in modules.items():
        kind = (module.lora_a.shape, module.lora_b.shape, module.lora_a.dtype, module.lora_b.dtype)
        names[kind].append(name)
    return names.values()


def _folded(modules: Sequence[ModuleWeights], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a (M, R, I) and bt (M, R, O) of M modules of equal shape and dtype."""
    scaling = torch.tensor([module.scaling for module in modules])[:, None, None]
    folded = (torch.stack([module.lora_b for module in modules]).float() * scaling).mT
    a = torch.stack([module.lora_a for module in modules]).to(dtype)
    return a, torch.empty(folded.shape, dtype=dtype).copy_(folded)


def _non_finite(names: Sequence[str], a: Tensor, bt: Tensor) -> list[str]:
    """Return the modules that have non-finite values. a (M, R, I), bt (M, R, O)."""
    if (a.sum() + bt.sum()).isfinite():  # five times as fast; an overflow of the sum only leads to the exact check
        return []
    finite = (_largest(a).isfinite() & _largest(bt).isfinite()).tolist()
    return [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest magnitude, or NaN if there is one: (M, R, X) -> (M,)."""
    return tensor.abs().amax(dim=(1, 2))


def _shape_problem(name: str, module: Pair, shapes: Shapes) -> str | None:
    if name not in shapes:
        return f"the base model has no module {name!r}"
    a, b = module.lora_a.shape, module.lora_b.shape
    shape = (b[-2], a[-1], *a[:-2])
    if shape != shapes[name] or a[:-2] != b[:-2]:
        kind = "(out, in, experts)" if len(shape) > 2 else "(out, in)"
        return f"{name} has shape {kind} {shape}, the base model has {shapes[name]}"
    if not 1 <= a[-2] == b[-1]:
        return f"{name} has rank {a[-2]} in lora_A but {b[-1]} in lora_B"
    return None
