"""Faults that tests put into an engine: passes that raise, and adapters that overflow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gpu_worker.model.step_context import StepContext
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights, ModuleWeights
from tests.gpu_worker.engine_driver import Shapes

BAD = "~"  # the model raises if this letter is among a step's tokens


class OutOfMemory(RuntimeError):
    """The error of a step in these tests."""


@dataclass
class Faults:
    """The conditions under which a forward pass raises, before or after it has written keys and values."""

    num_passes: int = 0  # passes that raise
    bad_token: int | None = None
    num_seen: int = 0  # passes that have started

    def check(self, input_ids: torch.Tensor) -> None:
        if self.bad_token is not None and self.bad_token in input_ids:
            raise OutOfMemory("out of memory for a bad token")
        if self.num_passes:
            self.num_passes -= 1
            raise OutOfMemory("out of memory")


def faults_of(engine: Engine, *, after: bool = False) -> Faults:
    """Install faults in the engine's model; none is active yet."""
    faults, model = Faults(), engine.base.model

    def before_pass(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        faults.num_seen += 1
        if not after:
            faults.check(kwargs["input_ids"])

    def after_pass(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor], output: object) -> None:
        if after:
            faults.check(kwargs["input_ids"])

    model.register_forward_pre_hook(before_pass, with_kwargs=True)
    model.register_forward_hook(after_pass, with_kwargs=True)
    return faults


def bad_id(engine: Engine) -> int:
    [token_id] = engine.base.tokenizer(BAD, add_special_tokens=False).input_ids
    assert isinstance(token_id, int)
    return token_id


def break_adapters(engine: Engine, error: Exception | None = None) -> None:
    """Make every pass that composes adapters raise."""

    def check(module: nn.Module, args: object, kwargs: dict[str, StepContext]) -> None:
        if kwargs["step"].composition is not None:
            raise error or OutOfMemory("no kernel for adapters")

    engine.base.model.register_forward_pre_hook(check, with_kwargs=True)


def break_chunks(engine: Engine) -> None:
    """Make every pass over more than three tokens raise."""

    def check(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].shape[1] > 3:
            raise OutOfMemory("no memory for a chunk")

    engine.base.model.register_forward_pre_hook(check, with_kwargs=True)


def hostile_adapter(shapes: Shapes, kind: str) -> AdapterWeights:
    """Return an adapter of finite tensors that overflows in one of the two products, or when scaled."""
    size_a, size_b, scaling = {
        "first product": (3e38, 1.0, 1.0),
        "second product": (1e20, 1e20, 1.0),
        "folded scaling": (1.0, 1e38, 1e3),
    }[kind]
    modules = {
        name: ModuleWeights(torch.full((4, num_in), size_a), torch.full((num_out, 4), size_b), scaling)
        for name, (num_out, num_in) in shapes.items()
    }
    return AdapterWeights("hostile", modules)
