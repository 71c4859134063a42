"""The adapters of experts in vLLM's layers.

vLLM computes the experts as ever. Then the outputs of those tokens whose plan has an adapter on the layer's experts are
replaced by the native engine's products, one expert after the other. So steps without such adapters, and other tokens
beside them, cost and round as stock. The base weights are read where vLLM keeps them: of one expert at a time, as its
kernels for the CPU arrange them. Dims: E experts, H hidden values of the model, M of an expert, P as many with padding.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from gpu_worker.bank.device_layout import DeviceModule
from gpu_worker.model.experts import ExpertMapping, compute_experts
from lora_store.adapter import Shapes
from lora_store.peft_config import EXPERT_PARAMETERS

logger = logging.getLogger(__name__)

_GATES: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: nn.functional.silu,
    MoEActivation.GELU: nn.functional.gelu,
    MoEActivation.GELU_TANH: partial(nn.functional.gelu, approximate="tanh"),
}
_BLOCK = 16  # outputs that vLLM's kernels for the CPU keep together
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")  # the number of a layer in a path


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """The hidden values of each expert that one process computes, of all `num_hidden`: all of them without others.

    It has their columns of gate and up, and of down's A. The processes add up their outputs, adapters included.
    """

    own: slice
    num_hidden: int

    def of(self, name: str, module: DeviceModule) -> DeviceModule:
        """Return this process's part of the module's tensors, which are those of experts."""
        if self.own == slice(0, self.num_hidden):
            return module
        if name.endswith(EXPERT_PARAMETERS[1]):
            return DeviceModule(module.a[..., self.own], module.bt)
        gate, up = module.bt.chunk(2, dim=-1)
        return DeviceModule(module.a, torch.cat([gate[..., self.own], up[..., self.own]], dim=-1))


class ExpertLayer:
    """The experts of one layer of vLLM, with the plans of a step. `container`: their path in adapters.

    `ends`: of this process's share of both parameters, (out, in, experts).
    """

    def __init__(self, place: int, layer: Any, container: str) -> None:
        self.names = f"{container}.{EXPERT_PARAMETERS[0]}", f"{container}.{EXPERT_PARAMETERS[1]}"
        self._place, self._layer, self._own = place, layer, layer.forward_modular
        self._num: int = layer.moe_config.intermediate_size_per_partition
        parallel = layer.moe_config.moe_parallel_config
        first, num_hidden = parallel.tp_rank * self._num, parallel.tp_size * self._num
        self.share = ExpertShare(slice(first, first + self._num), num_hidden)
        num, width, size = layer.w2_weight.shape
        self.ends = {
            self.names[0]: (num_hidden + first + self._num, width, num),
            self.names[1]: (width, first + self._num, num),
        }
        self._is_padded = size != self._num
        self._group = _find_group(layer)
        layer.forward_modular = self.forward_modular

    def forward_modular(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Called by vLLM's layer, within compiled graphs too."""
        y: Tensor = self._own(
            x=x,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
        torch.ops.loraretriever.adapt_experts(y, x, topk_weights, topk_ids, self._place)
        return y

    def adapt(self, y: Tensor, x: Tensor, shares: Tensor, chosen: Tensor, step: ExpertMapping) -> None:
        """Replace the outputs y (N', H) of tokens that have an adapter on these experts."""
        tokens = step.find_tokens(self.names)
        if len(tokens):
            y[tokens] = compute_experts(
                x[tokens],
                chosen[tokens],
                shares[tokens],
                tokens=tokens,
                names=self.names,
                weights_of=self._weights,
                apply_gate=self._apply_gate,
                mapping=step,
            )

    def _apply_gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return _GATES[self._layer.activation](gate) * up

    def _weights(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the expert's own gate and up (2M, H), and down (H, M)."""
        both, down = (
            weight if self._group is None else unpack(weight, self._group)
            for weight in (self._layer.w13_weight[expert], self._layer.w2_weight[expert])
        )
        if not self._is_padded:
            return both, down
        gate, up = both.chunk(2)
        return torch.cat([gate[: self._num], up[: self._num]]), down[:, : self._num]


def unpack(weight: Tensor, group: int) -> Tensor:
    """Return a weight (O, I) that vLLM has arranged for the CPU: in blocks of outputs, by groups of inputs."""
    num_out, num_in = weight.shape
    return weight.view(num_out // _BLOCK, num_in // group, _BLOCK, group).transpose(1, 2).reshape(num_out, num_in)


def _find_group(layer: Any) -> int | None:
    """Return how many inputs stand together in the weights that vLLM has arranged for the CPU, None for plain ones."""
    found = layer.quant_method.experts_cls
    kernel = layer.quant_method.moe_kernel
    if not issubclass(found, CPUUnquantizedExperts) or (kernel is not None and kernel.fused_experts._use_zentorch):
        return None
    return 1 if found.isa == "vec" else 4 // int(layer.w13_weight.dtype.itemsize)


def _find_reason(layer: Any) -> str | None:
    """Return why adapters cannot change these experts, None if they can."""
    method = layer.quant_method
    if not isinstance(method, UnquantizedFusedMoEMethod):
        return "their weights are quantised"
    if layer.moe_config.has_bias or layer.apply_router_weight_on_input:
        return "they have biases, or weights on their inputs"
    if layer.activation not in _GATES or layer.moe_config.swiglu_limit is not None:
        return f"their activation is {layer.activation.value}"
    if layer.moe_config.moe_parallel_config.use_ep:
        return "the processes have different experts"
    backend = method.unquantized_backend
    if backend not in (UnquantizedMoeBackend.CPU, UnquantizedMoeBackend.TRITON):
        return f"vLLM has arranged their weights for {backend.value}"
    if (group := _find_group(layer)) is not None:
        weight = torch.arange(2 * _BLOCK * 64).remainder(251).view(1, 2 * _BLOCK, 64).to(layer.w13_weight.dtype)
        if not torch.equal(unpack(cpu_prepack_moe_weight(weight, method.experts_cls.isa)[0], group), weight[0]):
            return "vLLM arranges their weights in an unknown way"
    return None


def adapt_layers(model: nn.Module, shapes: Shapes) -> Iterator[ExpertLayer]:
    """Let vLLM's layers of experts add the plans of each step. Those that cannot are named in the log.

    `shapes`: (out, in, experts) of the parameters in transformers' model, whose layers have the same numbers.
    """
    containers = _by_layer({name.rpartition(".")[0]: None for name in shapes})
    layers = _by_layer({path: module for path, module in model.named_modules() if isinstance(module, MoERunner)})
    place = 0
    for number, container in containers.items():
        if (found := layers.get(number)) is None or container is None:
            continue
        layer: Any = model.get_submodule(found).routed_experts
        if (reason := _find_reason(layer)) is not None:
            logger.warning("adapters on the experts of layer %s are refused: %s", number, reason)
            continue
        yield ExpertLayer(place, layer, container)
        place += 1


def _by_layer(paths: Mapping[str, object]) -> dict[str, str | None]:
    """Return the path of each layer by its number, None where a layer has several."""
    found: dict[str, str | None] = {}
    for path in paths:
        if (match := _LAYER.search(path)) is not None:
            found[match[1]] = None if match[1] in found else path
    return found
