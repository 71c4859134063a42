"""Compute mixtures as the paper writes them, instead of the engine's way. For measurements only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gpu_worker.bank.bank import ModuleBank
from gpu_worker.model.dense_mapping import DenseMapping
from gpu_worker.model.lora_linear import LoraLinear
from gpu_worker.model.mapping import Composer
from gpu_worker.native.loop import Engine


class LiteralMixture:
    """X' = M o (B o A o X), every adapter of the batch applied to every token.

    Dims: N tokens (b · l, packed), P adapters of the batch, R rank, I in, O out. The stacks A (P, R, I) and B (P, R, O)
    are built when the active adapters change; the (N, P, O) product is computed in each layer and step.
    Source: LoraRetriever (ACL Findings 2024), section 4.3 and Algorithm 1.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._at_step = -1
        self._rows = torch.empty(0, 0, dtype=torch.long)  # (P, R): bank rows of each active adapter
        self._stacks: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, linear: LoraLinear, x: Tensor) -> Tensor:  # (..., N, I) -> (..., N, O)
        y: Tensor = linear.base(x)
        dense = linear._step.composition
        if not isinstance(dense, DenseMapping) or not linear.bank.is_used:
            return y
        self._refresh()
        a, b = self._stack(linear.bank)
        mapping = dense._weights[self._rows[:, 0], 0].T  # (N, P)
        h = torch.einsum("ni,pri->npr", x.flatten(0, -2), a)
        outputs = torch.einsum("npr,pro->npo", h, b)
        y.flatten(0, -2).add_(torch.einsum("npo,np->no", outputs, mapping))
        return y

    def _refresh(self) -> None:
        """Determine the bank rows of the active adapters, once per step."""
        if self._at_step == self._engine.num_steps:
            return
        self._at_step = self._engine.num_steps
        residency = self._engine.residency
        placed = [residency.rows(digest) for digest in sorted(residency.resident)]
        rows = torch.tensor([rows for rows in placed if rows[0] < residency.active_rows])
        if not torch.equal(rows, self._rows):
            self._rows = rows
            self._stacks.clear()

    def _stack(self, bank: ModuleBank) -> tuple[Tensor, Tensor]:
        if id(bank) not in self._stacks:
            self._stacks[id(bank)] = bank.a[self._rows], bank.bt[self._rows]
        return self._stacks[id(bank)]


@contextmanager
def literal_mixture(engine: Engine) -> Iterator[None]:
    """Compute mixtures and selections in the paper's way within the block. Fusions are not changed."""
    literal, plain, forward = LiteralMixture(engine), LoraLinear.each, engine._forward
    composes, dtype, device = forward.compose, engine.base.dtype, torch.device(engine.config.device)
    forward.compose = Composer(engine.residency, dtype, None, device)  # the dense mapping, whose matrix can be read
    LoraLinear.each = staticmethod(lambda layers, x: [literal.forward(layer, x) for layer in layers])  # type: ignore[method-assign]
    try:
        yield
    finally:
        LoraLinear.each, forward.compose = staticmethod(plain), composes  # type: ignore[method-assign]
