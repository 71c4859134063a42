"""Call the first decoder layer of an engine's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_worker.model.attention_plan import Segment
from gpu_worker.native.compiled_layer import CompiledLayer
from gpu_worker.native.loop import Engine
from tests.gpu_worker.engine_driver import ask, greedy
from tests.tiny import SHAPE


class OneStep:
    """The arguments of the first layer, in a step that decodes one token."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        ask(engine, greedy("abc"))
        engine.step()
        self.layer = engine.base.model.model.layers[0]
        assert isinstance(self.layer.forward, CompiledLayer)
        self.x = torch.randn(1, 1, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(0)).bfloat16()
        self.angles = torch.full((1, 1, 8), 0.6).bfloat16(), torch.full((1, 1, 8), 0.8).bfloat16()

    @torch.inference_mode()
    def __call__(self, *, is_new: bool = True, own: bool = False, **changes: Any) -> Tensor:
        """Call the layer. `is_new`: as a step of its own; `own`: in its own way."""
        context = self._engine._forward._context
        if is_new:
            context.fill(None, self._engine.kv_cache.attention([Segment(0, 0, 1, 4)]))
        arguments = {"position_embeddings": self.angles, "attention_mask": None, "step": context, **changes}
        x = arguments.pop("x", self.x)
        y: Tensor = self.layer.forward._own(x, **arguments) if own else self.layer(x, **arguments)
        return y
