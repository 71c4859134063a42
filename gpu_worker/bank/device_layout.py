"""An adapter's weights as the bank holds them: checked, in its precision, scaling folded in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.errors import AdapterUnfit
from lora_store.adapter import AdapterWeights, ModuleWeights


@dataclass(frozen=True, slots=True)
class DeviceModule:
    """One module's pair. Dims: R rank, I in, O out. `a` (R, I); `bt` (R, O), lora_b transposed, scaling folded in."""

    a: Tensor
    bt: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class DeviceAdapter:
    """What a bank takes in without another look. It is made on a loading thread: the engine's only copies it."""

    weights_digest: str
    modules: dict[str, DeviceModule]

    @property
    def max_rank(self) -> int:
        """Rank rows this adapter takes in a bank: the widest of its modules."""
        return max(module.rank for module in self.modules.values())

    @property
    def num_bytes(self) -> int:
        return sum(module.a.nbytes + module.bt.nbytes for module in self.modules.values())


def to_device_layout(
    weights: AdapterWeights, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, *, pin: bool = False
) -> DeviceAdapter:
    """The weights for a base model whose modules have these (out, in) shapes; pinned, they reach a GPU without a wait.

    Raises: AdapterUnfit, naming every module that does not fit.
    """
    problems = [text for name, module in weights.modules.items() if (text := _shape_problem(name, module, shapes))]
    if not weights.modules:
        problems.append("the adapter has no modules")
    if problems:
        raise AdapterUnfit("; ".join(problems))
    modules: dict[str, DeviceModule] = {}
    for names in _alike(weights.modules):
        a, bt = _folded([weights.modules[name] for name in names], dtype)
        # The bank's rows are read, times zero, by every row of a step: one that is not finite spoils them all.
        non_finite = _non_finite(names, a, bt)
        problems += [f"{name} is not finite in the base model's precision, its scaling included" for name in non_finite]
        if pin:
            a, bt = a.pin_memory(), bt.pin_memory()
        modules |= {name: DeviceModule(a[m], bt[m]) for m, name in enumerate(names)}
    if problems:
        raise AdapterUnfit("; ".join(problems))
    return DeviceAdapter(weights.weights_digest, modules)


def _alike(modules: Mapping[str, ModuleWeights]) -> Iterable[list[str]]:
    """Names by shape and dtype. What is alike is worked on together: a thousand small operations hold up the engine."""
    names: defaultdict[object, list[str]] = defaultdict(list)
    for name, module in modules.items():
        kind = (module.lora_a.shape, module.lora_b.shape, module.lora_a.dtype, module.lora_b.dtype)
        names[kind].append(name)
    return names.values()


def _folded(modules: Sequence[ModuleWeights], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a (M, R, I) and bt (M, R, O) of M modules that are alike."""
    scaling = torch.tensor([module.scaling for module in modules])[:, None, None]
    folded = (torch.stack([module.lora_b for module in modules]).float() * scaling).mT
    a = torch.stack([module.lora_a for module in modules]).to(dtype)
    return a, torch.empty(folded.shape, dtype=dtype).copy_(folded)


def _non_finite(names: Sequence[str], a: Tensor, bt: Tensor) -> list[str]:
    """Which of the modules are not finite throughout. a (M, R, I), bt (M, R, O)."""
    if (a.sum() + bt.sum()).isfinite():  # a fifth of the time; huge values may lead to a closer look
        return []
    finite = (_largest(a).isfinite() & _largest(bt).isfinite()).tolist()
    return [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]


def _largest(tensor: Tensor) -> Tensor:
    """(M, R, X) -> (M,): the largest magnitude, NaN where there is one."""
    return tensor.abs().amax(dim=(1, 2))


def _shape_problem(name: str, module: ModuleWeights, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    if name not in shapes:
        return f"the base model has no module {name!r}"
    shape = (module.lora_b.shape[0], module.lora_a.shape[1])
    if shape != shapes[name]:
        return f"{name} is made for (out, in) {shape}, the base model has {shapes[name]}"
    if not 1 <= module.lora_a.shape[0] == module.lora_b.shape[1]:
        return f"{name} has ranks {module.lora_a.shape[0]} and {module.lora_b.shape[1]}"
    return None
