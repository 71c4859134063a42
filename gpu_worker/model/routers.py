"""Add the adapters of each token's plan to routers, whose weight is a parameter (E, I) and no linear layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpu_worker.bank.bank import ModuleBank
from gpu_worker.model.step_context import StepContext

Product = Callable[[Tensor, Tensor], None]


class RouterWeight(Tensor):
    """A router's weight. `added` changes each product with it, y (..., E), in place: it gets the input x (..., I)."""

    added: Product

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        plain = [each.as_subclass(Tensor) if isinstance(each, cls) else each for each in arguments]
        found = function(*plain, **(options or {}))
        if function is nn.functional.linear and isinstance(arguments[1], cls):
            arguments[1].added(arguments[0], found)
        elif isinstance(found, Tensor) and isinstance(arguments[0], cls):  # its values in another dtype
            return _with(found, arguments[0].added)
        return found


def _with(weight: Tensor, added: Product) -> RouterWeight:
    wrapped = weight.as_subclass(RouterWeight)
    wrapped.added = added
    return wrapped


def routers(model: nn.Module, experts: Collection[str]) -> dict[str, nn.Module]:
    """Return the routers of these experts that compute one product with their weight, by path."""
    found = {}
    for path in experts:
        parent = path.rpartition(".")[0]
        for name, module in model.get_submodule(parent).named_children():
            matrices = [each for each, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1]
            if matrices == ["weight"] and not isinstance(module, nn.Linear) and _has_one_product(module):
                found[f"{parent}.{name}"] = module
    return found


def as_linears(found: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """Return for each router a linear layer with its weight, which describes it to a bank and to the check at start."""
    linears = {}
    for name, module in found.items():
        weight = module.get_parameter("weight")
        linears[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linears[name].weight = nn.Parameter(weight.data, requires_grad=False)
    return linears


def adapt_routers(found: Mapping[str, nn.Module], banks: Mapping[str, ModuleBank], step: StepContext) -> None:
    """Let the routers add the adapters of each step."""
    for name, module in found.items():
        _replace_weight(module, _with(module.get_parameter("weight").data, _adding(banks[name], step)))


def _adding(bank: ModuleBank, step: StepContext) -> Product:
    def add(x: Tensor, y: Tensor) -> None:
        if step.composition is not None and bank.is_used:
            delta = torch.zeros(y.shape, dtype=bank.bt.dtype, device=y.device)  # routers may compute in float32
            step.composition.add(x.to(delta.dtype), [(delta, bank)])
            y += delta

    return add


def _has_one_product(module: nn.Module) -> bool:
    """Return whether the router's code multiplies its input with the weight, once, by torch's function for that.

    Other inputs that it needs are numbers for each expert, such as a bias of the choice.
    """
    weight = module.get_parameter("weight")
    if weight.ndim != 2:
        return False
    products: list[Tensor] = []
    x = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    parameters = inspect.signature(module.forward).parameters.values()
    num_others = sum(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters) - 1
    others = [torch.zeros(len(weight), device=weight.device)] * num_others
    _replace_weight(module, _with(weight.data, lambda x, y: products.append(y)))
    try:
        with torch.inference_mode():
            module(x, *others)
    except Exception:  # it needs inputs of another kind
        return False
    finally:
        del module.weight
        module.weight = weight
    return len(products) == 1


def _replace_weight(module: nn.Module, weight: RouterWeight) -> None:
    del module.weight  # a parameter's name takes parameters only
    module.weight = weight
