"""Fixtures of the tests of compiled layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

from gpu_worker.model.packed_linear import LinearKernel
from gpu_worker.native import device_parts
from gpu_worker.native.attention import attention_cpu
from gpu_worker.native.compiled_layer import LayerKernel, load_layer_kernel
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import MakeEngine, compiled
from tests.gpu_worker.native.compiled_layers import MakeBf16, randomise
from tests.tiny import TinyBase


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tokens of every layer that the kernel computes, by itself or with all others of a step."""
    seen, call, call_all = list[int](), LayerKernel.__call__, LayerKernel.decoder

    def counted(kernel: LayerKernel, layer: int, step: int, cache: int, x: Tensor, y: Tensor) -> None:
        seen.append(x.shape[1])
        call(kernel, layer, step, cache, x, y)

    def counted_together(kernel: LayerKernel, *tokens: Any) -> int:
        *_, layers, y = tokens
        code = call_all(kernel, *tokens)
        seen.extend([y.shape[1]] * len(layers) * (code == 0))
        return code

    monkeypatch.setattr(LayerKernel, "__call__", counted)
    monkeypatch.setattr(LayerKernel, "decoder", counted_together)
    return seen


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record the calls of the layer's parts around the attention, with their numbers of tokens."""
    seen = list[tuple[str, int]]()
    before, after = LayerKernel.before_attention, LayerKernel.after_attention

    def first(kernel: LayerKernel, layer: int, step: int, x: Tensor) -> None:
        seen.append(("before", x.shape[1]))
        before(kernel, layer, step, x)

    def second(kernel: LayerKernel, layer: int, step: int, x: Tensor, attended: Tensor, y: Tensor) -> None:
        seen.append(("after", x.shape[1]))
        after(kernel, layer, step, x, attended, y)

    monkeypatch.setattr(LayerKernel, "before_attention", first)
    monkeypatch.setattr(LayerKernel, "after_attention", second)
    return seen


@pytest.fixture
def make_bf16(make_engine: MakeEngine, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> MakeBf16:
    """Return a factory of engines in bfloat16, whose layers are compiled on every processor, by default.

    Torch attends for prompts of nine tokens and more, as it does for long prompts.
    """
    monkeypatch.setattr(attention_cpu, "_MOST_READS", 44)
    monkeypatch.setattr(attention_cpu, "_MOST_READS_BEHIND", 44)
    kernel = compiled(LinearKernel.load)
    compiled(load_layer_kernel)
    monkeypatch.setattr(device_parts, "make_linear_kernel", lambda config: kernel)

    def make(adapters: Mapping[str, AdapterWeights], family: str = "gemma3", **changes: Any) -> Engine:
        own, compiles = changes.pop("base", None), changes.pop("compiles", True)
        base = own or tiny_base(family, "bfloat16")
        randomise(base.model)
        known = "" if own else f"random norms, compiles={compiles}"
        with monkeypatch.context() as patched:
            if not compiles:
                patched.setattr(device_parts, "compile_layers", lambda *_: 0)
            return make_engine(adapters, family, base=base, known=known, dtype="bfloat16", **changes)

    return make
