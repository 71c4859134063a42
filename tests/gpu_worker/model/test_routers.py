"""Routers whose code is one product with their weight take adapters; others are left as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpu_worker.model.routers import routers


class Router(nn.Module):
    """Has its weight in float32 or not, and one product or two."""

    def __init__(self, num_products: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self._num_products = num_products

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 4)
        for _ in range(self._num_products):
            y = y + nn.functional.linear(x.float(), self.weight.type(torch.float32))
        return y


class Multiplying(Router):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Biased(Router):
    def forward(self, x: Tensor, bias: Tensor | None = None, **options: object) -> Tensor:
        assert bias is not None
        return super().forward(x) + bias


class Corrected(Router):
    def __init__(self) -> None:
        super().__init__()
        self.correction = nn.Parameter(torch.zeros(4))


class NeedsMore(Router):
    def forward(self, x: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x[places])  # by float numbers, which is an error


def test_only_routers_of_one_product_are_found() -> None:
    kinds = {
        "gate": Router(),
        "twice": Router(2),
        "never": Router(0),
        "biased": Biased(),
        "corrected": Corrected(),
        "needing more": NeedsMore(),
        "multiplying": Multiplying(),
        "linear": nn.Linear(3, 4, bias=False),
        "experts": nn.Identity(),
    }
    model = nn.Module()
    model.mlp = nn.ModuleDict(kinds)
    weights = {name: kind.weight for name, kind in kinds.items() if name != "experts"}
    assert list(routers(model, ["mlp.experts"])) == ["mlp.gate", "mlp.biased", "mlp.corrected"]
    for name, weight in weights.items():
        assert kinds[name].weight is weight and isinstance(weight, nn.Parameter), "the search changes nothing"
