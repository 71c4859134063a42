"""Linear layers of one input, which add the adapters of each token's plan together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.model.lora_linear import LoraLinear, compute_outputs
from gpu_worker.model.mapping import composition
from gpu_worker.model.step_context import Outputs, StepContext
from gpu_worker.native.attention.kv_pages import HostKvCache
from tests.gpu_worker.engine_driver import kv_shape
from tests.gpu_worker.slow_lora import WIDTHS, pool_of, settled
from tests.tiny import plan_of


class Composed(nn.Module):
    """The layers of one input over a bank with a plan, and what their composition is asked."""

    def __init__(self, lora_kernel: LoraKernel | None) -> None:
        super().__init__()
        pool = pool_of([4, 1, 2], 16, WIDTHS)
        bank, residency = settled(pool, 16, WIDTHS, torch.float32)
        mixture = plan_of("mixture", (pool[0], 0.5), (pool[2], -1.0))
        lora = composition([mixture] * 3, [1] * 3, residency, torch.float32, lora_kernel, torch.device("cpu"))
        assert lora is not None
        self.asked: list[int] = []
        add, step = lora.add, StepContext()

        def counted(x: torch.Tensor, outputs: Outputs) -> None:
            self.asked.append(len(outputs))
            add(x, outputs)

        lora.add = counted  # type: ignore[method-assign]
        step.fill(lora, HostKvCache(kv_shape()).attention([Segment(0, 0, 3, 0)]))
        self.bank = bank
        self.layers = nn.ModuleList(
            [LoraLinear(nn.Linear(16, width), bank.modules[name], step) for name, width in WIDTHS.items()]
        )

    def alone(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return each layer's output from a call of its own, with an input of its own."""
        found = [layer(x.clone()) for layer in self.layers]
        self.asked.clear()
        return found


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("is_grouped", [True, False])
@torch.inference_mode()
def test_layers_of_one_input_add_their_adapters_in_one_call(is_grouped: bool, lora_kernel: LoraKernel) -> None:
    """The outputs are those of separate calls, bit for bit. A layer that no adapter has is left out."""
    composed, x = Composed(lora_kernel if is_grouped else None), torch.randn(1, 3, 16)
    expected = composed.alone(x)
    assert equal(compute_outputs(composed.layers, x), expected) and composed.asked == [3]
    composed.bank.modules["x.k_proj"].is_used = False
    expected = composed.alone(x)
    assert equal(compute_outputs(composed.layers, x), expected) and composed.asked == [2]
    for module in composed.bank.modules.values():
        module.is_used = False
    assert equal(compute_outputs(composed.layers, x), [layer.base(x) for layer in composed.layers])
    assert composed.asked == [2]


@torch.inference_mode()
def test_layers_that_are_watched_or_read_other_inputs_are_called_alone(lora_kernel: LoraKernel) -> None:
    composed, x = Composed(lora_kernel), torch.randn(1, 3, 16)
    other, plain = Composed(lora_kernel), nn.Linear(16, 4)
    mixed = [composed.layers[0], other.layers[1]]
    assert equal(compute_outputs(mixed, x), [layer(x.clone()) for layer in mixed]) and other.asked == [1, 1]
    assert equal(compute_outputs([plain, composed.layers[0]], x), [plain(x), composed.layers[0](x)])
    seen: list[torch.Tensor] = []
    composed.layers[1].register_forward_hook(lambda _, __, output: seen.append(output))
    composed.asked.clear()
    found = compute_outputs(composed.layers, x)
    assert composed.asked == [1, 1, 1] and len(seen) == 1 and torch.equal(seen[0], found[1])
